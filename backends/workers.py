"""Warm workers as a driver sees them: attempts wait, run, end; messages come in; a worker that dies is replaced.

``Workers`` has no thread of its own but those that let workers in; everything else happens in ``poll``, which the
backend calls. How a worker is started and ended is for the subclasses: ``WorkerPool`` (processes of this machine) and
``SlurmWorkers`` (jobs of a cluster).
"""

import contextlib
import itertools
import json
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, Protocol

from backends.attempt import AttemptSpec
from backends.context import UserError
from backends.function_backend import WAIT
from backends.sockets import notice_dead_peer

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


class Handle(Protocol):
    """Power over one worker process."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def place(self) -> dict[str, Any]:
        """Where it is, for people and records: pid, or Slurm job and node."""

    def ended(self) -> bool:
        """Whether the process is known to be gone."""

    def end(self, stopped: bool) -> str:
        """End it with all it started, and say what became of it; ``stopped``: because its attempt did not stop."""

    def tail(self) -> str:
        """The last lines it wrote outside of trials."""

    @property
    def innocent(self) -> bool:
        """Whether it was taken away by the site (a failed node, preemption), after it has ended."""


@dataclass(eq=False)
class Worker:
    """A worker process as its driver sees it."""

    spawn: int
    handle: Handle
    gpu: str | None
    started: float
    connection: Connection | None = None
    state: str = "starting"  # starting | preparing | idle | busy | retiring
    startup: float | None = None  # seconds from spawn to ready
    device: str = "?"
    job: Job | None = None


class Workers:
    """``n_workers`` persistent processes. Not thread-safe: one thread at a time."""

    def __init__(self, n_workers: int, threads: int, stop_grace: float, listener: socket.socket):
        """``stop_grace``: seconds from a stop to a kill. ``listener``: where workers connect to, listening."""
        if n_workers < 1:
            raise UserError(f"n_workers must be at least 1, got {n_workers}")
        self.n_workers, self.threads, self.stop_grace = n_workers, threads, stop_grace
        self.on_worker: Callable[[dict[str, Any]], None] = _ignore_worker  # hears of every worker that becomes ready
        self._key = secrets.token_bytes(32)
        self._workers: list[Worker] = []
        self._queue: deque[Job] = deque()
        self._keys, self._spawns = itertools.count(), itertools.count()
        self._failed_starts = 0
        self._preparation: dict[str, Any] | None = None
        self._arrivals: queue.SimpleQueue[tuple[dict[str, Any], Connection]] = queue.SimpleQueue()
        self._wake, self._wake_writer = socket.socketpair()
        arguments = (listener, self._key, self._arrivals, self._wake_writer)
        threading.Thread(target=_let_in, args=arguments, daemon=True, name="workers-listener").start()

    # ---- for subclasses

    def _replace(self, worker: Worker) -> None:
        """Start another worker in the place of one that is lost."""
        raise NotImplementedError

    def _is_fatal(self, worker: Worker) -> bool:
        """Whether the death of a worker that was starting or preparing means that none will ever work."""
        return self._failed_starts >= START_ATTEMPTS

    def _look(self) -> None:
        """Take in news of workers that do not come over their connections."""

    # ---- life

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and what they started, at once."""
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
                raise PoolError(f"{late.handle.name} is not ready after {timeout:.0f} s:\n{late.handle.tail()}")
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
        """One dict a worker: where it is (pid, or Slurm job and node), device, gpu, threads, startup (seconds from
        spawn to ready, None before)."""
        return [
            {**w.handle.place, "device": w.device, "gpu": w.gpu, "threads": self.threads, "startup": w.startup}
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

    def ignore_workers(self) -> None:
        """Nobody wants to hear of new workers any more."""
        self.on_worker = _ignore_worker

    def interrupt(self, seconds: float) -> None:
        """Let running attempts checkpoint at the end of their epoch, and drop waiting ones; returns when all have ended
        or time is up."""
        deadline = time.monotonic() + seconds
        for job in list(self._queue):
            self.stop(job)
        for worker in self._workers:
            if worker.job is not None:
                self._send(worker, {"m": "interrupt", "key": worker.job.key})
        while any(worker.job for worker in self._workers) and time.monotonic() < deadline:
            self.poll(min(WAIT, max(0.0, deadline - time.monotonic())))

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
        self._look()
        self._admit()
        for worker in list(self._workers):
            if worker.handle.ended():
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

    def _send(self, worker: Worker, message: dict[str, Any]) -> None:
        assert worker.connection is not None
        with contextlib.suppress(OSError):  # it is dead, which poll() will find out
            worker.connection.send_bytes(json.dumps(message).encode())

    # ---- messages

    def _read(self, worker: Worker) -> None:
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

    def _drain(self, worker: Worker) -> None:
        """The process is dead; its last messages count. (Its children may hold the connection open.)"""
        while worker in self._workers and worker.connection and worker.connection.poll(0):
            self._read(worker)
        if worker in self._workers:
            self._lose(worker)

    def _handle(self, worker: Worker, message: dict[str, Any]) -> None:
        kind = message["m"]
        if kind == "ready":
            worker.device, worker.startup = message["device"], time.monotonic() - worker.started
            self.on_worker(worker.handle.place)
            if self._preparation:
                worker.state = "preparing"
                self._send(worker, self._preparation)
            else:
                worker.state, self._failed_starts = "idle", 0
        elif kind == "prepared":
            self._on_prepared(worker, message)
        elif kind == "leaving":  # it was told to go from outside, and has nothing to do
            worker.state = "retiring"
        elif worker.job is not None and worker.job.key == message["key"]:
            job = worker.job
            if kind == "done":
                job.ended = True
                worker.job, worker.state = None, "retiring" if message["replace"] else "idle"
                if message["kind"] == "interrupted":
                    message = {"m": "lost", "reason": f"{worker.handle.name} {message['reason']}", "counts": False}
            job.on_message(job, message)

    def _on_prepared(self, worker: Worker, message: dict[str, Any]) -> None:
        asked = self._preparation
        if asked is not None and message["generation"] != asked["generation"]:
            return  # the answer to an earlier prepare(); the one to this is still to come
        worker.state, self._failed_starts = "idle", 0
        if asked is not None and message["error"] is not None:
            error = UserError if message["user"] else PoolError
            raise error(message["error"])

    # ---- processes

    def _admit(self) -> None:
        """Match processes that proved themselves to the workers that were started."""
        while not self._arrivals.empty():
            hello, connection = self._arrivals.get()
            worker = next((w for w in self._workers if w.spawn == hello.get("spawn") and not w.connection), None)
            if worker is None:
                connection.close()
            else:
                worker.connection = connection
                self._on_hello(worker, hello)

    def _on_hello(self, worker: Worker, hello: dict[str, Any]) -> None:
        """A worker has connected."""

    def _lose(self, worker: Worker) -> None:
        """End what is left of a worker, replace it, and tell the attempt that ran on it."""
        if worker.connection:
            worker.connection.close()
        reason = worker.handle.end(stopped=worker.job is not None and worker.job.stop_at is not None)
        self._workers.remove(worker)
        if worker.state in ("starting", "preparing") and not worker.handle.innocent:
            self._failed_starts += 1
            if self._is_fatal(worker):
                raise PoolError(f"{reason} while it was {worker.state}:\n{worker.handle.tail()}")
        self._replace(worker)
        job = worker.job
        if job is not None:
            job.ended = True
            job.on_message(job, {"m": "lost", "reason": reason, "counts": not worker.handle.innocent})


def _ignore(job: Job, message: dict[str, Any]) -> None:
    pass


def _ignore_worker(place: dict[str, Any]) -> None:
    pass


def worker_sys_path() -> list[str]:
    """Where a worker looks for modules: as this process does, from this directory."""
    return [os.getcwd(), str(ROOT), *filter(None, sys.path)]


def worker_python_path() -> str:
    """PYTHONPATH that lets another process import ``backends``."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


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
    notice_dead_peer(client)
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
