"""Warm workers for Syne Tune: ``WorkerPool`` owns the processes, ``PoolBackend`` runs trials on them.

    backend = PoolBackend("my_module.train", n_workers=2)
    Tuner(backend, scheduler, StoppingCriterion(max_num_trials_started=40), n_workers=2, sleep_time=0).run()

A pool can serve many backends one after another (the cells of a sweep): ``PoolBackend(..., pool=pool)``. It has no
thread of its own but one that lets workers in; everything else happens in ``poll``, which the backend calls.
"""

import contextlib
import itertools
import json
import os
import queue
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from backends.attempt import AttemptSpec
from backends.context import RestoredTrial, UserError
from backends.function_backend import (
    WAIT,
    FunctionBackend,
    Status,
    thread_environment,
    threads_per_worker,
)
from backends.gpus import default_n_workers, visible_gpus

__all__ = ["Job", "PoolBackend", "PoolError", "RestoredTrial", "WorkerPool"]

ROOT = Path(__file__).resolve().parent.parent
HANDSHAKE = 10  # seconds a connecting process has to prove that it knows the key
MESSAGES_AT_ONCE = 100  # read from one worker before the others get their turn
START_ATTEMPTS = 3  # replacements in a row that may die while they start, before that is an error


class PoolError(UserError):
    """Workers cannot be started or prepared; the message holds what they said last."""


@dataclass(eq=False)
class Job:
    """One attempt, waiting for a worker, running on one, or ended."""

    spec: AttemptSpec
    on_message: Callable[["Job", dict[str, Any]], None]  # report, done, or lost (the worker died)
    after: "Job | None" = None  # an earlier attempt of the same trial that has to end first
    key: int = 0
    stop_at: float | None = None  # when a stopped attempt loses its worker
    ended: bool = False


@dataclass(eq=False)
class _Worker:
    """A worker process as the pool sees it."""

    spawn: int
    process: subprocess.Popen[bytes]
    log: Path
    gpu: str | None
    started: float
    connection: Connection | None = None
    state: str = "starting"  # starting | preparing | idle | busy | retiring
    startup: float | None = None  # seconds from spawn to ready
    device: str = "?"
    job: Job | None = None

    def tail(self) -> str:
        """The last lines it wrote outside of trials."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-20:]) or "(it wrote nothing)"


@dataclass
class _Owned:
    """What has to be cleaned up when the pool goes, also without ``close()``; holds no reference to the pool."""

    listener: socket.socket
    folder: str
    owner: int = field(default_factory=os.getpid)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def release(self) -> None:
        if os.getpid() != self.owner:  # a fork of the driver exits: the workers are not its own
            return
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept()
        self.listener.close()
        for process in self.processes.values():
            _kill_group(process)
        for process in self.processes.values():
            process.wait()
        self.processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class WorkerPool:
    """``n_workers`` persistent processes (default: one a GPU, else 2), started at once, ready some seconds later.

    Not thread-safe: one thread at a time.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        threads: int | None = None,
        gpus: Sequence[str | int] | None = None,
        env: dict[str, str] | None = None,
        stop_grace: float = 10.0,
        warm: Sequence[str] = ("torch",),
    ):
        """``threads`` a worker (default: CPUs / workers); ``gpus``: ids for CUDA_VISIBLE_DEVICES, one a worker in turn
        (default: all visible; []: none); ``env``: additional variables; ``stop_grace``: seconds from a stop to a kill;
        ``warm``: modules every worker imports at its start if they are installed (torch is reset and seeded for each
        trial only if it is here or the trial function's module imports it)."""
        self.n_workers = default_n_workers() if n_workers is None else n_workers
        if self.n_workers < 1:
            raise UserError(f"n_workers must be at least 1, got {self.n_workers}")
        self.threads = threads or threads_per_worker(self.n_workers)
        self.stop_grace = stop_grace
        self._gpus = [gpu.uuid for gpu in visible_gpus()] if gpus is None else [str(gpu) for gpu in gpus]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if not self._gpus else {}
        self._env, self._warm = hidden | (env or {}), list(warm)
        self._key = secrets.token_bytes(32)
        self._workers: list[_Worker] = []
        self._queue: deque[Job] = deque()
        self._keys, self._spawns = itertools.count(), itertools.count()
        self._failed_starts = 0
        self._preparation: dict[str, Any] | None = None
        self._arrivals: queue.SimpleQueue[tuple[dict[str, Any], Connection]] = queue.SimpleQueue()
        self._wake, self._wake_writer = socket.socketpair()
        self._open()
        for k in range(self.n_workers):
            self._spawn(self._gpus[k % len(self._gpus)] if self._gpus else None)

    # ---- life

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers, and what they started, at once."""
        self._finalizer()
        for worker in self._workers:
            if worker.connection:
                worker.connection.close()
        self._wake.close()
        self._workers, self._queue = [], deque()

    def wait_ready(self, timeout: float = 600.0) -> None:
        """Return once all workers have imported what they need. Errors: PoolError with a worker's last words."""
        deadline = time.monotonic() + timeout
        while any(worker.state in ("starting", "preparing") for worker in self._workers):
            if time.monotonic() > deadline:
                late = next(worker for worker in self._workers if worker.state in ("starting", "preparing"))
                raise PoolError(f"worker {late.process.pid} is not ready after {timeout:.0f} s:\n{late.tail()}")
            self.poll(WAIT)

    def prepare(self, function: str, settings: dict[str, Any]) -> None:
        """Call ``function(settings, device)`` once in every worker, replacements included, and wait for it.

        What still runs for an earlier backend is stopped first.

        Errors: UserError if the function raised it; PoolError with the traceback for anything else.
        """
        self.clear()
        while any(worker.job for worker in self._workers):
            self.poll(WAIT)
        generation = next(self._keys)
        self._preparation = {"m": "prepare", "generation": generation, "function": function, "settings": settings}
        for worker in self._workers:
            if worker.state not in ("starting", "retiring"):
                self._send(worker, self._preparation)
                worker.state = "preparing"
        try:
            self.wait_ready()
        except BaseException:
            self._preparation = None
            raise

    def info(self) -> list[dict[str, Any]]:
        """One dict a worker: pid, device, gpu, threads, startup (seconds from spawn to ready, None before)."""
        return [
            {"pid": w.process.pid, "device": w.device, "gpu": w.gpu, "threads": self.threads, "startup": w.startup}
            for w in self._workers
        ]

    # ---- jobs

    def submit(self, job: Job) -> None:
        """Start the attempt on an idle worker now, or as soon as there is one."""
        job.key = next(self._keys)
        self._queue.append(job)
        self._dispatch()

    def stop(self, job: Job) -> None:
        """Ask the attempt to end; after ``stop_grace`` seconds its worker is killed. A waiting one just goes."""
        if job in self._queue:
            self._queue.remove(job)
            job.ended = True
            return
        worker = next((worker for worker in self._workers if worker.job is job), None)
        if worker is not None and job.stop_at is None:
            job.stop_at = time.monotonic() + self.stop_grace
            self._send(worker, {"m": "stop", "key": job.key})

    def clear(self) -> None:
        """Drop all waiting attempts and stop the running ones; nobody hears of them any more."""
        for job in [*self._queue, *(worker.job for worker in self._workers if worker.job)]:
            job.on_message = _ignore
            self.stop(job)

    def poll(self, timeout: float) -> None:
        """Block up to ``timeout`` seconds until a worker speaks, then handle all there is: messages, arrivals, deaths.

        Errors: PoolError if workers cannot be started any more.
        """
        by_connection = {worker.connection: worker for worker in self._workers if worker.connection}
        for source in wait([*by_connection, self._wake], self._patience(timeout)):
            if source is self._wake:
                self._wake.recv(4096)
            else:
                self._read(by_connection[source])  # type: ignore[index]
        self._admit()
        for worker in list(self._workers):
            if worker.process.poll() is not None:
                self._drain(worker)
            elif worker.job and worker.job.stop_at is not None and time.monotonic() > worker.job.stop_at:
                self._lose(worker)
        self._dispatch()

    def _patience(self, timeout: float) -> float:
        deadlines = [w.job.stop_at for w in self._workers if w.job and w.job.stop_at is not None]
        return max(0.0, min([timeout, *(deadline - time.monotonic() for deadline in deadlines)]))

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.state != "idle":
                continue
            job = next((job for job in self._queue if job.after is None or job.after.ended), None)
            if job is None:
                return
            self._queue.remove(job)
            job.after = None
            worker.job, worker.state = job, "busy"
            self._send(worker, {"m": "start", "key": job.key, "spec": job.spec.to_dict()})

    def _send(self, worker: _Worker, message: dict[str, Any]) -> None:
        assert worker.connection is not None
        with contextlib.suppress(OSError):  # it is dead, which poll() will find out
            worker.connection.send_bytes(json.dumps(message).encode())

    # ---- messages

    def _read(self, worker: _Worker) -> None:
        """Handle what a worker has sent, up to a limit; its death, if that comes next."""
        assert worker.connection is not None
        for _ in range(MESSAGES_AT_ONCE):
            try:
                if not worker.connection.poll(0):
                    return
                message = json.loads(worker.connection.recv_bytes())
            except (EOFError, OSError):
                self._lose(worker)
                return
            self._handle(worker, message)

    def _drain(self, worker: _Worker) -> None:
        """The process is dead; its last messages count. (Its children may hold the connection open.)"""
        while worker in self._workers and worker.connection and worker.connection.poll(0):
            self._read(worker)
        if worker in self._workers:
            self._lose(worker)

    def _handle(self, worker: _Worker, message: dict[str, Any]) -> None:
        kind = message["m"]
        if kind == "ready":
            worker.device, worker.startup = message["device"], time.monotonic() - worker.started
            if self._preparation:
                worker.state = "preparing"
                self._send(worker, self._preparation)
            else:
                worker.state, self._failed_starts = "idle", 0
        elif kind == "prepared":
            self._on_prepared(worker, message)
        elif worker.job is not None and worker.job.key == message["key"]:
            job = worker.job
            if kind == "done":
                job.ended = True
                worker.job, worker.state = None, "retiring" if message["replace"] else "idle"
            job.on_message(job, message)

    def _on_prepared(self, worker: _Worker, message: dict[str, Any]) -> None:
        asked = self._preparation
        if asked is not None and message["generation"] != asked["generation"]:
            return  # the answer to an earlier prepare(); the one to this is still to come
        worker.state, self._failed_starts = "idle", 0
        if asked is not None and message["error"] is not None:
            error = UserError if message["user"] else PoolError
            raise error(message["error"])

    # ---- processes

    def _open(self) -> None:
        folder = tempfile.mkdtemp(prefix="pool-")
        if len(folder) > 80:  # the address of a Unix socket has 107 bytes
            os.rmdir(folder)
            folder = tempfile.mkdtemp(prefix="pool-", dir="/tmp")
        self._folder, self._address = Path(folder), f"{folder}/socket"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._address)
        listener.listen(64)
        self._owned = _Owned(listener, folder)
        self._finalizer = weakref.finalize(self, self._owned.release)
        arguments = (listener, self._key, self._arrivals, self._wake_writer)
        threading.Thread(target=_let_in, args=arguments, daemon=True, name="pool-listener").start()

    def _spawn(self, gpu: str | None) -> None:
        spawn = next(self._spawns)
        log = self._folder / f"worker-{spawn}.log"
        environment = {**os.environ, **thread_environment(self.threads), **self._env, "PYTHONPATH": _python_path()}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "backends.worker"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._owned.processes[spawn] = process
        self._workers.append(_Worker(spawn, process, log, gpu, time.monotonic()))
        init = {
            "address": self._address,
            "key": self._key.hex(),
            "spawn": spawn,
            "sys_path": [os.getcwd(), str(ROOT), *filter(None, sys.path)],
            "threads": self.threads,
            "warm": self._warm,
            "gpu": gpu is not None,
            "parent": os.getpid(),
        }
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(init).encode() + b"\n")

    def _admit(self) -> None:
        """Match processes that proved themselves to the workers that were started."""
        while not self._arrivals.empty():
            hello, connection = self._arrivals.get()
            worker = next((w for w in self._workers if w.spawn == hello.get("spawn") and not w.connection), None)
            if worker is None:
                connection.close()
            else:
                worker.connection = connection

    def _lose(self, worker: _Worker) -> None:
        """End what is left of a worker, replace it, and tell the attempt that ran on it."""
        reason = _end(worker)
        self._workers.remove(worker)
        del self._owned.processes[worker.spawn]
        if worker.state in ("starting", "preparing"):
            self._failed_starts += 1
            if self._failed_starts >= START_ATTEMPTS or worker.spawn < self.n_workers:
                raise PoolError(f"{reason} while it was {worker.state}:\n{worker.tail()}")
        worker.log.unlink(missing_ok=True)
        self._spawn(worker.gpu)
        job = worker.job
        if job is not None:
            job.ended = True
            job.on_message(job, {"m": "lost", "reason": reason})


class PoolBackend(FunctionBackend):
    """Syne Tune backend that runs a trial function on the warm workers of a pool.

    With ``n_workers`` instead of ``pool`` it starts a pool of its own, which ``close()``, the end of the program or
    garbage collection ends. ``fetch_status_results`` waits for the workers, so give the Tuner ``sleep_time=0``.
    """

    def __init__(
        self,
        function: str,
        *,
        pool: WorkerPool | None = None,
        n_workers: int | None = None,
        settings: dict[str, Any] | None = None,
        seed: int = 0,
        path: str | Path | None = None,
        run: int = 1,
        max_retries: int = 2,
        delete_checkpoints: bool = False,
    ):
        super().__init__(
            function,
            settings=settings,
            seed=seed,
            path=path,
            run=run,
            max_retries=max_retries,
            delete_checkpoints=delete_checkpoints,
        )
        self._owns_pool = pool is None
        self.pool = WorkerPool(n_workers) if pool is None else pool
        self.pool.clear()
        self._jobs: dict[int, Job] = {}  # the latest attempt of each trial, until it has ended
        self._halted: set[int] = set()  # trials whose latest attempt is to be ignored

    def close(self) -> None:
        """End the pool, if it is this backend's own."""
        if self._owns_pool:
            self.pool.close()

    def busy_trial_ids(self) -> list[tuple[int, str]]:
        self.pool.poll(0.0)
        return [(k, Status.stopping if k in self._halted else Status.in_progress) for k in self._jobs]

    def _schedule(self, trial_id: int, config: dict[str, Any]) -> None:
        job = Job(self._next_attempt(trial_id, config), self._on_message, after=self._jobs.get(trial_id))
        self._jobs[trial_id] = job
        self._halted.discard(trial_id)
        self.pool.submit(job)

    def _collect(self, wait: float) -> None:
        self.pool.poll(wait)

    def _halt(self, trial_id: int) -> None:
        job = self._jobs.get(trial_id)
        if job is not None:
            self._halted.add(trial_id)
            self.pool.stop(job)
            if job.ended:  # it had not begun; an earlier one may still be on its way out
                del self._jobs[trial_id]
                if job.after is not None and not job.after.ended:
                    self._jobs[trial_id] = job.after

    def _wait_for_halted(self) -> None:
        while any(trial_id in self._jobs for trial_id in self._halted):
            self.pool.poll(WAIT)

    def _on_message(self, job: Job, message: dict[str, Any]) -> None:
        trial_id = job.spec.trial_id
        if self._jobs.get(trial_id) is not job:
            return  # a later attempt is waiting for the end of this one
        if job.ended:
            del self._jobs[trial_id]
        if trial_id in self._halted:
            return
        if message["m"] == "report":
            self._on_report(trial_id, message["report"])
        elif message["m"] == "lost":
            self._on_lost(trial_id, job.spec.attempt, message["reason"])
        elif message["kind"] == "returned":
            self._on_returned(trial_id)
        else:
            self._on_failed(trial_id, message["reason"], message["details"])

    def __getstate__(self) -> dict[str, Any]:
        """``Tuner.save`` dumps the backend: processes and connections stay behind."""
        return self.__dict__ | {"pool": None, "_jobs": {}, "on_event": None}


def _ignore(job: Job, message: dict[str, Any]) -> None:
    pass


def _let_in(
    listener: socket.socket,
    key: bytes,
    arrivals: "queue.SimpleQueue[tuple[dict[str, Any], Connection]]",
    wake: socket.socket,
) -> None:
    """Accept connections; each proves itself in a thread of its own, so that a mute one holds up nobody."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            time.sleep(0.1)  # out of file descriptors
            continue
        threading.Thread(target=_authenticate, args=(client, key, arrivals, wake), daemon=True).start()


def _authenticate(
    client: socket.socket,
    key: bytes,
    arrivals: "queue.SimpleQueue[tuple[dict[str, Any], Connection]]",
    wake: socket.socket,
) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HANDSHAKE, 0))
    connection = Connection(os.dup(client.fileno()))
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        hello = json.loads(connection.recv_bytes(10_000))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        arrivals.put((hello, connection))
        wake.send(b"x")
    except Exception:  # whatever a stranger sends must not matter
        connection.close()
    finally:
        client.close()


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _end(worker: _Worker) -> str:
    """Kill what is left of the worker's process group and say what became of the process itself."""
    if worker.connection:
        worker.connection.close()
    stopped = worker.job is not None and worker.job.stop_at is not None
    if not stopped:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=1.0)  # it closed its connection: how does it end?
    code = worker.process.poll()
    _kill_group(worker.process)
    worker.process.wait()
    name = f"worker {worker.process.pid}"
    if code is None:
        return f"{name} did not stop in time" if stopped else f"{name} closed its connection"
    return f"{name} was killed by {signal.Signals(-code).name}" if code < 0 else f"{name} exited with code {code}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
