"""How long the report takes on a large study: writes made-up cells of the real form, then times loading and reporting.

    python scripts/bench_report.py                      # 2,000 cells x 500 events: 8 schedulers x 5 variants x 50 seeds
    python scripts/bench_report.py --cells 200 --keep DIR

Each part runs as a process of its own, as a user would start it. Printed: seconds of each repeat with median and range,
and the peak memory. ``--keep DIR`` leaves the folder there and uses it again.
"""

import argparse
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import record
from harness.record import CellPaths, EventLog, summarize, trial_rows, write_config, write_json
from harness.seeds import rng
from harness.space import Space
from harness.sweep import Cell, make_plan

SCHEDULERS = "asha,pasha,hyperband,hyperband_bo,bohb,dyhpo,boil,random"
VARIANTS = "off,zero,on,normalized,random"
RUNGS, SHARES = (1, 3, 9, 27), (0.66, 0.22, 0.08, 0.04)  # epochs of a trial, and how many trials get so many

LOAD = """
import sys, time
from harness.report import load_results
begun = time.perf_counter()
results = load_results(sys.argv[1])
seconds = time.perf_counter() - begun
assert len(results.cells), results.corrupt
print(seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000, help="cells of the study (default 2000)")
    parser.add_argument("--events", type=int, default=500, help="events of a cell (default 500)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each part (default 3)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="results_dir to write to and keep (default: temporary)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_study(options.keep or Path(temporary), options.cells, options.events)
        size = sum(file.stat().st_size for file in folder.rglob("*.jsonl"))
        print(f"{options.cells} cells x {options.events} events, {size / 1e6:.0f} MB of records in {folder}")
        load = [float(_run("-c", LOAD, str(folder))[0]) for _ in range(options.repeats)]
        _say("load (inside the process)", load)
        whole = [_run("-m", "harness.report", str(folder))[1] for _ in range(options.repeats)]
        _say("load and report (the whole command)", whole)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak memory of the largest process: {peak:.0f} MB")


def write_study(results_dir: Path, cells: int, events: int) -> Path:
    """``cells`` finished cells with ``events`` events each; returns their folder, made only if it is not there."""
    name = f"synthetic-{cells}x{events}"
    folder = results_dir / name
    if folder.exists():
        return folder
    seeds = max(1, -(-cells // (len(SCHEDULERS.split(",")) * len(VARIANTS.split(",")))))
    plan = make_plan([f"scheduler={SCHEDULERS}", f"ohgw={VARIANTS}", f"seed=0..{seeds - 1}", f"name={name}",
                      f"results_dir={results_dir}", f"budget.epochs={events}"])  # fmt: skip
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(_write_cell, [(cell, events, results_dir, name) for cell in plan.cells[:cells]], chunksize=20)
    return folder


def _write_cell(cell: Cell, count: int, results_dir: Path, name: str) -> None:
    paths = CellPaths(results_dir, name, cell.folder)
    paths.root.mkdir(parents=True)
    write_config(paths, cell.config)
    write_json(paths.meta, {"time": 1.7e9, "commit": "0" * 40, "command": ["harness/__main__.py", *sys.argv[1:2]]})
    events = _events(cell, count)
    with EventLog(paths.events, sync_seconds=1e9) as log:
        for event in events:
            log.append(event)
    with EventLog(paths.trials, sync_seconds=1e9) as log:
        for row in trial_rows(events):
            log.append(row)
    write_json(paths.summary, summarize(cell.config, events))


def _events(cell: Cell, count: int) -> list[dict[str, Any]]:
    """Trials of 1, 3, 9 or 27 epochs, one after the other; warm-started ones are a little better."""
    gen, warm = rng(cell.seed, "synthetic", cell.scheduler, cell.variant), cell.variant != "off"
    shared = rng(cell.seed, "synthetic configurations")  # the same for all variants of a seed
    task = cell.config["task"]
    space = Space.from_spec(task["spaces"][task["space"]])
    events: list[dict[str, Any]] = [{"e": "open", "t": 0.0, "run": 1, "time": 1.7e9, "commit": "0" * 40}]
    now, trial = 0.0, 0
    while len(events) < count - 1:
        x = space.sample(shared)
        events.append({"e": "start", "t": now, "trial": trial, "config": x})
        epochs = int(gen.choice(RUNGS, p=SHARES))
        top = 0.6 + 0.39 * shared.random() ** 0.5 + 0.005 * warm
        for epoch in range(1, min(epochs, count - 1 - len(events)) + 1):
            now += 0.05 * (1 + 0.1 * gen.random())
            score = top * (1 - 0.5 * 0.7**epoch) + 0.01 * gen.normal()
            decision = "PAUSE" if epoch in RUNGS and epoch < epochs else "STOP" if epoch == epochs else "CONTINUE"
            result = _result(epoch, score, gen)
            if warm and epoch == 1:
                result["warm_start"] = _warm_start(x, space, gen)
            events.append({"e": "report", "t": now, "trial": trial, "decision": decision, "result": result})
        trial += 1
    return [*events, {"e": "close", "t": now, "why": "epochs"}]


def _result(epoch: int, score: float, gen: Any) -> dict[str, Any]:
    busy = dict.fromkeys(record.BUSY_KINDS, 0.001) | {"train": 0.05}
    return {"epoch": epoch, "train_loss": 1.2 - score, "train_score": score, "validation_loss": 1.3 - score,
            "validation_score": score, "test_score": score + 0.01 * gen.normal(), "busy": busy,
            "flops": {"train": 10**9}, "peak_memory": 6 * 10**8}  # fmt: skip


def _warm_start(x: dict[str, Any], space: Space, gen: Any) -> dict[str, Any]:
    names = list(space.continuous)
    step = dict(zip(names, 0.1 * gen.normal(size=len(names)) / len(names) ** 0.5, strict=True))
    moved = {name: space.continuous[name].from_unit(min(1.0, max(0.0, space.unit(x)[name] + step[name])))
             for name in names}  # fmt: skip
    return {"requested": "lookahead", "estimator": "lookahead", "fallback": None, "step": "normalized", "n_steps": 1,
            "batch_size": 128, "x": x, "x_prime": x | moved, "gradient": {n: -10 * s for n, s in step.items()},
            "displacement": step, "length": 0.1, "share": {n: 1 / len(names) for n in names}, "loss": 1.0,
            "seconds": 0.01, "flops": 10**8, "peak_memory": 6 * 10**8}  # fmt: skip


def _run(*arguments: str) -> tuple[str, float]:
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout, time.perf_counter() - begun


def _say(what: str, seconds: list[float]) -> None:
    low, median, high = min(seconds), statistics.median(seconds), max(seconds)
    print(f"{what}: median {median:.1f} s [{low:.1f}, {high:.1f}], n = {len(seconds)}")


if __name__ == "__main__":
    main()
