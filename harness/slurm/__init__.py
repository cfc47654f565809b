"""Cells on a Slurm cluster (launch=slurm): ``submit`` them, see their ``status``, run one (``array_task``), account for
it (``accounting``). The workers of backend=slurm are in ``backends/slurm.py``."""
