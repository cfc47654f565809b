"""Cost of one warm start, in training steps of the same batch size and as peak memory over a training step's.

    python scripts/bench_warm_start.py                       # CIFAR-10 ResNet-20 on random images, batch 128
    python scripts/bench_warm_start.py --data-dir DIR        # on the real ones
    python scripts/bench_warm_start.py --task digits --model cnn --batch-size 32

A training step is one batch drawn, augmented, forward, backward and an SGD update, in fp32 as the warm start. Time:
median [min-max] of ``--repeats`` alternating measurements after warm-up, device synchronised. Memory: weights, buffers,
plus the peak of what is allocated beyond them, from the CUDA allocator, or on the CPU from the running sum of the
profiler's allocation records. The share of an epoch is in time, against steps per epoch x the median step.
"""

import argparse
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from harness.ohgw import Problem, Settings, count_flops, peak_memory, warm_start
from harness.space import Space
from harness.tasks import load_task

CONFIG = {"lr": 0.1, "wd": 5e-4, "momentum": 0.9, "augmentation": 0.5, "label_smoothing": 0.1}
GROUPS: dict[str, tuple[str, tuple[str, ...], int, float, float]] = {
    # name: estimator, mask, divisor of the batch size, limits: steps and memory
    "direct": ("direct", (), 1, 2.0, 1.1),
    "lookahead: lr, wd, momentum, label smoothing": ("lookahead", ("augmentation",), 1, 5.0, 1.1),
    "lookahead: + augmentation": ("lookahead", (), 1, 10.0, 2.1),
    "lookahead: + augmentation, half the batch": ("lookahead", (), 2, 10.0, 1.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cifar10", choices=["cifar10", "digits"])
    parser.add_argument("--model", default=None, help="default: the task's own")
    parser.add_argument("--data-dir", default=None, help="default for cifar10: random images of the same shape")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        task = load_task(_spec(args, folder), args.device)
    _print_table(task, args)


def _spec(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    file = Path(__file__).parent.parent / "conf" / "task" / f"{args.task}.yaml"
    spec = yaml.safe_load(file.read_text())["task"]
    if args.task == "cifar10" and args.data_dir is None:
        _write_random_cifar(Path(folder))
    changes = {"data_dir": args.data_dir or folder, "batch_size": args.batch_size, "precision": "fp32"}
    return {**spec, **changes, **({"model": args.model} if args.model else {})}


def _write_random_cifar(folder: Path) -> None:
    """Random images in the files and shapes of CIFAR-10's python version."""
    (folder / "cifar-10-batches-py").mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (10_000, 3 * 32 * 32), dtype=np.uint8)
        labels = (np.arange(10_000) % 10).tolist()
        with open(folder / "cifar-10-batches-py" / name, "wb") as out:
            pickle.dump({"data": data, "labels": labels}, out)


def _print_table(task: Any, args: argparse.Namespace) -> None:
    device, n = torch.device(args.device), args.batch_size
    run = task.start(CONFIG, 0)
    resident = sum(t.nbytes for t in [*run.net.parameters(), *run.net.buffers()])
    problem = run.problem(Settings(batch_size=n))
    train = training_step(problem)
    step_memory, step_flops = resident + peak_memory(train, device), count_flops(train)
    steps = len(task.parts["train"]) // n
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{args.task} {task.model}, batch {n}, fp32, {where}, torch {torch.__version__}, n = {args.repeats} each")
    for name, (estimator, mask, divisor, most_steps, most_memory) in GROUPS.items():
        settings = Settings(estimator=estimator, mask=mask, batch_size=n // divisor)  # type: ignore[arg-type]
        start = one_warm_start(run.problem(settings), task.space, settings)
        times = [[_seconds(fn, device) for fn in (train, start)] for _ in range(args.repeats + 2)][2:]  # 2 warm up
        ratios = [b / a for a, b in times]
        step, warm = statistics.median(a for a, _ in times), statistics.median(b for _, b in times)
        memory = (resident + peak_memory(start, device)) / step_memory
        print(f"{name}")
        print(
            f"  {statistics.median(ratios):5.2f} [{min(ratios):.2f}-{max(ratios):.2f}] steps (limit {most_steps:g})"
            f"   {memory:.2f} x memory (limit {most_memory:g})   {count_flops(start) / step_flops:.2f} x FLOPs"
            f"   {100 * warm / (steps * step):.2f} % of an epoch of {steps} steps   {1e3 * warm:.1f} ms"
        )
    print(f"one training step: {1e3 * step:.1f} ms, {step_memory / 2**20:.1f} MiB, {step_flops / 1e9:.2f} GFLOP")


def training_step(problem: Problem) -> Callable[[], None]:
    """One step of plain PyTorch on the problem's own batch and loss; its weights go back afterwards by a zero step."""
    names = problem.differentiable

    def run() -> None:
        batch, _ = problem.draw(0)
        z = {name: torch.tensor(CONFIG[name], device=problem.device) for name in names}
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
        problem.model.train()
        problem.train_loss(problem.model, batch, z).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def one_warm_start(problem: Problem, space: Space, settings: Settings) -> Callable[[], None]:
    def run() -> None:
        result = warm_start(CONFIG, space, problem, settings)
        if result.fallback:
            raise RuntimeError(f"not what was to be measured: {result.fallback}")

    return run


def _seconds(fn: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
