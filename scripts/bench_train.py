"""Images a second of the CIFAR-10 ResNet-20 training loop, against the usual one and against computation alone.

    uv run python scripts/bench_train.py --data-dir ~/data            # all CPUs of this process
    OMP_NUM_THREADS=1 uv run python scripts/bench_train.py --data-dir ~/data --loader-workers 0

usual    torchvision's CIFAR10, RandomCrop(32, 4), RandomHorizontalFlip, ToTensor, Normalize, DataLoader, torch's SGD
ours     harness.tasks.vision: crop and flip as above; on top rotation, scaling, translation, contrast and brightness
compute  the steps of ours on one batch that stays where it is

All arms share the process, its CPUs and threads, the model and the batch size; they take turns, each beginning with
untimed steps (the DataLoader's queue is then in balance). Printed: images a second, median [least, most] of the
repeats, and the same of the ratios within a repeat.
"""

import argparse
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from harness.tasks import load_task, models
from harness.tasks.supervised import SupervisedRun
from harness.tasks.vision import ImageTask

CONFIG = {"lr": 0.1, "momentum": 0.9, "wd": 1e-4, "augmentation": 0.5, "label_smoothing": 0.1}
TASK = Path(__file__).parents[1] / "conf" / "task" / "cifar10.yaml"
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


def on_one_batch(task: ImageTask) -> SupervisedRun:
    """A run whose every batch is the same tensor."""
    task = copy.copy(task)
    batch = next(task.batches(task.completed(CONFIG), 0, 0))
    task.batches = lambda *_: itertools.repeat(batch)  # type: ignore[method-assign]
    return task.start(CONFIG, 0)


def usual(data_dir: str, batch_size: int, loader_workers: int, device: torch.device) -> Callable[[Timer], None]:
    """The loop of most CIFAR-10 repositories."""
    from torchvision import datasets, transforms

    recipe = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ])  # fmt: skip
    data = datasets.CIFAR10(data_dir, train=True, transform=recipe)
    kept: Any = {"persistent_workers": loader_workers > 0, "pin_memory": device.type == "cuda"}
    loader: Any = torch.utils.data.DataLoader(
        data, batch_size, shuffle=True, drop_last=True, num_workers=loader_workers, **kept
    )
    net = models.build("resnet20", 3, 32, 10).to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=CONFIG["lr"], momentum=CONFIG["momentum"], weight_decay=CONFIG["wd"]
    )

    def epochs() -> Iterator[Any]:
        while True:
            yield from loader

    batches = epochs()

    def train(finished: Timer) -> None:
        net.train()
        while not finished():
            images, labels = next(batches)
            loss = F.cross_entropy(net(images.to(device)), labels.to(device), label_smoothing=CONFIG["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def arms(options: argparse.Namespace, spec: dict[str, Any], device: torch.device) -> dict[str, Callable[[Timer], Any]]:
    found: dict[str, Callable[[Timer], Any]] = {
        "usual fp32": usual(options.data_dir, spec["batch_size"], options.loader_workers, device)
    }
    task = load_task(spec, str(device))
    assert isinstance(task, ImageTask)
    fast = task.autocast
    for name, dtype in {"fp32": None, str(fast).removeprefix("torch."): fast}.items():
        if name == "None":
            continue
        for kind, run in {"ours": task.start(CONFIG, 0), "compute": on_one_batch(task)}.items():
            found[f"{kind} {name}"] = with_precision(run, dtype)
    return found


def with_precision(run: SupervisedRun, dtype: torch.dtype | None) -> Callable[[Timer], Any]:
    def train(finished: Timer) -> None:
        run.task.autocast = dtype
        run.train_epoch(finished)

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with cifar-10-batches-py")
    parser.add_argument(
        "--steps", type=int, default=20, help="timed steps of an arm and repeat; a multiple of 10 (default 20)"
    )
    parser.add_argument("--untimed", type=int, default=10, help="steps before them (default 10)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--loader-workers", type=int, default=2, help="DataLoader processes of the usual loop (default 2)"
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.data_dir = os.path.expanduser(options.data_dir)
    device = torch.device(options.device)
    spec = yaml.safe_load(TASK.read_text())["task"] | {"data_dir": options.data_dir}

    runs = arms(options, spec, device)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, train in runs.items():
            watch = Stopwatch(options.untimed, options.steps, device)
            train(watch)
            speeds[name].append(options.steps * spec["batch_size"] / watch.seconds)

    print(f"ResNet-20, batch {spec['batch_size']}, {options.device}, torch {torch.__version__}")
    cpus, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    print(f"{cpus} CPUs, {threads} threads, {options.loader_workers} loader workers")
    print(f"n = {options.repeats} repeats of {options.steps} steps; images a second")
    for name, values in speeds.items():
        print(f"{name:14s} {statistics.median(values):8.0f}   [{min(values):.0f}, {max(values):.0f}]")
    for upper, lower in itertools.product(speeds, speeds):
        kind, _, precision = upper.partition(" ")
        if kind == "ours" and lower in ("usual fp32", f"compute {precision}"):
            ratios = [a / b for a, b in zip(speeds[upper], speeds[lower], strict=True)]
            print(f"{upper} / {lower}: {statistics.median(ratios):.2f}x   [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
