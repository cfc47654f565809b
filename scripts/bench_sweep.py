"""The same ASHA-on-digits cell on Syne Tune's LocalBackend and on the pool, against the floor of pure training.

    python scripts/bench_sweep.py --trials 40 --workers 2 --repeats 3

Each cell is timed from the moment its workers are ready (LocalBackend has none: from the Tuner's start) to the end of
its last trial; the pool's start-up is printed apart. The floor is the busy time of the same run / workers: what the
cell would take if workers did nothing but train, or (second floor) train, validate and test, without a gap.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from backends.pool import WorkerPool
from harness.experiment import PREPARE_FUNCTION, Shared, run_cell, trial_settings
from harness.provenance import provenance
from harness.record import CellPaths
from harness.sweep import Cell, make_plan

TRAINING = ("train",)
TRIAL_WORK = ("train", "validate", "test", "warm_start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40, help="configurations a cell")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="cells a backend, with seeds 0, 1, ...")
    parser.add_argument("--skip-local", action="store_true", help="the pool only")
    options = parser.parse_args()

    begun = time.perf_counter()
    with WorkerPool(options.workers) as pool:
        pool.wait_ready()
        ready = time.perf_counter() - begun
        pool.prepare(PREPARE_FUNCTION, trial_settings(_cell("pool", 0, options)))
        print(f"pool start-up: {ready:.2f} s until {options.workers} workers are ready, "
              f"{time.perf_counter() - begun - ready:.2f} s for the data")  # fmt: skip
        rows: dict[str, list[dict[str, float]]] = {"pool": [], "local": []}
        for seed in range(options.repeats):
            rows["pool"].append(_measure(_cell("pool", seed, options), Shared(lambda: pool), options.workers))
            if not options.skip_local:
                rows["local"].append(_measure(_cell("local", seed, options), Shared(lambda: pool), options.workers))
    for backend, measured in rows.items():
        if measured:
            _print(backend, measured)
    if not options.skip_local:
        ratios = [a["wall"] / b["wall"] for a, b in zip(rows["local"], rows["pool"], strict=True)]
        print(f"LocalBackend / pool: {_spread(ratios)}")


def _cell(backend: str, seed: int, options: argparse.Namespace) -> Cell:
    words = ["scheduler=asha", "ohgw=off", "task=digits", f"backend={backend}", f"seed={seed}", "budget.epochs=null"]
    return make_plan([*words, f"budget.trials={options.trials}", f"n_workers={options.workers}"]).cells[0]


def _measure(cell: Cell, shared: Shared, workers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        paths = CellPaths(Path(folder), "bench", cell.folder)
        summary: dict[str, Any] = run_cell(cell, paths, shared, provenance([], []))
    busy = summary["busy"]
    floor = sum(busy[kind] for kind in TRAINING) / workers
    work = sum(busy[kind] for kind in TRIAL_WORK) / workers
    wall = summary["wallclock"]
    return {"wall": wall, "floor": floor, "over": wall / floor, "over work": wall / work, "epochs": summary["epochs"]}


def _print(backend: str, rows: list[dict[str, float]]) -> None:
    print(f"{backend}: n = {len(rows)} cells, median [min, max]")
    names = {
        "wall": "seconds a cell",
        "epochs": "epochs a cell",
        "floor": "pure training / workers",
        "over": "over pure training",
        "over work": "over training + evaluation",
    }
    for key, name in names.items():
        print(f"  {name + ':':<28}{_spread([row[key] for row in rows])}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
