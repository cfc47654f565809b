"""What a task's training loop does in a second, against the loop people would write and against computation alone.

    uv run python scripts/bench_train.py task=cifar10 task.data_dir=~/data     # any task, and overrides of the harness
    OMP_NUM_THREADS=1 uv run python scripts/bench_train.py task=digits --loader-workers 0

usual    the loop that people write for such a task (scripts/plain_loops/), with torch's or the field's own tools
ours     the task's own loop, as trials run it
compute  the steps of ours on one batch that stays where it is (tasks of mini-batches)

All arms share the process, its CPUs and threads, the model, the batch size and the configuration, which is the middle
of the search space; they take turns, each beginning with untimed steps (the DataLoader's queue is then in balance).
Printed: units a second, median [least, most] of the repeats, and the same of the ratios within a repeat.
"""

import argparse
import copy
import importlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from backends.context import UserError
from harness.space import Categorical, Float, Space
from harness.sweep import check_data, make_plan
from harness.tasks import load_task
from harness.tasks.supervised import SupervisedTask

Timer = Callable[[], bool]  # called before every step; true when the last timed step is done


class Stopwatch:
    """Seconds of ``steps`` steps after ``untimed`` ones, for a loop that asks it before every step whether to stop."""

    def __init__(self, untimed: int, steps: int, device: torch.device):
        self.untimed, self.steps, self.device = untimed, steps, device
        self.calls, self.started, self.seconds = 0, 0.0, 0.0

    def __call__(self) -> bool:
        now = self._now() if self.calls in (self.untimed, self.untimed + self.steps) else 0.0
        if self.calls == self.untimed:
            self.started = now
        self.calls += 1
        if self.calls <= self.untimed + self.steps:
            return False
        self.seconds = now - self.started
        return True

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def middle(space: Space) -> dict[str, Any]:
    """The configuration in the middle of ``space``; of categoricals, the first choice."""

    def value(domain: Any) -> Any:
        if isinstance(domain, Categorical):
            return domain.choices[0]
        if isinstance(domain, Float):
            return domain.from_unit(0.5)
        return round((domain.lower * domain.upper) ** 0.5 if domain.log else (domain.lower + domain.upper) / 2)

    return {**{name: value(domain) for name, domain in space.domains.items()}, **space.constants}


def arms(
    spec: Mapping[str, Any], config: dict[str, Any], device: torch.device, loader_workers: int
) -> dict[str, Callable[[Timer], Any]]:
    """The loops by name. ``usual`` runs in fp32; ours also in the precision that the task would choose."""
    plain = plain_loops(spec)
    found = {"usual fp32": plain.plain_loop(spec, config, device, loader_workers)}
    task: Any = load_task(spec, str(device))
    if not isinstance(task, SupervisedTask):
        return found | {"ours fp32": lambda timer: train(task, config, timer)}
    for dtype in dict.fromkeys([None, task.autocast]):
        name = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
        for kind, chosen in {"ours": task, "compute": on_one_batch(task, config)}.items():
            chosen = copy.copy(chosen)
            chosen.autocast = dtype
            found[f"{kind} {name}"] = lambda timer, chosen=chosen: train(chosen, config, timer)
    return found


def plain_loops(spec: Mapping[str, Any]) -> Any:
    """The module of the family's usual loop."""
    return importlib.import_module(f"scripts.plain_loops.{spec['_target_'].split('.')[-2]}")


def train(task: Any, config: Mapping[str, Any], timer: Timer) -> None:
    """Epochs of a new run until the time is taken."""
    run = task.start(config, 0)
    while run.train_epoch(timer) is not None:
        pass


def on_one_batch(task: SupervisedTask, config: Mapping[str, Any]) -> SupervisedTask:
    """The task with one batch for ever."""
    task = copy.copy(task)
    batch = next(task.batches(task.completed(config), 0, 0))
    task.batches = lambda *_: itertools.repeat(batch)  # type: ignore[method-assign]
    return task


def bench(words: Sequence[str], options: argparse.Namespace) -> None:
    """Errors: UserError."""
    plan = make_plan([*words, "ohgw=off"])
    check_data(plan)
    specs = {str(cell.config["task"]): cell.config["task"] for cell in plan.cells}
    if len(specs) > 1:
        raise UserError("one task at a time: give each key one value")
    spec = next(iter(specs.values()))
    device = torch.device(options.device)
    config = middle(Space.from_spec(spec["spaces"][spec["space"]]))
    runs = arms(spec, config, device, options.loader_workers)
    plain = plain_loops(spec)
    amount = options.steps * plain.units_per_step(spec, config)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, loop in runs.items():
            watch = Stopwatch(options.untimed, options.steps, device)
            loop(watch)
            speeds[name].append(amount / watch.seconds)
    print(f"{plan.cells[0].task}, {spec.get('model', '')}, {options.device}, torch {torch.__version__}")
    cpus, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    print(f"{cpus} CPUs, {threads} threads, {options.loader_workers} loader workers; configuration {config}")
    print(f"n = {options.repeats} repeats of {options.steps} steps; {plain.UNIT} a second")
    for name, values in speeds.items():
        print(f"{name:18s} {statistics.median(values):10.4g}   [{min(values):.4g}, {max(values):.4g}]")
    for upper, lower in itertools.product(speeds, speeds):
        kind, _, precision = upper.partition(" ")
        if kind == "ours" and lower in ("usual fp32", f"compute {precision}"):
            ratios = [a / b for a, b in zip(speeds[upper], speeds[lower], strict=True)]
            print(f"{upper} / {lower}: {statistics.median(ratios):.2f}x   [{min(ratios):.2f}, {max(ratios):.2f}]")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] task=NAME [task.key=value ...]",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of an arm and repeat (default 20)")
    parser.add_argument("--untimed", type=int, default=10, help="steps before them (default 10)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--loader-workers", type=int, default=2, help="DataLoader processes of the usual loop (default 2)"
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options, words = parser.parse_known_args()
    for name in ("steps", "repeats"):
        if getattr(options, name) < 1:
            print(f"error: --{name} must be at least 1", file=sys.stderr)
            return 2
    try:
        if stray := [word for word in words if word.startswith("-")]:
            raise UserError(f"{stray[0]} is no option of this script; see --help")
        bench(words, options)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
