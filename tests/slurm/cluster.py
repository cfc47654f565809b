"""A real Slurm cluster on this machine, for tests: two virtual nodes with four pretended GPUs each, and accounting.

    python tests/slurm/cluster.py install          # Debian's or Ubuntu's packages; none of their daemons is started
    python tests/slurm/cluster.py up DIR           # munged, mariadbd, slurmdbd, slurmctld, a slurmd per node
    . DIR/env.sh                                   # then sbatch, squeue, sacct, scancel work as usual
    python tests/slurm/cluster.py crash DIR node1  # the node fails: its slurmd and all processes on it are killed
    python tests/slurm/cluster.py hang DIR node1   # only its slurmd is: its jobs go on running, as ghosts
    python tests/slurm/cluster.py revive DIR       # brings failed nodes back
    python tests/slurm/cluster.py down DIR         # ends all of it and removes DIR

Needs root and a host name that means this machine (127.x). Every file is in DIR, every port on loopback and chosen free
at the first start. Nothing is really limited: the nodes share this machine's CPUs and memory, GPUs are links
to /dev/null. Partitions: gpu (the default, preemptible), high (preempts gpu), short (ten minutes at most). Timers are
short: a silent node is down after 10 to 30 s, processes of a job that ends have 5 s from SIGTERM to SIGKILL.
"""

import argparse
import contextlib
import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-client", "munged": "munge",
            "slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}  # fmt: skip
NODES, GPUS, CPUS, MEMORY = 2, 4, 32, 128_000  # MEMORY in MB a node
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

SLURM_CONF = """\
ClusterName=testcluster
SlurmctldHost={host}({address})
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
PlugStackConfig={folder}/etc/plugstack.conf
MpiDefault=none
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
MinJobAge=900
InactiveLimit=0
WaitTime=0
CompleteWait=0
UnkillableStepTimeout=30
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=10
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=1001
MaxJobCount=20000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageTRES=gres/gpu
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost={host}
DbdAddr={address}
DbdPort={dbd_port}
CommunicationParameters=NoInAddrAny
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""

CGROUP_CONF = (
    "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
)


class ClusterError(RuntimeError):
    """The cluster cannot be brought up here; the message says why."""


def missing() -> str | None:
    """Why there can be no cluster on this machine, None if there can."""
    packages = sorted({PACKAGES[name] for name in PACKAGES if not shutil.which(name, path=PATH)})
    if packages:
        return f"needs Debian's packages {', '.join(packages)}"
    if os.geteuid() != 0:
        return "needs root"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "no address"
    if not address.startswith("127."):
        return f"needs a host name that means 127.x in /etc/hosts; {socket.gethostname()} is {address}"
    return None


def install() -> None:
    """Install what is missing. Errors: ClusterError."""
    packages = sorted({PACKAGES[name] for name in PACKAGES if not shutil.which(name, path=PATH)})
    if not packages:
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: start no daemon
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        try:
            done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        except OSError as error:
            raise ClusterError(f"cannot run apt-get: {error}") from None
        if done.returncode:
            raise ClusterError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")


class Cluster:
    """The cluster whose files are in ``folder`` (a short path: Unix sockets are in there). ``extra``: lines of
    slurm.conf that come last."""

    def __init__(self, folder: str | Path, extra: str = ""):
        self.folder = Path(folder).absolute()
        if len(str(self.folder)) > 60:
            raise ClusterError(f"the path {self.folder} is too long for Unix sockets; take one below 60 characters")
        self.extra = extra
        self._pids = self.folder / "run" / "pids.json"

    @property
    def conf(self) -> Path:
        """The slurm.conf: what SLURM_CONF has to be for Slurm's commands."""
        return self.folder / "etc" / "slurm.conf"

    # ---- life

    def up(self) -> None:
        """Start what does not run. Errors: ClusterError."""
        if (why := missing()) is not None:
            raise ClusterError(f"a Slurm cluster {why}")
        if not self._pids.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise ClusterError(f"{self.folder} holds something else, and down would remove it; take an empty folder")
        if not self.conf.exists():
            self._configure()
        run = self.folder / "run"
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={self.folder}/etc/munge.key",
                    f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
                    f"--log-file={self.folder}/log/munged.log", f"--seed-file={run}/munged.seed")  # fmt: skip
        self._wait("munged", lambda: (run / "munge.socket").exists())
        self._start_database()
        if self._start("slurmctld", "slurmctld", "-D", "-i"):
            self._wait("slurmctld", lambda: "is UP" in self.run("scontrol", "ping", check=False))
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
            self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        self._wait("the nodes", lambda: len(self._usable()) == NODES)

    def down(self) -> None:
        """End all that was started, jobs included, and remove the folder. Errors: ClusterError (no cluster)."""
        self._check()
        if self._alive("slurmctld"):
            with contextlib.suppress(ClusterError):
                self.run("scancel", "-u", getpass.getuser())
                self._wait("the jobs' end", lambda: not self.active(), 15)
        self._kill(self._job_processes())
        for name in [*(f"slurmd-{node}" for node in self.nodes), "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            self._end(name)
        self._kill(self._job_processes())
        shutil.rmtree(self.folder, ignore_errors=True)

    def crash(self, node: str) -> None:
        """Fail a node: its slurmd and whatever runs on it are killed at once."""
        self.hang(node)
        self._kill(self._job_processes(node))

    def hang(self, node: str) -> None:
        """Kill a node's slurmd only: what runs on it goes on, and Slurm will think that the node is gone."""
        pid = self._alive(f"slurmd-{node}")
        if pid is None:
            raise ClusterError(f"{node} does not run")
        os.kill(pid, signal.SIGKILL)
        self._wait(f"the end of {node}", lambda: self._alive(f"slurmd-{node}") is None)

    def revive(self) -> None:
        """Bring failed nodes back. Errors: ClusterError."""
        self._check()
        for node in self.nodes:
            if self._alive(f"slurmd-{node}") is None:
                self._kill(self._job_processes(node))
        self.up_nodes()

    def up_nodes(self) -> None:
        """Start nodes that are down, and make Slurm use them at once."""
        for node in self.nodes:
            self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        self._wait("the nodes", lambda: len(self._resumed()) == NODES)

    def clear(self) -> None:
        """No job and no failed node is left."""
        self.run("scancel", "-u", getpass.getuser())
        self.revive()
        self._wait("the jobs' end", lambda: not self.active())

    # ---- asking

    @property
    def nodes(self) -> list[str]:
        return [f"node{k}" for k in range(1, NODES + 1)]

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of Slurm's commands. Errors: ClusterError with what it said, if ``check``."""
        try:
            done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{' '.join(command)}: no answer within 60 s") from None
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def active(self) -> list[str]:
        """Ids of the jobs that wait or run."""
        return self.run("squeue", "-h", "-r", "-o", "%i").split()

    def _usable(self) -> list[str]:
        shown = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N %T", check=False).splitlines()
        return [line.split()[0] for line in shown if line.split()[1] in ("idle", "mixed", "allocated", "completing")]

    def _resumed(self) -> list[str]:
        usable = self._usable()
        for node in set(self.nodes) - set(usable):
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        return usable

    # ---- parts

    def _check(self) -> None:
        if not self._pids.exists():
            raise ClusterError(f"there is no cluster in {self.folder}")

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf), "LC_ALL": "C"}

    def _configure(self) -> None:
        for name in ("etc", "log", "run", "state", "spool", "gpu"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._pids.write_text("{}")
        for k in range(GPUS):  # devices: with regular files CUDA_VISIBLE_DEVICES would come out empty
            (self.folder / "gpu" / f"nvidia{k}").symlink_to("/dev/null")
        host = socket.gethostname().split(".")[0]
        ctld, dbd, *nodes = _free_ports(2 + NODES)
        values = {"folder": self.folder, "host": host, "address": socket.gethostbyname(socket.gethostname()),
                  "ctld_port": ctld, "dbd_port": dbd}  # fmt: skip
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory={MEMORY} "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(self.nodes, nodes, strict=True)
        ]
        etc = self.folder / "etc"
        _write(etc / "munge.key", os.urandom(128), 0o600)
        _write(etc / "slurmdbd.conf", SLURMDBD_CONF.format(**values).encode(), 0o600)
        gpus = f"AutoDetect=off\nNodeName=node[1-{NODES}] Name=gpu File={self.folder}/gpu/nvidia[0-{GPUS - 1}]\n"
        _write(etc / "gres.conf", gpus.encode(), 0o644)
        _write(etc / "cgroup.conf", CGROUP_CONF.encode(), 0o644)
        _write(etc / "plugstack.conf", b"", 0o644)
        _write(self.folder / "env.sh", f"export SLURM_CONF={self.conf}\n".encode(), 0o644)
        _write(self.conf, (SLURM_CONF.format(**values, nodes="\n".join(lines)) + self.extra).encode(), 0o644)

    def _start_database(self) -> None:
        data, run = self.folder / "mysql", self.folder / "run"
        if not (data / "mysql").exists():
            self.run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
                     "--auth-root-authentication-method=normal", "--skip-name-resolve")  # fmt: skip
        self._start("mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}",
                    f"--socket={run}/mysql.sock", f"--pid-file={run}/mariadbd.pid", "--skip-networking",
                    "--skip-log-bin", "--performance-schema=OFF", "--innodb-buffer-pool-size=128M",
                    "--innodb-log-file-size=32M", "--innodb-lock-wait-timeout=900",
                    "--innodb-flush-log-at-trx-commit=0")  # fmt: skip
        ping = ("mariadb-admin", "--no-defaults", f"--socket={run}/mysql.sock", "-uroot", "ping")
        self._wait("mariadbd", lambda: "alive" in self.run(*ping, check=False))
        if self._start("slurmdbd", "slurmdbd", "-D"):
            self._wait("slurmdbd", lambda: "Error" not in self.run("sacctmgr", "-n", "show", "cluster"))
        if "testcluster" not in self.run("sacctmgr", "-n", "show", "cluster", "format=cluster%20"):
            self.run("sacctmgr", "-i", "-Q", "add", "cluster", "testcluster")

    def _start(self, name: str, *command: str) -> bool:
        """Start a daemon in the background, unless it runs; whether it had to be started."""
        if self._alive(name) is not None:
            return False
        environment = {**self._environment, "MYSQL_UNIX_PORT": f"{self.folder}/run/mysql.sock"}
        with open(self.folder / "log" / f"{name}.log", "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                       cwd=self.folder, start_new_session=True)  # fmt: skip
        pids = json.loads(self._pids.read_text())
        self._pids.write_text(json.dumps({**pids, name: [process.pid, _started(process.pid)]}))
        return True

    def _alive(self, name: str) -> int | None:
        """The pid of a daemon that was started here and still runs."""
        try:
            pid, started = json.loads(self._pids.read_text())[name]
        except (FileNotFoundError, KeyError):
            return None
        _reap(pid)
        return pid if started is not None and _started(pid) == started else None

    def _end(self, name: str) -> None:
        pid = self._alive(name)
        if pid is None:
            return
        self._kill([pid], signal.SIGTERM)
        deadline = time.monotonic() + 20
        while self._alive(name) is not None:
            if time.monotonic() > deadline:
                self._kill([pid])
            time.sleep(0.02)

    def _wait(self, what: str, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(ClusterError):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise ClusterError(f"waited in vain for {what}; see {self.folder}/log")
            time.sleep(0.05)

    def _job_processes(self, node: str | None = None) -> list[int]:
        """slurmstepds of this cluster (of one node) and all processes of jobs, whatever has become of their parents."""
        found = set()
        for pid, environment in _environments():
            place = environment.get("SLURMD_NODENAME")
            if environment.get("SLURM_CONF") == str(self.conf) and place and node in (None, place):
                found.add(pid)
                with contextlib.suppress(OSError, IndexError):
                    parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                    if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                        found.add(parent)
        return sorted(found)

    def _kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """Every process's environment as it was started."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry}/environ").read_bytes().decode(errors="replace").split("\0")
                yield int(entry), dict(word.split("=", 1) for word in words if "=" in word)


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: with the pid its identity. None if it is gone or a zombie."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if words[0] == "Z" else words[19]


def _reap(pid: int) -> None:
    """Take the exit status if the process is this one's child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel gives to clients: a failed node's must still be free when the node comes back."""
    found: list[int] = []
    for port in random.sample(range(10_000, 32_000), 1000):
        if len(found) < count:
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                found.append(port)
    return found


def _write(path: Path, content: bytes, mode: int) -> None:
    path.touch(mode)
    path.chmod(mode)
    path.write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["install", "up", "crash", "hang", "revive", "down"])
    parser.add_argument("folder", nargs="?", help="DIR, where everything of the cluster is")
    parser.add_argument("node", nargs="?", help="node1 or node2")
    parser.add_argument("--conf", type=Path, help="file whose lines come last in slurm.conf")
    options = parser.parse_args()
    if options.action != "install" and options.folder is None:
        parser.error(f"{options.action} needs DIR")
    if (options.action in ("crash", "hang")) != (options.node is not None):
        parser.error("crash and hang need a node, nothing else does")
    try:
        if options.action == "install":
            install()
            return 0
        cluster = Cluster(options.folder, options.conf.read_text() if options.conf else "")
        getattr(cluster, options.action)(*filter(None, [options.node]))
    except (ClusterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
