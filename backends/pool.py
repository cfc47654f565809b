"""Warm workers of one machine for Syne Tune: ``WorkerPool`` owns the processes, ``PoolBackend`` runs trials on them.

    backend = PoolBackend("my_module.train", n_workers=2)
    Tuner(backend, scheduler, StoppingCriterion(max_num_trials_started=40), n_workers=2, sleep_time=0).run()

A pool can serve many backends one after another (the cells of a sweep): ``PoolBackend(..., pool=pool)``.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.context import RestoredTrial
from backends.function_backend import (
    WAIT,
    FunctionBackend,
    Status,
    thread_environment,
    threads_per_worker,
)
from backends.gpus import default_n_workers, grouped, visible_gpus
from backends.workers import Job, PoolError, Worker, Workers, worker_python_path, worker_sys_path

__all__ = ["Job", "PoolBackend", "PoolError", "RestoredTrial", "WorkerPool"]


@dataclass(eq=False)
class _Process:
    """A worker process of this machine."""

    process: subprocess.Popen[bytes]
    log: Path
    innocent = False

    @property
    def name(self) -> str:
        return f"worker {self.process.pid}"

    @property
    def place(self) -> dict[str, Any]:
        return {"pid": self.process.pid}

    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self, stopped: bool) -> str:
        """Kill what is left of the process group and say what became of the process itself."""
        if not stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1.0)  # it closed its connection: how does it end?
        code = self.process.poll()
        _kill_group(self.process)
        self.process.wait()
        if code is None:
            return f"{self.name} did not stop in time" if stopped else f"{self.name} closed its connection"
        return (
            f"{self.name} was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"{self.name} exited with code {code}"
        )

    def tail(self) -> str:
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


class WorkerPool(Workers):
    """``n_workers`` persistent processes (default: one for every ``gpus_each`` GPUs, else 2), started at once, ready
    some seconds later.

    Not thread-safe: one thread at a time.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        *,
        threads: int | None = None,
        gpus: Sequence[str | int] | None = None,
        gpus_each: int = 1,
        env: dict[str, str] | None = None,
        stop_grace: float = 10.0,
        warm: Sequence[str] = ("torch",),
    ):
        """``threads`` a worker (default: CPUs / workers); ``gpus``: ids for CUDA_VISIBLE_DEVICES, ``gpus_each`` to each
        worker in turn (default: all visible; []: none); ``env``: additional variables; ``stop_grace``: seconds from a
        stop to a kill; ``warm``: modules every worker imports at its start if they are installed (torch is reset and
        seeded for each trial only if it is here or the trial function's module imports it).

        Errors: UserError if there are GPUs, but fewer than ``gpus_each``."""
        count = default_n_workers(gpus_each) if n_workers is None else n_workers
        self._gpus = grouped([gpu.uuid for gpu in visible_gpus()] if gpus is None else list(map(str, gpus)), gpus_each)
        self._folder, self._address = _socket_folder()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(self._address)
        listener.listen(64)
        self._owned = _Owned(listener, str(self._folder))
        self._finalizer = weakref.finalize(self, self._owned.release)
        super().__init__(count, threads or threads_per_worker(max(1, count)), stop_grace, listener)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if not self._gpus else {}
        self._env, self._warm = hidden | (env or {}), list(warm)
        for k in range(self.n_workers):
            self._spawn(self._gpus[k % len(self._gpus)] if self._gpus else None)

    def __enter__(self) -> "WorkerPool":
        return self

    def close(self) -> None:
        """Kill the workers, and what they started, at once."""
        self._finalizer()
        super().close()

    def _spawn(self, gpu: str | None) -> None:
        spawn = next(self._spawns)
        log = self._folder / f"worker-{spawn}.log"
        environment = {
            **os.environ,
            **thread_environment(self.threads),
            **self._env,
            "PYTHONPATH": worker_python_path(),
        }
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
        self._workers.append(Worker(spawn, _Process(process, log), gpu, time.monotonic()))
        init = {
            "address": self._address,
            "key": self._key.hex(),
            "spawn": spawn,
            "sys_path": worker_sys_path(),
            "threads": self.threads,
            "warm": self._warm,
            "gpu": gpu is not None,
            "parent": os.getpid(),
        }
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(init).encode() + b"\n")

    def _is_fatal(self, worker: Worker) -> bool:
        return super()._is_fatal(worker) or worker.spawn < self.n_workers

    def _lose(self, worker: Worker) -> None:
        try:
            super()._lose(worker)
        finally:
            del self._owned.processes[worker.spawn]

    def _replace(self, worker: Worker) -> None:
        assert isinstance(worker.handle, _Process)
        worker.handle.log.unlink(missing_ok=True)
        self._spawn(worker.gpu)


class PoolBackend(FunctionBackend):
    """Syne Tune backend that runs a trial function on the warm workers of a pool.

    With ``n_workers`` instead of ``pool`` it starts a pool of its own, which ``close()``, the end of the program or
    garbage collection ends. ``fetch_status_results`` waits for the workers, so give the Tuner ``sleep_time=0``.
    """

    def __init__(
        self,
        function: str,
        *,
        pool: Workers | None = None,
        n_workers: int | None = None,
        **inherited: Any,
    ):
        """``inherited``: as in ``FunctionBackend``."""
        super().__init__(function, **inherited)
        self._owns_pool = pool is None
        self.pool: Workers = WorkerPool(n_workers) if pool is None else pool
        self.pool.clear()
        self._jobs: dict[int, Job] = {}  # the latest attempt of each trial, until it has ended
        self._halted: set[int] = set()  # trials whose latest attempt is to be ignored

    def announce_workers(self) -> None:
        """From now on every worker that is a Slurm job is an event (``{"e": "worker", "job", "node"}``), those that are
        there already included."""
        self.pool.on_worker = self._on_worker
        for info in self.pool.info():
            if info["startup"] is not None:
                self._on_worker(info)

    def _on_worker(self, place: dict[str, Any]) -> None:
        if "job" in place:
            self.on_event({"e": "worker", "job": place["job"], "node": place["node"]})

    def interrupt(self, seconds: float) -> None:
        """Let running trials checkpoint at the end of their epoch, for ``seconds`` at most; what they report meanwhile
        comes again from the checkpoints."""
        self._halted |= set(self._jobs)
        self.pool.interrupt(seconds)
        self._jobs = {trial_id: job for trial_id, job in self._jobs.items() if not job.ended}

    def close(self) -> None:
        """End the pool, if it is this backend's own."""
        self.pool.ignore_workers()
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
            self._on_lost(trial_id, job.spec.attempt, message["reason"], message.get("counts", True))
        elif message["kind"] == "returned":
            self._on_returned(trial_id)
        else:
            self._on_failed(trial_id, message["reason"], message["details"])

    def __getstate__(self) -> dict[str, Any]:
        """``Tuner.save`` dumps the backend: processes and connections stay behind."""
        return self.__dict__ | {"pool": None, "_jobs": {}, "on_event": None}


def _socket_folder() -> tuple[Path, str]:
    """A folder for the pool's logs, and the address of its socket in there."""
    folder = tempfile.mkdtemp(prefix="pool-")
    if len(folder) > 80:  # the address of a Unix socket has 107 bytes
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="pool-", dir="/tmp")
    return Path(folder), f"{folder}/socket"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
