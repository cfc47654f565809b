"""Cells per minute in virtual time: this harness and Syne Tune's own tabular simulator, side by side on one table.

    python scripts/bench_simulator.py --cells 20 --workers 4

A cell of random search runs once for real and fills a curve store with whole curves. Then each side runs an ASHA cell
in turn, with the same scheduler class, configurations, curves and durations: ``SimulatedBackend`` from the store, with
everything a cell records on disk, and Syne Tune's ``UserBlackboxBackend`` from the same curves as a
``BlackboxTabular`` in memory, with its results file and without its dump of the tuner. Both are timed from the
construction of the scheduler to the end of the cell. Order and times need not agree: Syne Tune's simulator adds delays
(0.05 s each).
"""

import argparse
import contextlib
import io
import itertools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backends.curve_store import CurveStore
from backends.gpus import default_n_workers
from backends.pool import WorkerPool
from harness.experiment import MAX_RESOURCE, METRIC, PREPARE_FUNCTION, RESOURCE, Shared, run_cell, trial_settings
from harness.provenance import provenance
from harness.record import CellPaths, read_events
from harness.schedulers import ASHA, CandidateSampler
from harness.space import Space
from harness.sweep import Cell, make_plan

TIME = "elapsed_time"
MAX_T = 27


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20, help="cells on each side (default 20)")
    parser.add_argument("--workers", type=int, default=4, help="virtual workers (default 4)")
    parser.add_argument("--epochs", type=int, default=110, help="budget of a cell (default 110)")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Path(folder), options)
        ours.fill()
        peer = Peer(Path(folder), ours.curves(), options)
        seconds: dict[str, list[float]] = {"this harness": [], "Syne Tune's simulator": []}
        for number in range(options.cells + 1):  # the first of each warms up
            for name, value in zip(seconds, (ours.run(f"cell{number}"), peer.run(f"peer{number}")), strict=True):
                if number:
                    seconds[name].append(value)
    print(f"ASHA on digits, {options.workers} virtual workers, {options.epochs} epochs a cell, "
          f"n = {options.cells} cells each, in turn; {os.cpu_count()} cores")  # fmt: skip
    for name, values in seconds.items():
        low, median, high = (f"{60 / value:.0f}" for value in (max(values), statistics.median(values), min(values)))
        print(f"  {name:<24}{median} cells a minute (median; slowest cell {low}, fastest {high})")
    ratios = [theirs / mine for mine, theirs in zip(*seconds.values(), strict=True)]
    print(f"  ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")


class Ours:
    """The cell in this harness."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        words = ["ohgw=off", "backend=simulated", f"n_workers={options.workers}", f"results_dir={folder}"]
        words.append(f"task.max_epochs={MAX_T}")
        trials = options.epochs // 2 + options.workers  # more than either order can start: a third of them is promoted
        whole = ["scheduler=random", "budget.epochs=null", f"budget.trials={trials}"]
        self.cell = make_plan([*words, "scheduler=asha", f"budget.epochs={options.epochs}"]).cells[0]
        self.filler = make_plan([*words, *whole]).cells[0]
        self.folder, self.meta = folder, provenance([], [])
        self.store = CurveStore(self.cell.config["backend"]["store"])

    def run(self, name: str) -> float:
        """Seconds of one cell."""
        begun = time.perf_counter()
        self._run(self.cell, name)
        return time.perf_counter() - begun

    def fill(self) -> None:
        """Train every configuration that the cells may start, to the end: Syne Tune's order promotes other trials."""
        self._run(self.filler, "filler")

    def _run(self, cell: Cell, name: str) -> None:
        with contextlib.ExitStack() as stack:
            shared = Shared(lambda: stack.enter_context(self._pool()), self.store)
            run_cell(cell, CellPaths(self.folder, name, cell.folder), shared, self.meta)

    def _pool(self) -> WorkerPool:
        pool = WorkerPool(default_n_workers(), threads=1)
        pool.prepare(PREPARE_FUNCTION, trial_settings(self.cell))
        return pool

    def curves(self) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(configuration, reports) of the filler's trials, in the order they were started."""
        events, problems = read_events(CellPaths(self.folder, "filler", self.filler.folder).events)
        assert not problems
        by_config = {str(sorted(key["config"].items())): rows for key, _, rows in self.store.export()}
        found = []
        for event in events:
            if event["e"] == "start":
                config = {name: value for name, value in event["config"].items() if name != MAX_RESOURCE}
                rows = by_config[str(sorted(config.items()))]
                found.append((config, [row.report for row in rows if row.report is not None]))
        return found


class Peer:
    """The same cell in Syne Tune's simulator."""

    def __init__(self, folder: Path, curves: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]], options: Any):
        from syne_tune.blackbox_repository.blackbox_tabular import BlackboxTabular
        from syne_tune.config_space import randint

        self.folder, self.options = folder, options
        self.configs = [config for config, _ in curves]
        task = make_plan([]).cells[0].config["task"]
        self.space = Space.from_spec(task["spaces"][task["space"]])
        table = np.full((len(curves), 1, MAX_T, 2), np.nan)
        for values, (_, reports) in zip(table[:, 0], curves, strict=True):
            seconds = itertools.accumulate(sum(report["busy"].values()) for report in reports)
            values[: len(reports)] = [(r[METRIC], t) for r, t in zip(reports, seconds, strict=True)]
        self.blackbox = BlackboxTabular(
            hyperparameters=pd.DataFrame(self.configs)[list(self.space)],
            configuration_space={k: v for k, v in self.space.config_space().items() if k in self.space.domains},
            fidelity_space={RESOURCE: randint(1, MAX_T)}, objectives_evaluations=table, objectives_names=[METRIC, TIME],
        )  # fmt: skip

    def run(self, name: str) -> float:
        """Seconds of one cell."""
        from syne_tune import StoppingCriterion, Tuner
        from syne_tune.backend.simulator_backend.simulator_callback import SimulatorCallback
        from syne_tune.blackbox_repository.simulated_tabular_backend import UserBlackboxBackend

        begun = time.perf_counter()
        scheduler = ASHA(
            {**self.space.config_space(), MAX_RESOURCE: MAX_T}, METRIC, mode="max", max_t=MAX_T, resource_attr=RESOURCE,
            max_resource_attr=MAX_RESOURCE, searcher=InOrder(self.configs),
        )  # fmt: skip
        tuner = Tuner(
            trial_backend=UserBlackboxBackend(self.blackbox, TIME, max_resource_attr=MAX_RESOURCE, seed=0),
            scheduler=scheduler,
            stop_criterion=StoppingCriterion(max_num_evaluations=self.options.epochs),
            n_workers=self.options.workers, sleep_time=0, print_update_interval=1e9, callbacks=[SimulatorCallback()],
            save_tuner=False, suffix_tuner_name=False, tuner_name=name,
        )  # fmt: skip
        tuner.tuner_path = self.folder / name
        with contextlib.redirect_stdout(io.StringIO()):
            tuner.run()
        return time.perf_counter() - begun


class InOrder(CandidateSampler):
    """The configurations of the recorded cell, in its order."""

    def __init__(self, configs: Sequence[dict[str, Any]]):
        super().__init__(configs)
        self._order = iter(range(len(configs)))

    def suggest(self) -> dict[str, Any]:
        """The next one. Errors: RuntimeError after the last one: without any to start the simulator would wait for
        ever."""
        config = super().suggest()
        if config is None:
            raise RuntimeError(f"the cell needs more than the {len(self.candidates)} configurations that were trained")
        return config


if __name__ == "__main__":
    main()
