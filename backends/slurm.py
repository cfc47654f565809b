"""Workers that are jobs of a Slurm cluster: ``SlurmWorkers`` asks for them, ``SlurmBackend`` runs trials on them.

    backend = SlurmBackend("my_module.train", n_workers=8, partition="gpu", gres="gpu:1", cpus=4, time="4:00:00")
    Tuner(backend, scheduler, StoppingCriterion(max_num_trials_started=40), n_workers=8, sleep_time=0).run()

The workers are one job array; each is the same warm worker as in ``WorkerPool``, connects back over TCP, and proves
that it knows a key that is in a file only this user may read. All messages are JSON. Slurm places, limits and accounts
the workers; a lost one is replaced by another job. They go when the backend is closed, and when its process or machine
is gone: their connection closes, at the latest after 30 s without a sign of life.

The driver talks to Slurm from a thread of its own, so that a slow controller delays no decision.
"""

import contextlib
import functools
import inspect
import json
import os
import queue
import resource
import secrets
import shutil
import socket
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends import slurm_commands
from backends.context import UserError
from backends.function_backend import WAIT, FunctionBackend
from backends.pool import PoolBackend
from backends.slurm_commands import HELD_BY_THE_SITE, Resources, SlurmError
from backends.workers import Worker, Workers, worker_python_path, worker_sys_path

CONNECT_SECONDS = 30.0  # a worker that cannot reach its driver holds a GPU no longer
OTHER_FILES = 256  # that a driver has open besides its workers' connections
LOOK = 2.0, 10.0  # seconds between two looks at the queue: while workers are missing, otherwise
MISSING_LOOKS = 3  # in which a job is not in the queue before it counts as ended
RETRY = 10.0  # seconds until a submission is tried again that Slurm did not answer
FIRST_WORD = 30.0  # seconds without all workers after which the first message says so; the next ones come ever later

SCRIPT = """\
#!/bin/bash
# One worker of a SlurmBackend. Arguments: its folder, the number of the first one, threads, PYTHONPATH, interpreter.
set -e
if [ -f "$1/setup.sh" ]; then . "$1/setup.sh"; fi
export OMP_NUM_THREADS="$3" MKL_NUM_THREADS="$3" OPENBLAS_NUM_THREADS="$3" NUMEXPR_NUM_THREADS="$3" PYTHONPATH="$4"
exec "$5" -u -m backends.worker "$1/connection.json" "$2"
"""


@dataclass(eq=False)
class _SlurmJob:
    """A worker's job as the driver last heard of it."""

    spawn: int
    log: Path
    cluster: "_Conversation"
    id: str = ""  # "" until it is submitted
    state: str = "PENDING"
    reason: str = ""
    node: str = ""
    over: bool = False
    missing: int = 0  # looks in which the queue did not have it
    lost: float = 0.0  # when its worker was

    @property
    def name(self) -> str:
        where = f" on {self.node}" if self.node else ""
        return f"worker {self.spawn} (Slurm job {self.id or 'not submitted yet'}{where})"

    @property
    def place(self) -> dict[str, Any]:
        return {"job": self.id, "node": self.node}

    @property
    def innocent(self) -> bool:
        return self.over and self.state in (*HELD_BY_THE_SITE, "REQUEUED")

    def ended(self) -> bool:
        return self.over

    def end(self, stopped: bool) -> str:
        self.lost = time.monotonic()
        self.cluster.cancel(self)
        if self.over:
            return f"{self.name} was ended by Slurm: {self.state}"
        return f"{self.name} did not stop in time" if stopped else f"{self.name} closed its connection"

    def tail(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = "\n".join(text.splitlines()[-20:]) or "(it wrote nothing)"
        return f"{lines}\n(Slurm job {self.id}: {self.state})"


class SlurmWorkers(Workers):
    """``n_workers`` workers as Slurm jobs. Ready as soon as one of them is; the others join as Slurm starts them.

    Not thread-safe: one thread at a time.
    """

    def __init__(
        self,
        n_workers: int,
        resources: Resources,
        *,
        folder: str | Path = "slurm-workers",
        host: str | None = None,
        port: int = 0,
        threads: int | None = None,
        stop_grace: float = 10.0,
        warm: Sequence[str] = ("torch",),
        signal: str = "USR1",
        signal_seconds: int = 60,
        warn: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    ):
        """``resources`` of one worker; ``folder``: in a file system that the nodes share, for a subfolder with the key
        and the workers' logs; ``host``: the name or address at which nodes reach this machine (default: its host name);
        ``port``: 0 for any; ``threads`` a worker (default: ``resources.cpus``, else 1); ``stop_grace``, ``warm``: as in
        ``WorkerPool``; ``signal``: what Slurm sends ``signal_seconds`` before a worker's time limit; ``warn``: told
        which workers the queue has not started yet, and of trouble with Slurm.

        Errors: UserError for a host or port that cannot be used, SlurmError if Slurm refuses the jobs.
        """
        if n_workers < 1:
            raise UserError(f"n_workers must be at least 1, got {n_workers}")
        _allow_files(n_workers + OTHER_FILES)
        self.warn, self._options = warn, resources.options()
        self._host = host or socket.gethostname()
        self._begun = self._last_word = time.monotonic()
        self._worked = False  # whether any worker has ever been ready
        listener = _listener(self._host, port)
        self._folder = Path(folder).absolute() / f"workers-{secrets.token_hex(4)}"
        _sweep(self._folder.parent)
        threads = threads or resources.cpus or 1
        super().__init__(n_workers, threads, stop_grace, listener)
        order = {
            "address": [self._host, listener.getsockname()[1]],
            "key": self._key.hex(),
            "sys_path": worker_sys_path(),
            "threads": threads,
            "warm": list(warm),
            "signal": signal,
            "driver": {"host": socket.gethostname(), "pid": os.getpid()},
            "connect_seconds": CONNECT_SECONDS,
        }
        _write_order(self._folder, order, resources.setup)
        self._options += [f"--signal=B:{signal}@{signal_seconds}"]
        submit = functools.partial(_submit, self._folder, self._options, threads)
        self._cluster = _Conversation(submit, self._wake_writer)
        self._owned = _Owned(listener, self._folder, self._cluster)
        self._finalizer = weakref.finalize(self, self._owned.release)
        try:
            self._submit_all()
        except BaseException:
            self.close()
            raise
        self._cluster.start()

    def __enter__(self) -> "SlurmWorkers":
        return self

    def close(self) -> None:
        """Release the workers."""
        self._finalizer()
        super().close()

    def wait_ready(self, timeout: float = float("inf")) -> None:
        """Return once one worker is ready; ``warn`` hears how the queue stands meanwhile. Errors: PoolError with a
        worker's last words if they cannot start, or after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not any(worker.state == "idle" for worker in self._workers):
            if time.monotonic() > deadline:
                raise UserError(f"no worker is ready after {timeout:.0f} s: {self._missing()}")
            self.poll(WAIT)

    # ---- jobs of Slurm

    def _submit_all(self) -> None:
        first = [next(self._spawns) for _ in range(self.n_workers)]
        array = _submit(self._folder, self._options, self.threads, 0, self.n_workers)
        for spawn in first:
            self._expect(_SlurmJob(spawn, self._folder / f"worker-{spawn}.log", self._cluster, f"{array}_{spawn}"))

    def _expect(self, job: _SlurmJob) -> None:
        self._workers.append(Worker(job.spawn, job, None, time.monotonic()))
        self._cluster.follow(job)

    def _replace(self, worker: Worker) -> None:
        assert isinstance(worker.handle, _SlurmJob)
        if worker.state in ("starting", "preparing"):
            self._cluster.suspect(worker.handle)
        spawn = next(self._spawns)
        job = _SlurmJob(spawn, self._folder / f"worker-{spawn}.log", self._cluster)
        self._begun = self._last_word = time.monotonic()
        self._expect(job)
        self._cluster.submit(job)

    def _is_fatal(self, worker: Worker) -> bool:
        """Of the first workers fewer have to fail: what keeps them from working is probably the same for all."""
        return super()._is_fatal(worker) or (not self._worked and self._failed_starts >= self.n_workers)

    def _on_hello(self, worker: Worker, hello: dict[str, Any]) -> None:
        job = worker.handle
        assert isinstance(job, _SlurmJob)
        job.id, job.node = hello["job"] or job.id, hello["node"]
        job.state = "RUNNING"

    def _look(self) -> None:
        """What the thread has heard from Slurm; a word about workers that do not come."""
        for message in self._cluster.news():
            self.warn(message)
        self._worked = self._worked or any(worker.state in ("idle", "busy") for worker in self._workers)
        connected = sum(worker.connection is not None for worker in self._workers)
        self._cluster.interval = LOOK[connected == len(self._workers)]
        now = time.monotonic()
        if connected < len(self._workers) and now - self._last_word >= max(FIRST_WORD, (now - self._begun) / 2):
            self._last_word = now
            self.warn(f"{connected} of {self.n_workers} workers have started; {self._missing()}")

    def _missing(self) -> str:
        """How the queue stands: ``3 PENDING (Resources)``."""
        waiting = [worker.handle for worker in self._workers if worker.connection is None]
        counts = Counter((job.state, job.reason) for job in waiting if isinstance(job, _SlurmJob))
        return ", ".join(
            f"{count} {state}{f' ({reason})' if reason and reason != 'None' else ''} in Slurm"
            for (state, reason), count in counts.items()
        )


_OF_BACKENDS = inspect.signature(FunctionBackend).parameters


class SlurmBackend(PoolBackend):
    """Syne Tune backend whose trials run on workers that are Slurm jobs. Give the Tuner ``sleep_time=0``."""

    def __init__(self, function: str, *, n_workers: int, **options: Any):
        """``options``: fields of ``backends.slurm_commands.Resources`` (partition, gres, cpus, mem, time, ...), of one
        worker; keyword arguments of ``SlurmWorkers`` (folder, host, port, threads, warm, ...); the rest as in
        ``PoolBackend``. Checkpoints go to ``path`` (default: where the Tuner says), which the nodes must share. Errors:
        UserError; TypeError for an option that none of them has."""
        of_workers = inspect.signature(SlurmWorkers).parameters
        known = {name: options.pop(name) for name in list(options) if name in of_workers}
        inherited = {name: options.pop(name) for name in list(options) if name in _OF_BACKENDS}
        super().__init__(function, pool=SlurmWorkers(n_workers, Resources(**options), **known), **inherited)
        self._owns_pool = True


@dataclass
class _Owned:
    """What has to go with the workers' owner, also without ``close()``; holds no reference to it."""

    listener: socket.socket
    folder: Path
    cluster: "_Conversation"
    owner: int = field(default_factory=os.getpid)

    def release(self) -> None:
        if os.getpid() != self.owner:  # a fork of the driver exits: the workers are not its own
            return
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept()
        self.listener.close()
        (self.folder / "connection.json").unlink(missing_ok=True)  # a job that starts now ends at once
        self.cluster.end()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # if this was the last one's


class _Conversation:
    """A thread that talks to Slurm: submits and cancels what it is told, and looks how the jobs stand."""

    def __init__(self, submit: Callable[..., str], wake: socket.socket):
        self.interval = LOOK[0]
        self._submit_job, self._wake = submit, wake
        self._orders: queue.SimpleQueue[tuple[str, _SlurmJob | None]] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[Callable[[], str | None]] = queue.SimpleQueue()
        self._jobs: dict[int, _SlurmJob] = {}  # those that may still be in Slurm
        self._bad_nodes: list[str] = []  # where workers failed, or were lost while Slurm thought that they ran
        self._postponed: list[tuple[float, _SlurmJob]] = []
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, daemon=True, name="slurm")

    # ---- called by the driver

    def start(self) -> None:
        self._thread.start()

    def follow(self, job: _SlurmJob) -> None:
        self._jobs[job.spawn] = job

    def submit(self, job: _SlurmJob) -> None:
        self._orders.put(("submit", job))

    def cancel(self, job: _SlurmJob) -> None:
        self._orders.put(("cancel", job))

    def suspect(self, job: _SlurmJob | slurm_commands.Job) -> None:
        """Its node may be the reason why it failed: the next worker should not go there."""
        if job.node and job.node not in self._bad_nodes:
            self._bad_nodes.append(job.node)

    def news(self) -> list[str]:
        """Take over what has been heard; returns messages for people."""
        messages = []
        while not self._news.empty():
            message = self._news.get()()
            if message is not None:
                messages.append(message)
        return messages

    def end(self) -> None:
        """Cancel all jobs; returns when Slurm has been told."""
        self._orders.put(("end", None))
        if self._thread.is_alive():
            self._thread.join(timeout=slurm_commands.TIMEOUT)
        if ids := [job.id for job in list(self._jobs.values()) if job.id]:
            with contextlib.suppress(SlurmError):  # they end when they miss the driver
                slurm_commands.cancel(ids)

    # ---- the thread

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                order, job = self._orders.get(timeout=0.5)
                if order == "end":
                    return
                assert job is not None
                self._cancel(job) if order == "cancel" else self._try_to_submit(job)
            now = time.monotonic()
            due = [job for when, job in self._postponed if when <= now]
            self._postponed = [(when, job) for when, job in self._postponed if when > now]
            for job in due:
                self._try_to_submit(job)
            if now - looked >= self.interval:
                self._look()
                looked = time.monotonic()

    def _tell(self, news: Callable[[], str | None]) -> None:
        self._news.put(news)
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._tell(lambda: message)

    def _cancel(self, job: _SlurmJob) -> None:
        """End a job whose worker is lost. If Slurm still thinks that it runs a moment later, its node is not sound."""
        self._jobs.pop(job.spawn, None)
        if not job.id:
            self._postponed = [(when, other) for when, other in self._postponed if other is not job]
            return
        try:
            if not job.over:
                time.sleep(max(0.0, job.lost + 1.0 - time.monotonic()))  # a script whose process has died ends at once
                now = slurm_commands.jobs().get(job.id)
                if now is not None and now.state == "RUNNING":
                    self.suspect(now)
            slurm_commands.cancel([job.id])
        except SlurmError as error:
            self._say_once(f"warning: {error}")

    def _try_to_submit(self, job: _SlurmJob) -> None:
        try:
            try:
                job.id = self._submit_job(job.spawn, exclude=self._bad_nodes)
            except SlurmError:
                if not self._bad_nodes:
                    raise
                self._bad_nodes = []  # there may be no other nodes
                job.id = self._submit_job(job.spawn)
        except SlurmError as error:
            self._say_once(f"warning: a lost worker cannot be replaced yet: {error}; trying again")
            self._postponed.append((time.monotonic() + RETRY, job))

    def _look(self) -> None:
        try:
            found = slurm_commands.jobs()
        except SlurmError as error:
            self._say_once(f"warning: {error}; running workers are not affected")
            return
        self._tell(lambda: _update_all([job for job in self._jobs.values() if job.id], found))


def _update_all(jobs: Sequence[_SlurmJob], found: Mapping[str, slurm_commands.Job]) -> None:
    """In the driver's thread: take over how the jobs stand."""
    for job in jobs:
        _update(job, found.get(job.id))


def _update(job: _SlurmJob, now: slurm_commands.Job | None) -> None:
    if now is None:
        job.missing += 1
        if job.missing >= MISSING_LOOKS:
            job.over, job.state = True, "no longer in the queue"
        return
    job.missing, job.state, job.reason, job.node = 0, now.state, now.reason, now.node or job.node
    if now.restarts:  # put back into the queue: its worker is to be given up, the job will be cancelled
        job.state = "REQUEUED"
    job.over = not now.active or bool(now.restarts)


def _submit(
    folder: Path, options: Sequence[str], threads: int, spawn: int, count: int = 1, exclude: Sequence[str] = ()
) -> str:
    """Submit workers ``spawn`` to ``spawn + count - 1``, the first ones as a job array, to other nodes than
    ``exclude``; returns the id of their job."""
    log = f"worker-{'%a' if spawn == 0 else spawn}.log"
    own = ["--job-name=ohgw-worker", f"--comment={_comment(folder)}", "--nodes=1", "--ntasks=1", "--no-requeue",
           f"--output={folder}/{log}", *([f"--array=0-{count - 1}"] if spawn == 0 else []),
           *([f"--exclude={','.join(exclude)}"] if exclude else [])]  # fmt: skip
    words = (str(folder), str(spawn), str(threads), worker_python_path(), sys.executable)
    return slurm_commands.submit([*own, *options], folder / "worker.sh", *words)


def _listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket on all interfaces. Errors: UserError for a host without address or a port in use."""
    try:
        socket.getaddrinfo(host, port or 1)
    except OSError as error:
        raise UserError(f"the driver's host {host!r} has no address ({error}); name one that the nodes know") from None
    try:
        return socket.create_server(("", port), backlog=128)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on port {port}: {error}; choose another one, or 0 for any that is free"
        ) from None


def _allow_files(count: int) -> None:
    """See to it that this process may have so many files and connections open. Errors: UserError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count <= hard or (soft < count and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    elif soft < count:
        raise UserError(
            f"{count - OTHER_FILES} workers need {count} open files, this machine allows {hard} (ulimit -Hn): take "
            "fewer, or have the limit raised"
        )


def _sweep(parent: Path) -> None:
    """Remove what drivers of this machine that were killed have left in ``parent``, and their jobs."""
    dead = [file.parent for file in parent.glob("workers-*/connection.json") if _is_dead(file)]
    if not dead:
        return
    comments = {_comment(folder) for folder in dead}
    with contextlib.suppress(SlurmError):  # they end by themselves
        if ids := [job.id for job in slurm_commands.jobs().values() if job.active and job.comment in comments]:
            slurm_commands.cancel(ids)
    for folder in dead:
        shutil.rmtree(folder, ignore_errors=True)


def _is_dead(file: Path) -> bool:
    try:
        driver = json.loads(file.read_bytes())["driver"]
        if driver["host"] == socket.gethostname():
            os.kill(driver["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):  # another user's, or gone meanwhile
        pass
    return False


def _comment(folder: Path) -> str:
    """By which the jobs of a driver are known."""
    return f"ohgw-workers:{folder.name}"


def _write_order(folder: Path, order: dict[str, Any], setup: Sequence[str]) -> None:
    """What the workers need, readable for this user only. Errors: UserError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, mode=0o700)
        (folder / "worker.sh").write_text(SCRIPT)
        if setup:
            (folder / "setup.sh").write_text("\n".join(setup) + "\n")
        descriptor = os.open(folder / "connection.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump(order, file)
    except OSError as error:
        raise UserError(f"cannot write the workers' folder {folder}: {error.strerror}; choose another one") from None
