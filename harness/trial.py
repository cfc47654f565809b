"""One trial: warm start, then epochs until the milestone. ``harness.trial.run`` is every experiment's trial function.

Busy seconds are charged by kind as they are spent: start-up, warm start, train, validate, test, checkpoint. A
checkpoint is written before the report of its epoch and holds that report, which the next attempt sends again in case
the driver never got it. x' and its record are in the trial's first checkpoint, before epoch 1: a trial is warm-started
once.

``ctx.settings``: ``task`` (the YAML's entry), ``ohgw`` (fields of ``harness.ohgw.Settings``; estimator "off": none),
``max_resource_attr`` (the configuration's key for the milestone), ``checkpoint_seconds`` (between checkpoints, besides
those at milestones) and ``model_dir`` (folder for models; absent or null: none are kept). A model is
``<model_dir>/<trial>.pt``, the weights at the trial's last milestone; the driver deletes those it does not want when
the cell ends.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from backends.context import TrialContext, TrialFailed
from harness.seeds import rng
from harness.tasks import Run, Task, load_task

CHECKPOINT_SECONDS = 5.0  # lost at most when a worker dies; a checkpoint takes milliseconds
SAMPLE = 4  # images on which a warm start's FLOPs are counted
NOTHING: dict[str, Any] = {
    "run": None,
    "warm_start": None,
    "report": None,
    "busy": {},
}  # the state of a trial that has not begun

_flops_per_example: dict[
    tuple[str, str], float
] = {}  # of a warm start, by task and variant, and the estimator it came to use


def prepare(settings: Mapping[str, Any], device: str) -> None:
    """Make the task's data resident; called once in every worker, before its first trial. Errors: UserError."""
    load_task(settings["task"], device)


def run(ctx: TrialContext) -> None:
    """Train ``ctx.config`` to its milestone or until told to stop. Errors: TrialFailed if a loss is not finite."""
    clock = Clock(ctx.device, ctx.started)
    try:
        train(ctx, clock)
    except Exception as error:  # what the trial spent is charged to it all the same
        error.details = {"busy": clock.take()}  # type: ignore[attr-defined]
        raise


def train(ctx: TrialContext, clock: "Clock") -> None:
    """``run``, with the seconds that are not reported yet on ``clock``."""
    settings, memory = ctx.settings, PeakMemory(ctx.device)
    task = load_task(settings["task"], ctx.device)
    milestone = min(int(ctx.config.get(settings["max_resource_attr"], task.max_epochs)), task.max_epochs)
    x = {name: value for name, value in ctx.config.items() if name != settings["max_resource_attr"]}

    state = ctx.load() or NOTHING
    record = state["warm_start"]
    training = task.start(moved(x, record), ctx.seed)
    if state["run"] is not None:
        training.load_state_dict(state["run"])
    if state["report"] is not None:
        ctx.report(**state["report"])
    clock.charge("startup")
    clock.add(state["busy"])

    if training.epoch == 0 and record is None and settings["ohgw"]["estimator"] != "off":
        record = warm_start(x, task, training, ctx, clock, memory)
        training.reconfigure(record["x_prime"])
        ctx.save({**NOTHING, "warm_start": record, "busy": dict(clock.seconds)})
        clock.charge("checkpoint")

    memory.reset()
    saved_at = time.perf_counter()
    while training.epoch < milestone:
        report = one_epoch(ctx, training, clock)
        if report is None:
            return
        report["peak_memory"] = memory.peak()
        if training.epoch == 1 and record is not None:
            report["warm_start"] = record
            report["flops"]["warm_start"] = record["flops"]
        at_milestone = training.epoch == milestone
        if at_milestone or time.perf_counter() - saved_at >= settings.get("checkpoint_seconds", CHECKPOINT_SECONDS):
            resent = {**report, "busy": dict(clock.seconds)}
            ctx.save({**NOTHING, "run": training.state_dict(), "warm_start": record, "report": resent})
            saved_at = time.perf_counter()
        if at_milestone and settings.get("model_dir"):
            save_model(Path(settings["model_dir"]) / f"{ctx.trial_id}.pt", moved(x, record), training, report)
        clock.charge("checkpoint")
        ctx.report(**report, busy=clock.take())


def one_epoch(ctx: TrialContext, training: Run, clock: "Clock") -> dict[str, Any] | None:
    """Train, validate, test; the epoch's report without its times, None if the trial was told to stop meanwhile."""
    trained = training.train_epoch(ctx.should_stop)
    clock.charge("train")
    if trained is None:
        return None
    validation = training.evaluate("validation")
    clock.charge("validate")
    if not math.isfinite(validation["loss"]):
        raise TrialFailed(f"validation loss is {validation['loss']} in epoch {training.epoch}")
    test = training.evaluate("test")
    clock.charge("test")
    return {
        "epoch": training.epoch,
        "train_loss": trained["train_loss"],
        "train_score": trained["train_score"],
        "validation_loss": validation["loss"],
        "validation_score": validation["score"],
        "test_score": test["score"],
        "flops": {"train": trained["flops"]},
    }


def warm_start(
    x: Mapping[str, Any], task: Task, training: Run, ctx: TrialContext, clock: "Clock", memory: "PeakMemory"
) -> dict[str, Any]:
    """The record of a warm start of ``x`` at the initial weights of ``training``; ``x_prime`` is what to train with.

    FLOPs are counted off the clock (the count belongs to the study, not to the method), once in a process for each
    variant, on a few examples: those of convolutions and matrix products are proportional to the batch size.
    """
    from harness.ohgw import Settings, warm_start  # 0.8 s that a vanilla trial need not wait for

    options = Settings(**ctx.settings["ohgw"])

    def once(options: Settings) -> Any:
        problem = training.problem(options)
        if problem is None:
            raise TrialFailed("this task has no hyper-gradient: it can only be run with ohgw=off")
        return warm_start(x, task.space, problem, options, rng(ctx.seed, "warm_start", "direction"))

    clock.charge("startup")
    memory.reset()
    result = once(options)
    peak = memory.peak()
    clock.charge("warm_start")
    key = (json.dumps([ctx.settings["task"], ctx.settings["ohgw"]], sort_keys=True), result.estimator)
    if key not in _flops_per_example:
        from harness.ohgw import count_flops

        sample = dataclasses.replace(options, batch_size=SAMPLE)
        _flops_per_example[key] = count_flops(lambda: once(sample)) / SAMPLE
    flops = round(_flops_per_example[key] * options.batch_size)
    clock.skip()
    return dataclasses.replace(result, flops=flops, peak_memory=peak).record()


def moved(x: Mapping[str, Any], record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What to train with: x' if ``x`` is what was warm-started, else ``x``: it is x' already, or the scheduler has
    changed the configuration since (as population-based training does)."""
    return dict(record["x_prime"]) if record is not None and record["x"] == dict(x) else dict(x)


def save_model(path: Path, config: Mapping[str, Any], training: Run, report: Mapping[str, Any]) -> None:
    """Write weights, configuration and scores atomically; read them with ``torch.load(path, weights_only=True)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {key: report[key] for key in ("epoch", "validation_score", "test_score")}
    temporary = path.with_suffix(".tmp")
    torch.save({"config": dict(config), **scores, "run": training.state_dict()}, temporary)
    os.replace(temporary, path)


class Clock:
    """Charges every second since ``started`` to a kind, waiting for the device first."""

    def __init__(self, device: str, started: float):
        self._cuda, self._last = device.startswith("cuda"), started
        self.seconds: dict[str, float] = {}
        self.take()

    def charge(self, kind: str) -> None:
        """Charge the time since the last call to ``kind``."""
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
