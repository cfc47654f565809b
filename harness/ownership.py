"""Who may write a cell's files: one process at a time, also where an earlier one that was given up still runs.

Whoever runs a cell holds a kernel lock on the cell's lock file, in which it is named. Slurm starts a job again when its
node does not answer, although the job may go on running there (a *ghost*) and hold that lock for ever. The new run then
takes the cell over: it replaces the files that the ghost has open by copies (``record.detach``), and its lock file by
one of its own. What only the owner may do is done inside ``Ownership.guarded()``, under a second lock, held for
moments, under which a cell also changes hands: so a ghost finds out before it does harm.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends import slurm_commands
from backends.context import UserError
from backends.slurm_commands import SlurmError, own_slurm_job

GUARD_SECONDS = 120.0  # nothing that is guarded takes so long; a file server forgets a dead machine's locks in less
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

Holder = Mapping[str, Any]  # pid, host, number, token, and inside of Slurm slurm: job, restart, cluster


class CellBusy(RuntimeError):
    """Another command is running the cell; the message names its process and host as far as known."""


class Superseded(RuntimeError):
    """A newer attempt has taken the cell over: this one must end, and write nothing more."""

    def __init__(self) -> None:
        super().__init__("continued by a newer attempt; this one ends, and writes nothing more into its record")


@dataclass(frozen=True)
class Ownership:
    """The right to write a cell's files, as long as nobody takes the cell over.

    ``path``: the lock file, None where nobody else can be about; ``mark``: its content; ``number`` counts the owners of
    the cell, this one included.
    """

    path: Path | None
    mark: bytes = b""
    number: int = 1

    def owned(self) -> bool:
        """Whether the cell is still this process's. It may change hands at any time, but not inside ``guarded()``."""
        if self.path is None:
            return True
        try:
            return self.path.read_bytes() == self.mark  # opened anew: right on a network file system as well
        except FileNotFoundError:  # deleted by hand; who takes a cell over puts a file there
            return True

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A block in which the cell cannot change hands. Errors: Superseded at its beginning if it has done so."""
        if self.path is None:
            yield
            return
        with _guard(self.path):
            if not self.owned():
                raise Superseded
            yield


SOLE = Ownership(None)  # of a cell that no other process knows of


def _never(holder: Holder) -> bool:
    return False


def _nothing() -> None:
    pass


@contextlib.contextmanager
def cell_lock(
    path: str | Path, superseded: Callable[[Holder], bool] = _never, detach: Callable[[], None] = _nothing
) -> Iterator[Ownership]:
    """Own the cell whose lock file is ``path`` (``CellPaths.lock``); CellBusy at once if another process does.

    The kernel frees the lock when the process ends, however it ends. Where it is held, ``superseded(holder)`` says
    whether to take the cell over from that process all the same; it may raise SlurmError if that cannot be found out.
    ``detach()`` is called before the cell changes hands if its last owner may still run. The file stays: removing it
    would let a third command lock a new file while a second one still waits on the old.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    given_up: Holder | None = None
    with contextlib.ExitStack() as files:
        while True:
            with _guard(path):
                fd = files.enter_context(_opened(path))
                holder = _read(fd)
                free = _locked(fd, path)
                if free or (holder is not None and holder == given_up):
                    # an owner elsewhere may run although its lock is free: file servers drop those of silent machines
                    if not free or holder is None or holder.get("host") != socket.gethostname():
                        detach()
                    ownership = _ownership(path, holder)
                    if free:
                        _write(fd, ownership.mark)
                    else:
                        files.enter_context(_put_in_place(path, ownership.mark))
                    break
            given_up = _judged(path, holder, superseded)
        yield ownership


def _judged(path: Path, holder: Holder | None, superseded: Callable[[Holder], bool]) -> Holder:
    """The holder, if the cell may be taken from it. Errors: CellBusy."""
    busy = f"another command is running {path.stem} ({_words(holder)})"
    try:
        if holder is not None and superseded(holder):
            return holder
    except SlurmError as error:
        why = f"whether it still does cannot be found out: {error}. If you know that it has ended, delete {path}"
        raise CellBusy(f"{busy}; {why}") from None
    raise CellBusy(busy)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _put_in_place(path: Path, mark: bytes) -> Iterator[None]:
    """A new lock file in place of one that another process holds."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with _opened(temporary) as fd:
        _locked(fd, path)
        _write(fd, mark)
        os.fsync(fd)
        os.replace(temporary, path)
        yield


def _write(fd: int, mark: bytes) -> None:
    os.pwrite(fd, mark, 0)
    os.ftruncate(fd, len(mark))


def _locked(fd: int, path: Path) -> bool:
    """Lock the file if it is free. Errors: UserError where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(
            f"the file system of {path.parent} has no file locks ({error.strerror}), without which two commands could "
            "run one cell; choose a results_dir elsewhere, or have it mounted with locks (Lustre: -o flock)"
        ) from None
    return True


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    with _opened(path.with_suffix(".guard")) as fd:
        deadline = time.monotonic() + GUARD_SECONDS
        while not _locked(fd, path):
            if time.monotonic() > deadline:
                raise CellBusy(f"another process has been at the files of {path.stem} for {GUARD_SECONDS:.0f} s")
            time.sleep(0.02)
        yield


# ---- who


def own_slurm() -> dict[str, Any] | None:
    """The Slurm job this process runs in: job (``12`` or ``12_3``), restart (how often it was requeued), cluster; None
    outside of Slurm."""
    job = own_slurm_job()
    if job is None:
        return None
    restart = os.environ.get("SLURM_RESTART_COUNT") or "0"
    return {"job": job, "restart": int(restart), "cluster": os.environ.get("SLURM_CLUSTER_NAME")}


def given_up_by_slurm(holder: Holder) -> bool:
    """Whether the holder of a cell is an earlier run of the very job that asks, or a job that has ended as far as Slurm
    knows; never one outside of Slurm. Errors: SlurmError if Slurm cannot be asked or does not know the job."""
    theirs, mine = holder.get("slurm"), own_slurm()
    if theirs is None:
        return False
    here = mine["cluster"] if mine else None
    if theirs["cluster"] and theirs["cluster"] != (here or slurm_commands.setting("ClusterName")):
        raise SlurmError(f"it is a job of another cluster, {theirs['cluster']}")
    if mine and mine["job"] == theirs["job"]:
        return bool(theirs["restart"] < mine["restart"])
    return not _active(theirs["job"])


def _active(job: str) -> bool:
    if (known := slurm_commands.jobs().get(job)) is not None:
        return known.active
    runs = slurm_commands.accounting([job])
    if not runs:
        raise SlurmError(f"Slurm knows nothing of job {job}")
    return runs[-1].state in slurm_commands.ACTIVE


def shown_holder(path: Path) -> str:
    """Who owns the cell whose lock file is ``path``, in words; "" if nobody does, or a process that Slurm has given up.
    Writes nothing: also for somebody else's cells."""
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of at once
                return ""
            except OSError:
                holder = _read(file.fileno())
    except FileNotFoundError:
        return ""
    with contextlib.suppress(SlurmError):
        if holder is not None and given_up_by_slurm(holder):
            return ""
    return _words(holder)


def _ownership(path: Path, former: Holder | None) -> Ownership:
    """This process's, after ``former``'s; no mark is like another."""
    slurm, number = own_slurm(), 1 + (former or {}).get("number", 0)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "number": number, "token": secrets.token_hex(8)}
    return Ownership(path, json.dumps(holder | ({} if slurm is None else {"slurm": slurm})).encode(), number)


def _read(fd: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _words(holder: Holder | None) -> str:
    if holder is None or not {"pid", "host"} <= holder.keys():
        return "its process is not known"
    slurm = holder.get("slurm")
    return f"process {holder['pid']} on {holder['host']}" + (f", Slurm job {slurm['job']}" if slurm else "")
