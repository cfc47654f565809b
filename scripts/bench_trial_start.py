"""Seconds from a suggestion to the trial's first training step: Syne Tune's LocalBackend against warm pool workers.

    python scripts/bench_trial_start.py [--trials 10] [--workers 2] [--json]

Both train the same small network on UCI digits. LocalBackend runs a training script in Syne Tune's own style (argparse,
import torch, load the data, build the model, Reporter); the pool runs a trial function whose data stay in the worker.
The clock starts before ``start_trial`` and stops at the time stamp the trial takes after its first optimiser step, its
first report. Trials of both kinds alternate in one run, one at a time on an otherwise idle machine. The pool's own
start-up is paid once, before the first trial, and printed apart.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TRAINING_SCRIPT = """
import argparse
import time

import torch
from sklearn.datasets import load_digits
from syne_tune import Reporter

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    parser.add_argument("--st_checkpoint_dir", type=str)
    arguments = parser.parse_args()
    report = Reporter()
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=arguments.lr, momentum=0.9)
    torch.nn.functional.cross_entropy(net(x[:32]), y[:32]).backward()
    optimizer.step()
    report(stepped=time.time())
"""

_data: list[Any] = []


def prepare(settings: dict[str, Any], device: str) -> None:
    """Load the data into this worker, once, and let torch do its first backward pass."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    _data[:] = [torch.tensor(images, dtype=torch.float32, device=device) / 16, torch.tensor(labels, device=device)]
    _first_step(settings["lr"], device)


def train(ctx: Any) -> None:
    """The trial function: build the model, one step, report when it was done."""
    _first_step(ctx.config["lr"], ctx.device)
    ctx.report(stepped=time.time())


def _first_step(lr: float, device: str) -> None:
    import torch

    x, y = _data
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    torch.nn.functional.cross_entropy(net(x[:32]), y[:32]).backward()
    optimizer.step()


def one_trial(backend: Any, config: dict[str, Any]) -> float:
    """Start a trial as the Tuner does and follow it to its end; seconds to its first step."""
    suggested = time.time()
    trial_id = backend.start_trial(config).trial_id
    stepped = None
    while True:
        statuses, results = backend.fetch_status_results([trial_id])
        for _, result in results:
            stepped = result["stepped"]
        if statuses[trial_id][1] != "InProgress":
            break
        time.sleep(0.001)
    if stepped is None:
        raise SystemExit(f"trial {trial_id} ended as {statuses[trial_id][1]}:\n{''.join(backend.stderr(trial_id))}")
    return stepped - suggested


def measure(trials: int, workers: int) -> dict[str, Any]:
    """Alternate trials on both backends; all figures in seconds."""
    from backends.function_backend import LocalBackend
    from backends.gpus import visible_gpus
    from backends.pool import PoolBackend, WorkerPool

    with tempfile.TemporaryDirectory() as folder, WorkerPool(workers) as pool:
        started = time.perf_counter()
        pool.wait_ready()
        pool.prepare("bench_trial_start.prepare", {"lr": 0.1})
        startup = time.perf_counter() - started
        script = Path(folder) / "training_script.py"
        script.write_text(TRAINING_SCRIPT)
        local = LocalBackend(entry_point=str(script), rotate_gpus=bool(visible_gpus()))
        local.set_path(f"{folder}/local")
        warm = PoolBackend("bench_trial_start.train", pool=pool, path=f"{folder}/pool")
        seconds: dict[str, list[float]] = {"local": [], "pool": []}
        for k in range(trials):
            config = {"lr": 0.01 * (k + 1)}
            seconds["local"].append(one_trial(local, config))
            seconds["pool"].append(one_trial(warm, config))
    return {"n": trials, "workers": workers, "pool_startup": startup, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="trials on each backend (default 10)")
    parser.add_argument("--workers", type=int, default=2, help="workers of the pool (default 2)")
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON")
    arguments = parser.parse_args()
    figures = measure(arguments.trials, arguments.workers)
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"seconds from suggestion to first training step, n = {figures['n']} trials each, alternating")
    for name in ("local", "pool"):
        values = sorted(figures[name])
        print(f"  {name:5}  median {statistics.median(values):9.5f}   min {values[0]:9.5f}   max {values[-1]:9.5f}")
    ratio = statistics.median(figures["local"]) / statistics.median(figures["pool"])
    print(f"  local / pool = {ratio:.0f}x")
    print(
        f"apart: start-up of the pool, once: {figures['pool_startup']:.1f} s for {figures['workers']} workers and data"
    )


if __name__ == "__main__":
    main()
