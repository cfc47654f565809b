"""Slurm's own commands, as far as this project needs them: submit, look, cancel, requeue, account.

Every value goes to a command as one argument of its own; no shell reads any of it. Times of ``sacct`` are whole seconds
and its rows come seconds late; ``squeue`` forgets a job some minutes after its end (``MinJobAge``).
"""

import getpass
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from backends.context import UserError

TIMEOUT = 60.0  # seconds; squeue gives up after 9 s when the controller is down
ACTIVE = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT",
     "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)  # fmt: skip
HELD_BY_THE_SITE = frozenset({"PREEMPTED", "NODE_FAIL", "BOOT_FAIL"})  # ends that are not the job's own fault
_BUSY_CONTROLLER = ("Unable to contact slurm controller", "Socket timed out", "Resource temporarily unavailable")


class SlurmError(UserError):
    """Slurm is missing, refused something or does not answer; the message has its words."""


@dataclass(frozen=True)
class Resources:
    """What one job asks for, as values of sbatch's options of the same names; None: the site's default.

    ``cpus`` is ``--cpus-per-task``; ``extra``: further options of sbatch, one argument each; ``setup``: lines of shell
    that run before Python (``module load cuda``): the only setting that a shell reads, because it is one's own script.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gres: str | None = None
    cpus: int | None = None
    mem: str | None = None
    exclusive: bool = False
    extra: Sequence[str] = ()
    setup: Sequence[str] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any], **changed: Any) -> "Resources":
        """From a dict that has these fields among others."""
        return cls(**{name.name: settings[name.name] for name in fields(cls) if name.name in settings} | changed)

    def options(self) -> list[str]:
        """Arguments for sbatch. Errors: UserError for an ``extra`` that is no option."""
        names = {"partition": "partition", "account": "account", "qos": "qos", "time": "time", "gres": "gres",
                 "cpus": "cpus-per-task", "mem": "mem"}  # fmt: skip
        options = [f"--{name}={getattr(self, key)}" for key, name in names.items() if getattr(self, key) is not None]
        for word in self.extra:
            if not re.match(r"--?[A-Za-z]", word):
                raise UserError(f"extra: {word!r} is no option of sbatch; write them as in extra=['--constraint=v100']")
        return options + (["--exclusive"] if self.exclusive else []) + list(self.extra)


@dataclass(frozen=True)
class Job:
    """A job or a task of a job array, as ``squeue`` shows it. ``id``: ``12`` or ``12_3``; ``reason``: why it waits;
    ``begin``, ``end``: seconds since the epoch (expected ones of a job that waits or runs), None if not known."""

    id: str
    state: str
    reason: str
    node: str
    comment: str
    raw_id: str = ""
    restarts: int = 0
    begin: float | None = None
    end: float | None = None

    @property
    def active(self) -> bool:
        """Whether it waits, runs or is about to."""
        return self.state in ACTIVE


def own_slurm_job() -> str | None:
    """The id of the Slurm job this process belongs to (``12`` or ``12_3``), None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def submit(options: Sequence[str], script: Path, *arguments: str) -> str:
    """Submit the batch ``script``; returns the job's id. Errors: SlurmError with what sbatch said."""
    return _run("sbatch", "--parsable", *options, str(script), *arguments).split(";")[0].strip()


def jobs() -> dict[str, Job]:
    """This user's jobs by id, waiting, running and lately ended ones; each task of an array is one. Errors:
    SlurmError."""
    shown = "JobArrayID:|,State:|,ReasonList:|,Comment:|,JobID:|,RestartCnt:|,Reason:|,StartTime:|,EndTime:|,NodeList:"
    found = {}
    for line in _run("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-O", shown).splitlines():
        words = line.strip().split("|")
        if len(words) == 10:
            identity, state, where, comment, raw, restarts, reason, begin, end, node = words
            why = where[1:-1] if where.startswith("(") and where != "(null)" else reason
            count = int(restarts) if restarts.isdigit() else 0
            times = _seconds(begin), _seconds(end)
            comment = "" if comment == "(null)" else comment
            found[identity] = Job(identity, state, why, node, comment, raw, count, *times)
    return found


def cancel(ids: Iterable[str]) -> None:
    """End jobs and tasks of arrays; those that have ended already do not matter. Errors: SlurmError."""
    ids = list(ids)
    for begin in range(0, len(ids), 200):
        _run("scancel", "--quiet", *ids[begin : begin + 200])


def requeue(identity: str) -> None:
    """Put a running job back into the queue; Slurm ends it first. Errors: SlurmError where the site forbids it."""
    _run("scontrol", "requeue", identity)


def setting(name: str) -> str | None:
    """A value of slurm.conf (``MaxArraySize``), None if Slurm does not show it. Errors: SlurmError."""
    found = re.search(rf"^{name}\s*=\s*(\S+)", _run("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else None


def largest_array() -> int:
    """How many tasks one job array may have. Errors: SlurmError, also where the site has no job arrays."""
    limits = [int(setting("MaxArraySize") or 1001)]
    if found := re.search(r"max_array_tasks=(\d+)", setting("SchedulerParameters") or ""):
        limits.append(int(found[1]))
    if min(limits) < 1:
        raise SlurmError("this cluster has no job arrays (MaxArraySize=0)")
    return min(limits)


def gpu_count(gres: str | None) -> int:
    """GPUs that a value of ``--gres`` asks for: 4 of ``gpu:4`` or ``gpu:v100:4``, 1 of ``gpu``, 0 of none."""
    entries = [re.fullmatch(r"(?:gres[:/])?gpu(?::[^:(]+)??(?::(\d+))?(?:\(.*\))?", e) for e in (gres or "").split(",")]
    return sum(int(entry[1] or 1) for entry in entries if entry)


# ---- accounting


@dataclass(frozen=True)
class Incarnation:
    """One run of a job as ``sacct`` accounts for it: a requeued job has several.

    ``elapsed`` seconds; ``gpus`` allocated; ``begin``, ``end``: seconds since the epoch, None while it runs;
    ``max_rss`` bytes of the largest step (None: not sampled); ``energy`` joules (None: not measured at this site).
    """

    id: str
    raw_id: str
    state: str
    elapsed: int
    gpus: int
    cpus: int
    nodes: str
    begin: float | None
    end: float | None
    max_rss: int | None = None
    energy: int | None = None
    exit_code: str = ""
    steps: int = field(default=0, compare=False)

    @property
    def gpu_hours(self) -> float:
        """Elapsed times allocated GPUs: what a site charges, whether they were used or not."""
        return self.elapsed * self.gpus / 3600


def accounting(ids: Iterable[str]) -> list[Incarnation]:
    """All runs of these jobs (``12``, ``12_3``; ``12`` means all tasks of an array), oldest first. Rows come some
    seconds late, and a task cancelled while it waited has none. Errors: SlurmError where there is no accounting."""
    ids = list(ids)
    columns = "JobID,JobIDRaw,State,ElapsedRaw,AllocTRES,NodeList,Start,End,MaxRSS,ConsumedEnergyRaw,ExitCode"
    found: list[Incarnation] = []
    for begin in range(0, len(ids), 200):
        chosen = ",".join(ids[begin : begin + 200])
        # -S: without it a job that ended before today is left out by some versions
        text = _run("sacct", "-D", "-n", "-P", "-S", "1970-01-02", "-j", chosen, "-o", columns)
        for line in text.splitlines():
            _account(line.split("|"), found)
    return found


def _account(words: Sequence[str], found: list[Incarnation]) -> None:
    """Take one row in: a job's own, or that of a step, which belongs to the job above it."""
    identity, raw, state, elapsed, tres, nodes, begin, end, rss, energy, code = words
    if "." in identity:
        if found and identity.startswith(found[-1].id + "."):
            job = found[-1]
            changed = {"max_rss": _most(job.max_rss, _bytes(rss)), "energy": _most(job.energy, _number(energy))}
            found[-1] = Incarnation(**{**job.__dict__, **changed, "steps": job.steps + 1})
        return
    amounts = dict(item.split("=", 1) for item in tres.split(",") if "=" in item)
    gpus, cpus = (int(amounts.get(name, "0")) for name in ("gres/gpu", "cpu"))
    seconds, times = int(elapsed or 0), (_seconds(begin), _seconds(end))
    found.append(Incarnation(identity, raw, state.split(" ")[0], seconds, gpus, cpus, nodes, *times, exit_code=code))


def _seconds(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S").timestamp()
    except ValueError:  # "Unknown", "None"
        return None


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"([\d.]+)([KMGT]?)", text)
    return round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else None


def _number(text: str) -> int | None:
    """An amount that is measured: sites without a sensor show 0 or nothing."""
    return int(text) if text.isdigit() and int(text) > 0 else None


def _most(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


# ---- running them


def _run(command: str, *arguments: str) -> str:
    """Its output. Errors: SlurmError; a controller that does not answer is asked a second time."""
    for attempt in range(2):
        try:
            done = subprocess.run(
                [command, *arguments], capture_output=True, text=True, timeout=TIMEOUT, env=_environment(command)
            )
        except FileNotFoundError:
            raise SlurmError(
                f"there is no {command} on PATH: this needs Slurm's commands; run it on a login node of the cluster, "
                "or choose launch=local and backend=pool"
            ) from None
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{command} did not answer within {TIMEOUT:.0f} s: the controller may be down") from None
        if done.returncode == 0:
            return done.stdout
        if attempt == 0 and command != "sbatch" and any(words in done.stderr for words in _BUSY_CONTROLLER):
            time.sleep(1.0)
            continue
        break
    raise SlurmError(f"{command} failed: {_words(done.stderr) or f'exit code {done.returncode}'}")


def _words(text: str) -> str:
    """What a Slurm command said, in one line."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines)))[:2000]


def _environment(command: str) -> dict[str, str]:
    """This process's, in English; for sbatch without what the job around it, if any, was given: it would be inherited
    (SLURM_MEM_PER_NODE, for one, contradicts --mem-per-cpu)."""
    environment = {**os.environ, "LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}
    if command == "sbatch" and "SLURM_JOB_ID" in environment:
        given = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "TMPDIR")
        environment = {
            name: value
            for name, value in environment.items()
            if (not name.startswith(("SLURM_", "SLURMD_")) or name == "SLURM_CONF") and name not in given
        }
    return environment
