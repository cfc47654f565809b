"""One trial: warm start, then epochs until the milestone. ``harness.trial.run`` is every experiment's trial function.

Busy seconds are charged by kind as they are spent: start-up, warm start, train, validate, test, checkpoint. A
checkpoint is written before the report of its epoch and holds that report, which the next attempt sends again in case
the driver never got it. x' and its record are in the trial's first checkpoint, before epoch 1: a trial is warm-started
once.

``ctx.settings``: ``task`` (the YAML's entry), ``ohgw`` (fields of ``harness.ohgw.Settings``; estimator "off": none),
``max_resource_attr`` (the configuration's key for the milestone), ``checkpoint_seconds`` (between checkpoints, besides
those at milestones), ``model_dir`` (folder for models; absent or null: none are kept) and ``save_model``: a model is
``<model_dir>/<trial>-<epoch>.pt``, the weights at each of the trial's best epochs so far (``best``; the driver deletes
all but the incumbent's as it gets to know their reports) or at its last milestone (``all``).

Not charged to anything: the part of an epoch that a stop cuts off, and what a killed worker had done since its last
report or checkpoint; both are repeated work or work nobody asked for.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backends.context import TrialContext, TrialFailed, UserError
from harness.seeds import rng
from harness.tasks import Run, Task, load_task
from harness.tasks.distributed import SharedRun, alone

if TYPE_CHECKING:
    from harness.ohgw import WarmStart

CHECKPOINT_SECONDS = 5.0  # lost at most when a worker dies; a checkpoint takes milliseconds
SAMPLE = 4  # images on which a warm start's FLOPs are counted
# the state of a trial that has not begun; ``best``: its best validation score so far
NOTHING: dict[str, Any] = {"run": None, "warm_start": None, "report": None, "busy": {}, "best": None}

# of a warm start, by task and variant, and the estimator it came to use
_flops_per_example: dict[tuple[str, str], float] = {}


def prepare(settings: Mapping[str, Any], device: str) -> None:
    """Make the task's data resident and count what a warm start costs; called once in every worker, before its first
    trial. Errors: UserError, also for a warm start that asks for more examples than the task has."""
    task = load_task(settings["task"], device)
    if settings["ohgw"]["estimator"] == "off":
        return
    asked, possible = settings["ohgw"]["batch_size"], task.largest_warm_start(settings["ohgw"]["probe"])
    if asked > possible:
        raise UserError(f"ohgw.batch_size={asked} is more than the {possible} examples this task has for a warm start")
    x = task.space.sample(rng(0, "prepare"))
    training = task.start(x, 0)
    if counts_flops(training, settings):
        warm_start_flops(x, task, training, settings, 0, one_warm_start(x, task, training, settings, 0).estimator)


def run(ctx: TrialContext) -> None:
    """Train ``ctx.config`` to its milestone or until told to stop. Errors: TrialFailed if a loss is not finite."""
    clock = Clock(ctx.device, ctx.started)
    unreported: dict[str, Any] = {}
    try:
        train(ctx, clock, unreported)
    except Exception as error:  # what the trial spent is charged to it all the same
        error.details = {**unreported, "busy": clock.take()}  # type: ignore[attr-defined]
        raise


def train(ctx: TrialContext, clock: "Clock", unreported: dict[str, Any]) -> None:
    """``run``; ``unreported`` holds the warm start's record until a report has carried it."""
    settings, memory = ctx.settings, PeakMemory(ctx.device)
    with clock.charging("startup"):
        task = load_task(settings["task"], ctx.device)
        milestone = min(int(ctx.config.get(settings["max_resource_attr"], task.max_epochs)), task.max_epochs)
        x = {name: value for name, value in ctx.config.items() if name != settings["max_resource_attr"]}
        state = ctx.load() or NOTHING
        record, best = state["warm_start"], state["best"]
        training = task.start(moved(x, record), ctx.seed)
        if state["run"] is not None:
            training.load_state_dict(state["run"])
        if state["report"] is not None:
            ctx.report(**state["report"])
    clock.add(state["busy"])

    if training.epoch == 0 and record is None and settings["ohgw"]["estimator"] != "off":
        record = warm_start(x, task, training, ctx, clock, memory)
        unreported |= {"warm_start": record, "flops": {"warm_start": record["flops"]}}
        with clock.charging("warm_start"):  # the only reason for a checkpoint here
            training.reconfigure(record["x_prime"])
            ctx.save({**NOTHING, "warm_start": record, "busy": dict(clock.seconds)})
    elif training.epoch == 0 and record is not None:
        unreported |= {"warm_start": record, "flops": {"warm_start": record["flops"]}}

    memory.reset()
    saved_at = time.perf_counter()
    while training.epoch < milestone:
        report = one_epoch(ctx, training, clock)
        if report is None:
            return
        report["peak_memory"] = memory.peak()
        if unreported:
            report["warm_start"] = record
            report["flops"] |= unreported["flops"]
        improved = better(report["validation_score"], best, settings["task"]["mode"])
        best = report["validation_score"] if improved else best
        at_milestone, leaving = training.epoch == milestone, ctx.interrupted()
        due = time.perf_counter() - saved_at >= settings.get("checkpoint_seconds", CHECKPOINT_SECONDS)
        with clock.charging("checkpoint"):
            if wanted(settings, improved, at_milestone):
                save_model(Path(settings["model_dir"]), ctx.trial_id, moved(x, record), training, report)
                if settings.get("save_model") != "best":
                    drop_older_models(Path(settings["model_dir"]), ctx.trial_id, training.epoch)
            if at_milestone or leaving or due:
                resent = {**report, "busy": dict(clock.seconds)}
                run = training.state_dict()
                ctx.save({**NOTHING, "run": run, "warm_start": record, "report": resent, "best": best})
                saved_at = time.perf_counter()
        ctx.report(**report, busy=clock.take())
        unreported.clear()
        if leaving:
            return


def one_epoch(ctx: TrialContext, training: Run, clock: "Clock") -> dict[str, Any] | None:
    """Train, validate, test; the epoch's report without its times, None if the trial was told to stop meanwhile."""
    with clock.charging("train"):
        trained = training.train_epoch(ctx.should_stop)
    if trained is None:
        return None
    with clock.charging("validate"):
        validation = training.evaluate("validation")
    if not math.isfinite(validation["loss"]):
        raise TrialFailed(f"validation loss is {validation['loss']} in epoch {training.epoch}")
    with clock.charging("test"):
        test = training.evaluate("test")
    return {
        "epoch": training.epoch,
        "train_loss": trained["train_loss"],
        "train_score": trained["train_score"],
        "validation_loss": validation["loss"],
        "validation_score": validation["score"],
        "test_score": test["score"],
        **_more("validation", validation),
        **_more("test", test),
        "flops": {"train": trained["flops"]},
    }


def _more(part: str, scores: Mapping[str, float]) -> dict[str, float]:
    """What a task says of ``part`` besides loss and score, as ``test_f1``."""
    return {f"{part}_{name}": value for name, value in scores.items() if name not in ("loss", "score")}


def warm_start(
    x: Mapping[str, Any], task: Task, training: Run, ctx: TrialContext, clock: "Clock", memory: "PeakMemory"
) -> dict[str, Any]:
    """The record of a warm start of ``x`` at the initial weights of ``training``; ``x_prime`` is what to train with."""
    memory.reset()
    with clock.charging("warm_start"):
        result = one_warm_start(x, task, training, ctx.settings, ctx.seed)
        peak = memory.peak()
    flops = warm_start_flops(x, task, training, ctx.settings, ctx.seed, result.estimator)
    clock.skip()
    return dataclasses.replace(result, flops=flops, peak_memory=peak).record()


def one_warm_start(
    x: Mapping[str, Any], task: Task, training: Run, settings: Mapping[str, Any], seed: int, **changed: Any
) -> "WarmStart":
    """One warm start with the settings of the variant, some of them ``changed``."""
    from harness.ohgw import Settings, warm_start  # 0.8 s that a vanilla trial need not wait for

    settings = {**settings, "ohgw": {**settings["ohgw"], **changed}}
    if isinstance(training, SharedRun):
        return training.warm_start(x, settings, seed)
    options = Settings(**settings["ohgw"])
    problem = training.problem(options)
    if problem is None:
        raise TrialFailed("this task has no hyper-gradient: it can only be run with ohgw=off")
    return warm_start(x, task.space, problem, options, rng(seed, "warm_start", "direction"))


def warm_start_flops(
    x: Mapping[str, Any], task: Task, training: Run, settings: Mapping[str, Any], seed: int, estimator: str
) -> int:
    """FLOPs of a warm start that came to use ``estimator``. Counted once in a process, in ``prepare`` where the backend
    calls it and otherwise off the clock (the count belongs to the study, not to the method), on a few examples: those
    of convolutions and matrix products are proportional to the batch size."""
    key = (json.dumps([settings["task"], settings["ohgw"]], sort_keys=True), estimator)
    if not counts_flops(training, settings):
        return 0
    if key not in _flops_per_example:
        from harness.ohgw import count_flops

        with alone(training) as sole:
            counted = count_flops(lambda: one_warm_start(x, task, sole, settings, seed, batch_size=SAMPLE))
        _flops_per_example[key] = counted / SAMPLE
    return round(_flops_per_example[key] * settings["ohgw"]["batch_size"])


def counts_flops(training: Run, settings: Mapping[str, Any]) -> bool:
    """False where a warm start has no network (trees): no matrix products, and counting would do it all again."""
    from harness.ohgw import Objective, Settings

    return not isinstance(training.problem(Settings(**settings["ohgw"])), Objective)


def better(score: float, best: float | None, mode: str) -> bool:
    """Whether ``score`` is the first or beats ``best``."""
    return best is None or (score > best if mode == "max" else score < best)


def wanted(settings: Mapping[str, Any], improved: bool, at_milestone: bool) -> bool:
    """Whether to save the model now: ``best`` at every improvement of the trial, ``all`` at its milestones."""
    if not settings.get("model_dir"):
        return False
    return improved if settings.get("save_model") == "best" else at_milestone


def moved(x: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What to train with: x' if ``x`` is what was warm-started, else ``x``: it is x' already, or the scheduler has
    changed the configuration since (as population-based training does)."""
    return dict(record["x_prime"]) if record is not None and record["x"] == dict(x) else dict(x)


def save_model(
    folder: Path, trial_id: int, config: Mapping[str, Any], training: Run, report: Mapping[str, Any]
) -> None:
    """Write ``<trial>-<epoch>.pt`` (weights, configuration, scores) atomically. Read it with
    ``torch.load(path, weights_only=True)``."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {key: report[key] for key in ("epoch", "validation_score", "test_score")}
    path = folder / f"{trial_id}-{report['epoch']}.pt"
    temporary = path.with_suffix(".tmp")
    torch.save({"config": dict(config), **scores, "run": training.state_dict()}, temporary)
    os.replace(temporary, path)


def drop_older_models(folder: Path, trial_id: int, epoch: int) -> None:
    """Delete all models of the trial but that of ``epoch``."""
    for file in folder.glob(f"{trial_id}-*.pt"):
        if file.stem != f"{trial_id}-{epoch}":
            file.unlink()


class Clock:
    """Charges every second since ``started`` to a kind, waiting for the device first."""

    def __init__(self, device: str, started: float):
        self._cuda, self._last = device.startswith("cuda"), started
        self.seconds: dict[str, float] = {}
        self.take()

    @contextlib.contextmanager
    def charging(self, kind: str) -> Iterator[None]:
        """Charge the block, and what has passed since the last one, to ``kind``, however the block ends."""
        try:
            yield
        finally:
            last = self._last
            self.skip()
            self.seconds[kind] += self._last - last

    def skip(self) -> None:
        """Charge the time since the last call to nothing."""
        if self._cuda:
            torch.cuda.synchronize()
        self._last = time.perf_counter()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Charge what an earlier attempt has spent and not reported."""
        for kind, value in seconds.items():
            self.seconds[kind] += value

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last ``take``."""
        taken, kinds = self.seconds, ("startup", "warm_start", "train", "validate", "test", "checkpoint")
        self.seconds = dict.fromkeys(kinds, 0.0)
        return taken


class PeakMemory:
    """Peak memory of a phase in bytes: what the CUDA allocator gave out, or else the process's resident set (Linux),
    which includes the interpreter and whatever the allocator has kept; 0 where the system does not tell."""

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")

    def reset(self) -> None:
        """Begin a phase. If the kernel does not let the process reset its high-water mark, peaks include the past."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return 0
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0
