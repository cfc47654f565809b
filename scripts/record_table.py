"""Fill the curve store with many configurations trained at once, for experiments in virtual time that train nothing.

    python scripts/record_table.py --configs 200 ohgw=off,normalized seed=0..4 task.model=mlp
    python -m harness backend=simulated scheduler=asha,pasha ohgw=off,normalized seed=0..4 task.model=mlp

The other arguments are the harness's own (task, ohgw, seed, task.* and backend.*, lists and ranges as there). For each
seed and variant the first ``--configs`` configurations of the seed's stream are recorded, those that schedulers which
sample at random ask for. A warm start is computed as in a live trial, one at a time; the training after it is batched
(``harness/tasks/batched.py``), and its curves equal the one-at-a-time trainer's up to rounding. Seconds by kind cannot
be measured in a batch: they are the medians of ``--sample`` trials trained one at a time before, on one thread as a
simulated worker is; the store notes that. The last lines compare both ways in configurations x epochs per second.
"""

import argparse
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from backends.context import Checkpoint, CheckpointStore, TrialContext, TrialFailed, UserError, trial_seed
from backends.curve_store import Curve, CurveStore, Row
from harness import trial
from harness.curves import curve_identity
from harness.experiment import MAX_RESOURCE, TRIAL_FUNCTION, trial_settings
from harness.provenance import provenance
from harness.schedulers import RandomSampler
from harness.space import Space
from harness.sweep import Cell, check_data, gpus_per_trial, make_plan
from harness.tasks import load_task
from harness.tasks.batched import TrainedTrial, train_batched
from harness.tasks.vision import ImageTask

SAMPLE_EPOCHS = 3  # of each trial of the sample: the first has a start-up, the last a checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=100, help="configurations a seed and variant (default 100)")
    parser.add_argument("--epochs", type=int, help="epochs of each (default: task.max_epochs)")
    parser.add_argument("--chunk", type=int, help="configurations at once (default: what fits in --memory, 64 at most)")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB a chunk may take (default 1)")
    parser.add_argument(
        "--sample", type=int, default=5, help="trials trained one at a time for the seconds (default 5)"
    )
    options, words = parser.parse_known_args()
    try:
        record(words, options)
    except (UserError, sqlite3.Error) as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


def record(words: Sequence[str], options: argparse.Namespace) -> None:
    """Record what ``words`` and ``options`` ask for. Errors: UserError."""
    for name in ("configs", "sample", "epochs", "chunk"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if not options.memory > 0:
        raise UserError(f"--memory must be a number of GiB above 0, not {options.memory:g}")
    if stray := [word for word in words if word.startswith(("backend=", "-"))]:
        raise UserError(f"{stray[0]} is not possible here: tables are for backend=simulated; see --help")
    plan = make_plan(["backend=simulated", *words])
    check_data(plan)
    if any(gpus_per_trial(cell.config) > 1 for cell in plan.cells):
        raise UserError("task.gpus_per_trial must be 1 here: a table is trained in batches, by one process")
    cells = {(str(curve_identity(cell)), cell.seed): cell for cell in plan.cells}.values()
    task = image_task(next(iter(cells)))
    epochs = options.epochs or task.max_epochs
    if epochs > task.max_epochs:
        raise UserError(f"--epochs {epochs} is more than task.max_epochs={task.max_epochs}")
    timing = time_one_at_a_time(next(iter(cells)), options.sample, min(SAMPLE_EPOCHS, epochs))
    meta = provenance(sys.argv, [])
    origin = {key: meta[key] for key in ("cpu", "gpus", "host", "platform", "python", "packages")}
    origin["measured"] = f"curves in batches; seconds: medians of {options.sample} trials trained one at a time"
    path = next(iter(cells)).config["backend"]["store"]
    trained, seconds, tables = 0, 0.0, 0
    with CurveStore(path, origin=origin) as store:
        for cell in cells:
            done, spent = record_cell(cell, store, epochs, timing, options)
            trained, seconds, tables = trained + done, seconds + spent, tables + 1
    print(
        f"{path}: {tables} tables of {options.configs} configurations x {epochs} epochs, {trained} epochs trained now"
    )
    one = timing.rate
    print(f"one at a time, 1 thread: {one:.1f} configurations x epochs per second (n = {options.sample} trials)")
    if seconds:
        print(f"batched, {torch.get_num_threads()} threads: {trained / seconds:.1f} configurations x epochs per second "
              f"(n = {trained} epochs), {trained / seconds / one:.1f} times as many")  # fmt: skip


def image_task(cell: Cell) -> ImageTask:
    """The cell's task on the CPU or the first GPU. Errors: UserError if it is of a kind that cannot be batched."""
    task = load_task(cell.config["task"], "cuda:0" if torch.cuda.is_available() else "cpu")
    if not isinstance(task, ImageTask):
        raise UserError(f"task {cell.task} cannot be trained in batches; possible: image tasks")
    return task


def record_cell(
    cell: Cell, store: CurveStore, epochs: int, timing: "Timing", options: argparse.Namespace
) -> tuple[int, float]:
    """Record what the store lacks of one seed and variant; epochs trained and seconds of batched training."""
    task = image_task(cell)
    space = Space.from_spec(cell.config["task"]["spaces"][cell.config["task"]["space"]])
    sampler = RandomSampler(space.config_space(), cell.seed)
    wanted = []
    for number in range(options.configs):
        x, seed = sampler.suggest(), trial_seed(cell.seed, number)
        curve = store.curve({"function": TRIAL_FUNCTION, **curve_identity(cell), "config": x, "seed": seed})
        if len(curve.rows) < epochs and not curve.ended:
            wanted.append(Wanted(curve, x, seed))
    if cell.config["ohgw"]["estimator"] != "off":
        for one in wanted:
            one.warm_start(task, cell)
    trained, begun = 0, time.perf_counter()
    configs, seeds = [one.x_prime for one in wanted], [one.seed for one in wanted]
    batches = train_batched(task, configs, seeds, epochs, chunk=options.chunk, memory=int(options.memory * 2**30))
    for one, result in zip(wanted, batches, strict=True):
        rows = list(one.rows(result, timing))
        store.complete(one.curve, rows)
        trained += len(rows)
    print(f"{cell.variant} seed {cell.seed}: {trained} epochs of {len(wanted)} configurations", flush=True)
    return trained, time.perf_counter() - begun


@dataclass
class Wanted:
    """A curve to record: of configuration ``x``, warm-started if ``warm`` is its record."""

    curve: Curve
    x: dict[str, Any]
    seed: int
    warm: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def x_prime(self) -> dict[str, Any]:
        return dict(self.x if self.warm is None else self.warm["x_prime"])

    def warm_start(self, task: ImageTask, cell: Cell) -> None:
        """As a live trial does it, on one thread."""
        context: Any = SimpleNamespace(settings=trial_settings(cell), seed=self.seed)
        with threads(1):
            training: Any = task.start(self.x, self.seed)
            clock = trial.Clock(str(task.device), time.perf_counter())
            memory = trial.PeakMemory(str(task.device))
            self.warm = trial.warm_start(self.x, task, training, context, clock, memory)
            with clock.charging("warm_start"):  # with its checkpoint, as harness/trial.py charges it
                write_checkpoint({**trial.NOTHING, "warm_start": self.warm, "busy": dict(clock.seconds)})
            self.seconds = clock.take()["warm_start"]

    def rows(self, result: TrainedTrial, timing: "Timing") -> Iterator[Row]:
        """The rows of the store: what harness/trial.py would have reported."""
        for report in result.reports:
            spent = self._spent(report["epoch"], timing, report["flops"])
            yield Row({**report, **spent, "peak_memory": timing.peak_memory})
        if result.failure is not None:
            yield Row(None, failure=result.failure, details=self._spent(len(result.reports) + 1, timing, {}))

    def _spent(self, epoch: int, timing: "Timing", flops: Mapping[str, int]) -> dict[str, Any]:
        """Busy seconds, FLOPs (of training: ``flops``), and in the first report the warm start."""
        if epoch > 1 or self.warm is None:
            return {"busy": timing.busy(epoch), **({"flops": dict(flops)} if flops else {})}
        busy = timing.busy(1) | {"warm_start": self.seconds}
        return {"busy": busy, "flops": {**flops, "warm_start": self.warm["flops"]}, "warm_start": self.warm}


@dataclass
class Timing:
    """What one-at-a-time training costs: busy seconds by kind, of first epochs and of others, and epochs a second."""

    first: list[Mapping[str, float]] = field(default_factory=list)
    later: list[Mapping[str, float]] = field(default_factory=list)
    peak_memory: int = 0
    epochs: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.epochs / self.seconds

    def busy(self, epoch: int) -> dict[str, float]:
        measured = self.first if epoch == 1 or not self.later else self.later
        return {kind: statistics.median(busy[kind] for busy in measured) for kind in measured[0]}


def time_one_at_a_time(cell: Cell, sample: int, epochs: int) -> Timing:
    """Train ``sample`` random configurations as a simulated worker would, on one thread; failed ones count not at all.
    Errors: UserError if all fail."""
    task, timing = image_task(cell), Timing()
    settings = {**trial_settings(cell), "ohgw": {"estimator": "off"}, "checkpoint_seconds": 0.0}
    sampler = RandomSampler(task.space.config_space(), cell.seed)
    with threads(1):
        for number in range(-1, sample):  # the first one warms up and is not counted
            context = Listener(
                sampler.suggest(), settings, trial_seed(cell.seed, max(number, 0)), str(task.device), epochs
            )
            begun = time.perf_counter()
            try:
                trial.run(context)
            except TrialFailed:
                continue
            if number >= 0:
                timing.seconds += time.perf_counter() - begun
                timing.epochs += len(context.reports)
                timing.first.append(context.reports[0]["busy"])
                timing.later += [report["busy"] for report in context.reports[1:]]
                timing.peak_memory = max(timing.peak_memory, *(report["peak_memory"] for report in context.reports))
    if not timing.first:
        raise UserError(f"all {sample} trials of the sample failed; try another seed or a larger --sample")
    return timing


class Listener(TrialContext):
    """A trial's context in this process: keeps reports, writes checkpoints for what they cost."""

    def __init__(self, x: dict[str, Any], settings: dict[str, Any], seed: int, device: str, epochs: int):
        self.config, self.settings, self.seed = {**x, MAX_RESOURCE: epochs}, settings, seed
        self.device, self.trial_id, self.attempt, self.started = device, 0, "0001-0001", time.perf_counter()
        self.reports: list[dict[str, Any]] = []

    def report(self, **metrics: Any) -> None:
        self.reports.append(metrics)

    def should_stop(self) -> bool:
        return False

    def interrupted(self) -> bool:
        return False

    def save(self, state: dict[str, Any], report: dict[str, Any] | None = None) -> None:
        write_checkpoint(state)

    def load(self) -> dict[str, Any] | None:
        return None


def write_checkpoint(state: dict[str, Any]) -> None:
    """For its seconds only."""
    with tempfile.TemporaryDirectory() as folder:
        CheckpointStore(Path(folder), "0001-0001").save(Checkpoint(state, 0))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on ``count`` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(main())
