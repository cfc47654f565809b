"""One attempt of a trial, inside the process that runs it: the trial function's context and what became of the call."""

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backends.context import Checkpoint, CheckpointStore, TrialFailed, UserError, to_json

# Syne Tune's names for what every report carries (syne_tune.constants, not imported: it costs a second of start-up)
TIMESTAMP, SECONDS, NUMBER = "st_worker_timestamp", "st_worker_time", "st_worker_iter"


@dataclass(frozen=True)
class AttemptSpec:
    """What the driver tells a worker about an attempt; travels as JSON."""

    function: str  # dotted name
    config: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    trial_id: int
    attempt: str
    folder: str  # checkpoints and logs of the trial
    received: int  # reports the driver already has; later ones are sent again from the checkpoint
    oldest: str = ""  # name of the first attempt whose checkpoints are of this trial

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Attempt:
    """The ``TrialContext`` of a real process. ``emit`` sends one numbered report; ``stop`` and ``interrupt`` are set
    from outside."""

    def __init__(
        self,
        spec: AttemptSpec,
        device: str,
        emit: Callable[[dict[str, Any]], None],
        stop: threading.Event,
        started: float,
        interrupt: threading.Event | None = None,
    ):
        self.config, self.settings, self.seed = spec.config, spec.settings, spec.seed
        self.trial_id, self.attempt = spec.trial_id, spec.attempt
        self.device, self.started = device, started
        self.should_stop = stop.is_set
        self.interrupted = (interrupt or threading.Event()).is_set
        self._emit = emit
        self._store = CheckpointStore(Path(spec.folder), spec.attempt, spec.oldest)
        self._received = spec.received
        self._next = 0
        self._unconfirmed: list[dict[str, Any]] = []

    def report(self, **metrics: Any) -> None:
        self._emit(self._numbered(metrics))

    def save(self, state: dict[str, Any], report: dict[str, Any] | None = None) -> None:
        numbered = None if report is None else self._numbered(report)
        self._store.save(Checkpoint(state, self._next, self._unconfirmed))
        if numbered is not None:
            self._emit(numbered)

    def load(self) -> dict[str, Any] | None:
        checkpoint = self._store.load()
        if checkpoint is None:
            return None
        self._next = checkpoint.reports
        self._unconfirmed = [report for report in checkpoint.unconfirmed if report[NUMBER] >= self._received]
        for report in self._unconfirmed:
            self._emit(report)
        return checkpoint.state

    def _numbered(self, metrics: dict[str, Any]) -> dict[str, Any]:
        stamps = {TIMESTAMP: time.time(), SECONDS: time.perf_counter() - self.started, NUMBER: self._next}
        report = json.loads(to_json({**metrics, **stamps}))  # a copy: the trial may go on writing into its dicts
        if self._next >= self._received:
            self._unconfirmed.append(report)
        self._next += 1
        return report


def resolve(dotted: str) -> Callable[..., Any]:
    """The function of that dotted name. Errors: UserError if the module or the name in it does not exist."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module exists, something it imports does not
        raise UserError(f"no module {error.name!r} for {dotted!r}; looked in {os.pathsep.join(sys.path)}") from None
    except AttributeError:
        if hasattr(sys.modules.get(module), name):
            raise
        raise UserError(f"module {module!r} has no function {name!r}") from None


@dataclass(frozen=True)
class Outcome:
    """How a call ended; ``reason`` is empty if it returned."""

    kind: str  # returned | interrupted | failed (by the configuration) | environment (data, disk) | memory | error
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)  # the exception's own ``details``, JSON-able


def call(function: Callable[[], Any]) -> Outcome:
    """Call ``function`` and say how it ended; nothing it raises gets out, ``SystemExit`` included."""
    try:
        function()
    except TrialFailed as error:
        return Outcome("failed", str(error), _details(error))
    except UserError as error:
        return Outcome("environment", str(error), _details(error))
    except BaseException as error:  # a trial's sys.exit() must not end the worker
        reason = traceback.format_exc()
        return Outcome("memory" if is_out_of_memory(error) else "error", reason, _details(error))
    return Outcome("returned")


def _details(error: BaseException) -> dict[str, Any]:
    return json.loads(to_json(getattr(error, "details", {})))


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's CUDA and torch's CPU allocator's ways of saying it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def die_with_parent(parent: int) -> None:
    """Watch from a thread, and end this process and all it started when ``parent`` is no longer its parent.

    PR_SET_PDEATHSIG would end this process only and orphan its children, and does so when the *thread* that started it
    ends.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        kill_own_group()

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def kill_own_group() -> None:
    """End this process and all it started, at once."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
