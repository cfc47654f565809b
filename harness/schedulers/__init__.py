"""Schedulers on Syne Tune 0.16's ``TrialScheduler``, usable in any Syne Tune script.

Read ``base.py`` first (what all share), then ``rungs.py`` (successive-halving arithmetic), then one file per scheduler:
ASHA, PASHA, synchronous Hyperband, random search, and the model-based HyperbandBO, BOHB, DyHPO and BOIL, whose models
are in ``bo/``. Importing this package imports no torch; a model does when it is first needed.
"""

from harness.schedulers.asha import ASHA
from harness.schedulers.base import BaseScheduler, Job, Origin, Searcher
from harness.schedulers.bohb import BOHB
from harness.schedulers.boil import BOIL
from harness.schedulers.dyhpo import DyHPO
from harness.schedulers.hyperband import Hyperband
from harness.schedulers.hyperband_bo import HyperbandBO
from harness.schedulers.pasha import PASHA
from harness.schedulers.random import RandomSearch
from harness.schedulers.sampler import CandidateSampler, RandomSampler

__all__ = [
    "ASHA",
    "BOHB",
    "BOIL",
    "PASHA",
    "BaseScheduler",
    "CandidateSampler",
    "DyHPO",
    "Hyperband",
    "HyperbandBO",
    "Job",
    "Origin",
    "RandomSampler",
    "RandomSearch",
    "Searcher",
]
