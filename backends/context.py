"""What a trial function sees: its context, its checkpoints and the errors it may raise.

A *trial function* is known by its dotted name and called as ``function(context)`` in another process. It trains
``context.config`` until its milestone or until ``context.should_stop()``, reports as it goes, and returns:

    def train(context):
        state = context.load() or {"epoch": 0, "weights": ...}
        while state["epoch"] < context.config["epochs"] and not context.should_stop():
            ...                                                     # one epoch
            context.save(state, report={"epoch": state["epoch"], "loss": loss})

Reports are numbered over all attempts of a trial and every number reaches the scheduler once. ``save(state, report=)``
is a checkpoint and a report in one: the checkpoint is on disk before the report is sent, and a later attempt that loads
it sends the report again if the driver never got it. ``report()`` first and ``save()`` afterwards is safe as well. A
``save()`` *before* the ``report()`` of the same epoch is not, unless the function reports that epoch again when it has
loaded that checkpoint.
"""

import io
import json
import os
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class UserError(Exception):
    """A mistake only the user can mend (missing data, unknown function); the message says how, without traceback."""


class TrialFailed(Exception):
    """An expected failure of one trial, such as a loss that is not finite; the message is the reason.

    This and any other exception may carry a JSON-able dict in an attribute ``details`` (what the trial had spent, say);
    ``backend.failure_details(trial_id)`` has it."""


class TrialContext(Protocol):
    """The only argument of a trial function."""

    config: dict[str, Any]  # hyperparameters, constants, and the scheduler's max_resource_attr if it sets one
    settings: dict[str, Any]  # JSON-able, the same for all trials of a backend
    seed: int  # 63 bits, from (backend seed, trial id) only: the same for every attempt
    device: str  # "cpu" or "cuda:0"
    trial_id: int
    attempt: str  # unique and increasing in string order among the attempts of this trial
    started: float  # time.perf_counter() when the worker received this attempt

    def report(self, **metrics: Any) -> None:
        """Send JSON-able values (numpy scalars too) to the scheduler; does not wait for it."""

    def should_stop(self) -> bool:
        """True once this attempt was stopped or paused; cheap enough for every batch."""

    def interrupted(self) -> bool:
        """True once the attempt's time is nearly up (preemption, a time limit): save at the end of the unit of
        resource that is being trained, report it, and return. Another attempt goes on from there."""

    def save(self, state: dict[str, Any], report: dict[str, Any] | None = None) -> None:
        """Write a checkpoint (tensors, str, int, float, bool, None, dict, list, tuple), then send ``report``."""

    def load(self) -> dict[str, Any] | None:
        """The latest checkpoint of any attempt of this trial (tensors on the CPU), None if there is none."""


@dataclass(frozen=True)
class RestoredTrial:
    """A trial of an earlier run of the driver, for ``backend.restore``."""

    trial_id: int
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # reports the scheduler has got, in order
    status: str  # paused | stopped | failed | completed
    run: int = 0  # of the driver in which it began


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: what the trial function saved, and how far its reports had come."""

    state: dict[str, Any]
    reports: int  # number of the next report
    unconfirmed: list[dict[str, Any]] = field(default_factory=list)  # reports the driver may have missed


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one trial as one attempt may use them: ``folder/<attempt>.pt``.

    An attempt writes only the file of its own name and reads those from ``oldest`` up to its own, so an old attempt
    that is still alive (a *ghost*) can neither overwrite nor delete what a newer one has written, nor, where it is of
    another trial that had this one's number, hand it a checkpoint. A file is one line of JSON (report numbers, size
    and checksum of the rest) and a ``torch.save`` of the state.
    """

    folder: Path
    attempt: str
    oldest: str = ""

    def save(self, checkpoint: Checkpoint) -> None:
        """Write atomically (temporary file, fsync, rename), then delete the files of older attempts.

        Errors: OSError (disk full, unwritable); the previous checkpoint is then still there.
        """
        import torch

        payload = io.BytesIO()
        torch.save(checkpoint.state, payload)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / f"{self.attempt}.pt", checkpoint.reports, checkpoint.unconfirmed, payload.getbuffer())
        for path in self._files():
            if path.stem < self.attempt:
                path.unlink(missing_ok=True)

    def load(self) -> Checkpoint | None:
        """The newest readable checkpoint; an unreadable one is skipped with a warning in favour of the next older."""
        for path in reversed(self._files()):
            try:
                return _read(path)
            except Exception as error:  # whatever a damaged file does to the reader
                warnings.warn(f"checkpoint {path} is unreadable ({error}); trying an older one", stacklevel=2)
        return None

    def _files(self) -> list[Path]:
        return [path for path in checkpoint_files(self.folder, self.oldest) if path.stem <= self.attempt]


def checkpoint_files(folder: Path, oldest: str = "") -> list[Path]:
    """Checkpoints in ``folder``, oldest attempt first, from the attempt ``oldest`` on."""
    return attempt_files(folder, "pt", oldest)


def attempt_files(folder: Path, ending: str, oldest: str = "") -> list[Path]:
    """Files of that kind of the attempts from ``oldest`` on, in order: pt (checkpoints), out and err (logs)."""
    return sorted(file for file in folder.glob(f"[0-9]*.{ending}") if file.stem >= oldest)


def reports_before(content: bytes) -> int:
    """How many reports a checkpoint file's trial had made when it was written. Errors: ValueError if it is none."""
    return int(json.loads(content.partition(b"\n")[0])["reports"])


def copy_checkpoint(source: Path, target: Path, name: str) -> None:
    """Copy the newest checkpoint of the trial folder ``source`` as the start of the trial ``target``, which counts its
    reports from 0; ``name``: an attempt's before its first. Errors: FileNotFoundError if ``source`` has none."""
    files = checkpoint_files(source)
    if not files:
        raise FileNotFoundError(f"no checkpoint in {source}")
    _, payload = _split(files[-1])
    target.mkdir(parents=True, exist_ok=True)
    _write(target / f"{name}.pt", 0, [], memoryview(payload))


def attempt_name(run: int, n: int) -> str:
    """The name of the ``n``-th attempt of a trial in the driver's ``run``-th run; string order is time order."""
    return f"{run:04d}-{n:04d}"


def trial_seed(seed: int, trial_id: int) -> int:
    """63-bit seed of a trial, a child of ``numpy.random.SeedSequence(seed)``."""
    return int(np.random.SeedSequence(seed, spawn_key=(trial_id,)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def to_json(value: Any) -> str:
    """JSON of ``value``; numpy and torch scalars and arrays become numbers and lists. NaN stays NaN."""
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} is not JSON-able")


def _write(path: Path, reports: int, unconfirmed: list[dict[str, Any]], payload: memoryview) -> None:
    header = {"reports": reports, "unconfirmed": unconfirmed, "bytes": len(payload), "crc32": zlib.crc32(payload)}
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(to_json(header).encode() + b"\n")
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    line, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    if header["bytes"] != len(payload) or header["crc32"] != zlib.crc32(payload):
        raise ValueError("torn or damaged")
    return header, payload


def _read(path: Path) -> Checkpoint:
    import torch

    header, payload = _split(path)
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return Checkpoint(state, header["reports"], header["unconfirmed"])
