"""Syne Tune's LocalBackend for trial functions: a fresh process for every attempt, for reference and comparison."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.context import UserError, to_json
from backends.function_backend import FunctionBackend, LocalBackend, Status, thread_environment, threads_per_worker
from backends.gpus import default_n_workers, grouped, visible_gpus

ENTRY = Path(__file__).resolve().with_name("local_entry.py")
TAG = b"[tune-metric]: "  # syne_tune.report
POLL = 0.005  # seconds between two looks at the files of running trials


@dataclass(eq=False)
class _Running:
    """A process that runs an attempt, and how far its output has been read."""

    process: subprocess.Popen[bytes]
    attempt: str
    outcome: Path
    output: Path
    offset: int = 0
    kill_at: float | None = None


class LocalTrialBackend(FunctionBackend, LocalBackend):
    """``LocalBackend`` with the interface and guarantees of ``PoolBackend``, minus its speed.

    Where ``LocalBackend`` kills a paused or stopped trial at once, this one lets it return (SIGTERM, which sets
    ``should_stop``) and kills it after ``stop_grace`` seconds, so that both backends give the same checkpoints.
    """

    def __init__(
        self,
        function: str,
        *,
        threads: int | None = None,
        stop_grace: float = 10.0,
        gpus_per_trial: int = 1,
        **inherited: Any,
    ):
        """``threads`` a trial (default: CPUs / default number of workers); ``inherited``: as in ``FunctionBackend``.
        Errors: UserError if there are GPUs, but not ``gpus_per_trial``."""
        self.threads = threads or threads_per_worker(default_n_workers(gpus_per_trial))
        self.stop_grace = stop_grace
        self._processes: dict[int, _Running] = {}
        self._ending: dict[int, _Running] = {}
        self._gpus = [gpu.uuid for gpu in visible_gpus()]
        grouped(self._gpus, gpus_per_trial)
        super().__init__(
            function,
            entry_point=str(ENTRY),
            pass_args_as_json=True,
            rotate_gpus=len(self._gpus) > 1,
            num_gpus_per_trial=gpus_per_trial,
            **inherited,
        )

    def prepare(self, function: str, settings: dict[str, Any]) -> None:
        """Call ``function(settings, device)`` once in a process of its own, to find mistakes before any trial.

        Errors: UserError if the function raised it or anything else.
        """
        with tempfile.TemporaryDirectory() as folder:
            order = {"prepare": function, "settings": settings, "outcome": f"{folder}/outcome"}
            done = self._start(Path(folder) / "order.json", order, [], subprocess.PIPE, subprocess.PIPE)
            output = done.communicate()[1].decode(errors="replace")
            if done.returncode == 0:
                return
            with contextlib.suppress(OSError, ValueError):
                raise UserError(json.loads(Path(order["outcome"]).read_text())[1])  # type: ignore[arg-type]
            raise UserError(f"{function} ended with code {done.returncode}:\n{output}")

    # ---- attempts

    def _schedule(self, trial_id: int, config: dict[str, Any]) -> None:
        self._await_end(trial_id)
        self._prepare_for_schedule(num_gpus=len(self._gpus))
        spec = self._next_attempt(trial_id, config)
        folder = self.trial_path(trial_id)
        folder.mkdir(parents=True, exist_ok=True)
        configuration, outcome, order, output, errors = (
            folder / f"{spec.attempt}.{ending}" for ending in ("config", "reason", "order", "out", "err")
        )
        configuration.write_text(to_json(config))
        content = {"spec": spec.to_dict(), "outcome": str(outcome.absolute())}
        arguments = ["--st_config_json_filename", str(configuration), "--st_checkpoint_dir", str(folder)]
        with open(output, "wb") as stdout, open(errors, "wb") as stderr:
            process = self._start(order, content, arguments, stdout, stderr, trial_id)
        self._processes[trial_id] = _Running(process, spec.attempt, outcome, output)

    def _start(
        self,
        file: Path,
        order: dict[str, Any],
        arguments: list[str],
        stdout: Any,
        stderr: Any,
        trial_id: int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start the entry script with ``order`` (written to ``file``) on the trial's GPU."""
        common = {
            "sys_path": [os.getcwd(), str(ENTRY.parent.parent), *filter(None, sys.path)],
            "parent": os.getpid(),
            "threads": self.threads,
            "gpu": bool(self._gpus),
            "started": time.perf_counter(),  # the same clock in all processes: start-up counts from here
        }
        file.write_text(to_json({**order, **common}))
        environment = {**os.environ, **thread_environment(self.threads)}
        if trial_id is not None:
            self._allocate_gpu(trial_id, environment)
        return subprocess.Popen(
            [self.binary, str(ENTRY), *arguments, "--attempt", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )

    def _allocate_gpu(self, trial_id: int, env: dict[str, Any]) -> None:
        """Syne Tune's choice of GPU, by UUID: its indices ignore a ``CUDA_VISIBLE_DEVICES`` that is set already."""
        super()._allocate_gpu(trial_id, env)
        if self.rotate_gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[k] for k in self.trial_gpu[trial_id])
        elif self._gpus:
            env["CUDA_VISIBLE_DEVICES"] = self._gpus[0]

    def _collect(self, wait: float) -> None:
        deadline = time.monotonic() + wait
        while not self._look() and time.monotonic() < deadline:
            time.sleep(POLL)

    def _look(self) -> bool:
        """Take in new output and ended processes; whether there was anything."""
        for trial_id, running in list(self._ending.items()):
            if self._has_ended(running):
                del self._ending[trial_id]
        news = False
        for trial_id, running in list(self._processes.items()):
            code = running.process.poll()  # before reading, so that nothing is written after the last read
            for report in _new_reports(running):
                self._on_report(trial_id, report)
                news = True
            if code is not None:
                news = True
                self._on_exit(trial_id, self._processes.pop(trial_id), code)
        return news

    def _on_exit(self, trial_id: int, running: _Running, code: int) -> None:
        _kill(running.process)  # whatever it left running
        self._deallocate_gpu(trial_id)
        if code == 0:
            self._on_returned(trial_id)
        elif running.outcome.exists():
            self._on_failed(trial_id, *json.loads(running.outcome.read_text()))
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            self._on_lost(trial_id, running.attempt, f"process {running.process.pid} {how}")

    def _halt(self, trial_id: int) -> None:
        running = self._processes.pop(trial_id, None)
        if running is not None:
            self._deallocate_gpu(trial_id)
            running.kill_at = time.monotonic() + self.stop_grace
            running.process.send_signal(signal.SIGTERM)
            self._ending[trial_id] = running

    def _has_ended(self, running: _Running) -> bool:
        """Whether a halted process is gone; kills it once its time is up."""
        assert running.kill_at is not None
        if running.process.poll() is None and time.monotonic() < running.kill_at:
            return False
        _kill(running.process)
        running.process.wait()
        return True

    def _await_end(self, trial_id: int) -> None:
        while trial_id in self._ending and not self._has_ended(self._ending[trial_id]):
            time.sleep(POLL)
        self._ending.pop(trial_id, None)

    def _wait_for_halted(self) -> None:
        for trial_id in list(self._ending):
            self._await_end(trial_id)

    def close(self) -> None:
        """Kill all that runs, at once."""
        for running in [*self._processes.values(), *self._ending.values()]:
            _kill(running.process)
            running.process.wait()
        self._processes, self._ending = {}, {}

    def busy_trial_ids(self) -> list[tuple[int, str]]:
        self._look()
        stopping = [(trial_id, Status.stopping) for trial_id in self._ending if trial_id not in self._processes]
        return [(trial_id, Status.in_progress) for trial_id in self._processes] + stopping


def _new_reports(running: _Running) -> list[dict[str, Any]]:
    """The reports among the complete lines written since the last look."""
    if running.output.stat().st_size == running.offset:
        return []
    with open(running.output, "rb") as file:
        file.seek(running.offset)
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]
    running.offset += len(complete)
    return [json.loads(line.partition(TAG)[2]) for line in complete.splitlines() if TAG in line]


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
