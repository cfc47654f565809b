"""Regret of the schedulers on tables of learning curves, and the time of their decisions.

    python scripts/bench_schedulers.py --data DIR                                # development tables
    python scripts/bench_schedulers.py --data DIR --tables test --record dyhpo_taskset.jsonl
    python scripts/bench_schedulers.py --tables synthetic-1000 --schedulers random,asha,bohb --seeds 0..4
    python scripts/bench_schedulers.py --parts time --schedulers dyhpo,boil

DIR holds taskset.tar.xz, opda.tar.xz (or unpacked: taskset/, opda/) and cnn-cifar10-curves/; `curve_tables.py` says
what the tables are, which are for development and which for the test.

Part `regret`. Every (scheduler, table, seed) is simulated: each epoch costs one unit of time (`--seconds`: what it took
in reality), all workers together train so many epochs, a configuration that has diverged fails instead of reporting.
Log-regret after n epochs = log10 of the distance, at least 1e-4, between the best value in the table and the best one
observed in the first n epochs, all values scaled to [0, 1]. Printed: median [quartiles] over seeds. Two schedulers are
compared by the mean difference of their log-regrets over pairs of runs with the same seed (pooled: the same table and
seed), with its 95 % bootstrap interval over pairs: `beats` or `loses` if it excludes 0, else `even`.

Part `time`. Milliseconds of a `suggest()` that gave a new configuration by the model: `refit`, right after new
observations, and `idle`, for a further free worker with no new observation. An observation is a value that the model
may use: at a rung level for those with rungs, at any epoch for the others; for BOIL with its virtual ones.

A run that has ended is a line of `--out`; the same command again does only what is not in there. Delete the file after
changing a scheduler.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.constants import ST_WORKER_TIME
from syne_tune.optimizer.scheduler import SchedulerDecision

from harness.schedulers import ASHA, CandidateSampler, Hyperband, RandomSearch
from harness.schedulers.base import BaseScheduler
from harness.seeds import rng
from scripts.curve_tables import Table, TableError, load_tables, synthetic, table_names

MODEL_FREE: dict[str, type[BaseScheduler[Any]]] = {"random": RandomSearch, "asha": ASHA, "hyperband": Hyperband}
MODEL_BASED = {"hyperband_bo": "HyperbandBO", "bohb": "BOHB", "dyhpo": "DyHPO", "boil": "BOIL"}
BASELINES = ("random", "asha")
METRIC = "score"
REGRET_FLOOR = 1e-4  # about the resolution of a validation accuracy; below it a difference means nothing
RESAMPLES = 10_000
TIMED_CALLS = 10  # of each kind, per number of observations and seed
START = datetime(2020, 1, 1)  # a trial has a time of creation; nothing depends on it


class MissingScheduler(Exception):
    """A scheduler of ``MODEL_BASED`` that this checkout does not have."""


def make_scheduler(name: str, table: Table, seed: int) -> BaseScheduler[Any]:
    """The scheduler on the configurations of the table, with its own defaults. Raises MissingScheduler."""
    space = table.space.config_space()
    common: dict[str, Any] = {"mode": "max", "max_t": table.max_t, "seed": seed}
    if name in MODEL_FREE:
        return MODEL_FREE[name](space, METRIC, searcher=CandidateSampler(table.configs, seed), **common)
    module = f"harness.schedulers.{name}"
    try:
        cls = getattr(importlib.import_module(module), MODEL_BASED[name])
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingScheduler(f"{name} is left out: there is no module {module}") from None
    return cls(space, METRIC, candidates=table.configs, **common)


# --- the simulation


@dataclass(frozen=True)
class Ask:
    """A call of ``suggest()``: wall-clock and CPU seconds, whether it gave a new trial, and from where."""

    wall: float
    cpu: float
    new: bool
    by: str | None


@dataclass
class Running:
    """A trial on a worker: when it reports next, and when this job began."""

    due: float
    since: float


class Simulation:
    """Runs a scheduler on a table: a discrete-event loop without randomness.

    Free workers are filled by asking the scheduler; then time jumps to the earliest report, and all trials due then
    report one after another by increasing id, before anything is asked again. ``improvements``: (epochs so far, value)
    whenever the best value observed has grown.
    """

    def __init__(self, scheduler: BaseScheduler[Any], table: Table, workers: int = 1, in_seconds: bool = False):
        """``in_seconds``: an epoch costs what it took, not one unit; the table must have recorded it."""
        self.scheduler, self.table, self.workers = scheduler, table, workers
        self.costs = table.seconds if in_seconds and table.seconds is not None else np.ones(table.values.shape)
        self.now, self.epochs, self.failures = 0.0, 0, 0
        self.best = -math.inf
        self.improvements: list[tuple[int, float]] = []
        self.asks: list[Ask] = []
        self.trials: list[Trial] = []
        self.running: dict[int, Running] = {}
        self.exhausted = False
        self._row_of = {_key(config, table): row for row, config in enumerate(table.configs)}
        self._rows: list[int] = []
        self._trained: list[int] = []

    def run(self, epochs: int) -> None:
        """Go on until so many epochs were trained in all, or the scheduler has ended."""
        while self.epochs < epochs and self.step():
            pass

    def step(self) -> bool:
        """Fill the workers, jump to the next report; False if nothing runs."""
        self.fill()
        if not self.running:
            return False
        self.now = min(job.due for job in self.running.values())
        for trial_id in sorted(k for k, job in self.running.items() if job.due == self.now):
            self._report(trial_id)
        return True

    def fill(self) -> None:
        """Ask for work while a worker is free; the first None ends asking for good, as in Syne Tune's Tuner."""
        while len(self.running) < self.workers and not self.exhausted:
            suggestion = self._ask()
            if suggestion is None:
                self.exhausted = True
                return
            trial_id = suggestion.checkpoint_trial_id
            if suggestion.spawn_new_trial_id:
                trial_id = self._start(suggestion.config)
            elif suggestion.config is not None:
                self.trials[trial_id].config = suggestion.config
            self.running[trial_id] = Running(self.now + self._cost(trial_id), self.now)

    def _ask(self) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        suggestion = self.scheduler.suggest()
        spent = time.perf_counter() - wall, time.process_time() - cpu
        origin = self.scheduler.origin
        new = suggestion is not None and suggestion.spawn_new_trial_id
        self.asks.append(Ask(*spent, new, None if origin is None else origin.by))
        return suggestion

    def _start(self, config: dict[str, Any]) -> int:
        row = self._row_of.get(_key(config, self.table))
        if row is None or row in self._rows:
            raise RuntimeError(f"suggested {'what is not in the table' if row is None else 'again'}: {config}")
        trial = Trial(len(self.trials), dict(config), START)
        self.trials.append(trial)
        self._rows.append(row)
        self._trained.append(0)
        self.scheduler.on_trial_add(trial)
        return trial.trial_id

    def _report(self, trial_id: int) -> None:
        job, trial = self.running[trial_id], self.trials[trial_id]
        self.epochs += 1
        self._trained[trial_id] += 1
        epoch = self._trained[trial_id]
        value = float(self.table.values[self._rows[trial_id], epoch - 1])
        if math.isnan(value):
            self.failures += 1
            del self.running[trial_id]
            self.scheduler.on_trial_error(trial)
            return
        if value > self.best:
            self.best = value
            self.improvements.append((self.epochs, value))
        report = {METRIC: value, "epoch": epoch, ST_WORKER_TIME: self.now - job.since}
        decision = self.scheduler.on_trial_result(trial, report)
        if decision != SchedulerDecision.CONTINUE:
            del self.running[trial_id]
            self.scheduler.on_trial_remove(trial)
        elif epoch == self.table.max_t:
            del self.running[trial_id]
            self.scheduler.on_trial_complete(trial, report)
        else:
            job.due = self.now + self._cost(trial_id)

    def _cost(self, trial_id: int) -> float:
        """Of the trial's next epoch. Raises RuntimeError if there is none."""
        trained = self._trained[trial_id]
        if trained == self.table.max_t:
            raise RuntimeError(f"trial {trial_id} was resumed after its last epoch")
        return float(self.costs[self._rows[trial_id], trained])


def _key(config: Mapping[str, Any], table: Table) -> tuple[Any, ...]:
    return tuple(config[name] for name in table.space)


# --- regret and verdicts


def regret_after(improvements: Iterable[Sequence[float]], epochs: int) -> float:
    """1 - the best value observed in the first ``epochs`` epochs; 1 if there was none."""
    return 1.0 - max((value for at, value in improvements if at <= epochs), default=0.0)


def log_regret(regret: float) -> float:
    return math.log10(max(regret, REGRET_FLOOR))


@dataclass(frozen=True)
class Verdict:
    """Mean difference of log-regrets over ``n`` pairs, below 0 where the first is better, and its 95 % interval."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def word(self) -> str:
        return "beats" if self.high < 0 else "loses" if self.low > 0 else "even"


def compare(first: Sequence[float], second: Sequence[float]) -> Verdict:
    """Percentile bootstrap over pairs of log-regrets; at least one pair. One pair's interval is its difference."""
    differences = np.asarray(first) - np.asarray(second)
    n = len(differences)
    draws = rng(0, "bootstrap", n).integers(0, n, (RESAMPLES, n))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return Verdict(n, float(differences.mean()), float(low), float(high))


Runs = dict[tuple[str, str, int], dict[str, Any]]  # by scheduler, table and seed


def log_regrets(runs: Runs, scheduler: str, epochs: int) -> dict[tuple[str, int], float]:
    """By table and seed."""
    return {
        (table, seed): log_regret(regret_after(run["improvements"], epochs))
        for (name, table, seed), run in runs.items()
        if name == scheduler
    }


def paired(first: Mapping[Any, float], second: Mapping[Any, float], table: str | None = None) -> Verdict | None:
    """Compare what both have, of one table or (None) of all; None if there is no pair."""
    pairs = sorted(key for key in first.keys() & second.keys() if table in (None, key[0]))
    return compare([first[key] for key in pairs], [second[key] for key in pairs]) if pairs else None


def read_record(path: Path, tables: Sequence[Table], totals: Sequence[int]) -> dict[int, dict[tuple[str, int], float]]:
    """Log-regrets, by total and then by table and seed, of recorded runs on TaskSet: JSON lines with ``task``, ``seed``
    and ``selected``, a list of [row, epoch]; other lines and tables are skipped."""
    by_task = {f"FixedTextRNNClassification_imdb_{t.name.removeprefix('taskset-')}": t for t in tables}
    found: dict[int, dict[tuple[str, int], float]] = {total: {} for total in totals}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        table = by_task.get(run.get("task"))
        if table is None:
            continue
        index = {row: i for i, row in enumerate(table.rows)}
        values = [float(table.values[index[row], epoch - 1]) for row, epoch in run["selected"]]
        for total in totals:
            if total <= len(values):
                found[total][table.name, run["seed"]] = log_regret(1.0 - max(values[:total]))
    return found


# --- runs, and the file that keeps them


def run_regret(name: str, table: Table, seed: int, workers: int, in_seconds: bool, epochs: int) -> dict[str, Any]:
    """One simulation, as a line for the file."""
    begun = time.process_time()
    simulation = Simulation(make_scheduler(name, table, seed), table, workers, in_seconds)
    simulation.run(epochs)
    return {
        "part": "regret", "scheduler": name, "table": table.name, "seed": seed, "workers": workers,
        "in_seconds": in_seconds, "epochs": epochs, "improvements": simulation.improvements,
        "configurations": len(simulation.trials), "failures": simulation.failures, "time": simulation.now,
        "cpu_seconds": round(time.process_time() - begun, 3),
    }  # fmt: skip


def observations(scheduler: BaseScheduler[Any]) -> int:
    """How many values the scheduler's model may use; what it says itself (``observations``) comes first."""
    for owner in (scheduler, scheduler.searcher):
        if hasattr(owner, "observations"):
            return int(owner.observations)
    if not isinstance(scheduler, Hyperband):
        return sum(len(curve) for curve in scheduler.curves.values())
    levels = {level for rungs in scheduler.bracket_rungs for _, level in rungs}
    return sum(level in levels for curve in scheduler.curves.values() for level in curve)


def run_time(name: str, table: Table, seed: int, wanted: int) -> dict[str, Any]:
    """Times of decisions from ``wanted`` observations on, as a line for the file."""
    simulation = Simulation(make_scheduler(name, table, seed), table)
    while observations(simulation.scheduler) < wanted and simulation.step():
        pass
    reached, begun = observations(simulation.scheduler), len(simulation.asks)
    while len(_by_model(simulation.asks[begun:])) < TIMED_CALLS and simulation.step():
        pass
    simulation.fill()
    refit = _by_model(simulation.asks[begun:])[:TIMED_CALLS]
    begun = len(simulation.asks)
    while len(_by_model(simulation.asks[begun:])) < TIMED_CALLS and not simulation.exhausted:
        simulation.workers += 1
        simulation.fill()
    idle = _by_model(simulation.asks[begun:])
    return {
        "part": "time", "scheduler": name, "table": table.name, "seed": seed, "wanted": wanted, "observations": reached,
        **{f"{kind}_{clock}": [round(1e3 * getattr(ask, clock), 3) for ask in asks]
           for kind, asks in (("refit", refit), ("idle", idle)) for clock in ("wall", "cpu")},
    }  # fmt: skip


def _by_model(asks: Iterable[Ask]) -> list[Ask]:
    return [ask for ask in asks if ask.new and ask.by == "model"]


class RunFile:
    """The runs that have ended: a line of JSON each, in ``path`` (None: in memory only)."""

    def __init__(self, path: Path | None):
        self._path = path
        text = path.read_text() if path is not None and path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line without its end was being written when the bench was killed
        if path is not None and whole != text:
            path.write_text(whole)
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(json.loads(json.dumps(line)))
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The latest line with these entries; one with more ``epochs`` will do."""
        epochs = wanted.pop("epochs", 0)
        for line in reversed(self.lines):
            if all(line.get(key) == value for key, value in wanted.items()) and line.get("epochs", epochs) >= epochs:
                return line
        return None


def regret_part(options: argparse.Namespace, tables: Sequence[Table], file: RunFile) -> Runs:
    """All runs that the options ask for, those of the file included."""
    epochs = max(options.epochs)
    runs: Runs = {}
    todo = []
    for name in options.schedulers:
        for table in tables:
            for seed in options.seeds:
                key = {"part": "regret", "scheduler": name, "table": table.name, "seed": seed}
                found = file.find(**key, workers=options.workers, in_seconds=options.seconds, epochs=epochs)
                if found is None:
                    todo.append((name, table, seed, options.workers, options.seconds, epochs))
                else:
                    runs[name, table.name, seed] = found
    for number, run in enumerate(_carry_out(run_regret, todo, options.processes), start=1):
        file.add(run)
        runs[run["scheduler"], run["table"], run["seed"]] = run
        _progress(f"{number}/{len(todo)} runs: {run['scheduler']} {run['table']} {run['seed']}")
    return runs


def _carry_out(
    function: Callable[..., dict[str, Any]], calls: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[dict[str, Any]]:
    """Results as they come."""
    if processes == 1:
        yield from (function(*call) for call in calls)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def time_part(options: argparse.Namespace, file: RunFile) -> list[dict[str, Any]]:
    """Alone and one after another, on the development table synthetic-1000."""
    table = synthetic(1000)
    lines = []
    for name in options.schedulers:
        for wanted in options.observations if name in MODEL_BASED else ():
            for seed in options.seeds[: options.repeats]:
                key = {"part": "time", "scheduler": name, "table": table.name, "seed": seed, "wanted": wanted}
                line = file.find(**key)
                if line is None:
                    _progress(f"time of {name} at {wanted} observations, seed {seed}")
                    line = run_time(name, table, seed, wanted)
                    file.add(line)
                lines.append(line)
    return lines


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# --- what is printed


def print_regret(options: argparse.Namespace, tables: Sequence[Table], runs: Runs) -> None:
    print(f"log10 regret after so many epochs, {options.workers} worker(s): median [quartiles] over seeds")
    for table in tables:
        print(f"\n{table.name:<44}" + "".join(f"{total:>24}" for total in options.epochs))
        for name in options.schedulers:
            columns = []
            for total in options.epochs:
                values = [v for (at, _), v in log_regrets(runs, name, total).items() if at == table.name]
                columns.append(f"{_spread(values, '.2f'):>24}")
            print(f"  {name:<42}" + "".join(columns) + f"   n = {len(values)}")


def print_verdicts(options: argparse.Namespace, tables: Sequence[Table], runs: Runs) -> None:
    """Of every scheduler against each baseline that ran."""
    for baseline in BASELINES:
        for name in options.schedulers:
            if baseline in options.schedulers and name not in BASELINES[: BASELINES.index(baseline) + 1]:
                print(f"\n{name} against {baseline}: mean difference of log10 regret [95 % interval]")
                for table in [None, *(table.name for table in tables)]:
                    columns = [paired(log_regrets(runs, name, total), log_regrets(runs, baseline, total), table)
                               for total in options.epochs]  # fmt: skip
                    _print_verdicts(table or "pooled", columns)


def print_record(options: argparse.Namespace, tables: Sequence[Table], runs: Runs) -> None:
    record = read_record(options.record, tables, options.epochs)
    for name in options.schedulers:
        print(f"\n{name} against the record {options.record.name}: mean difference of log10 regret [95 % interval]")
        columns = [paired(log_regrets(runs, name, total), record[total]) for total in options.epochs]
        _print_verdicts("pooled", columns)


def _print_verdicts(row: str, columns: Sequence[Verdict | None]) -> None:
    cells = [f"{v.mean:+.2f} [{v.low:+.2f}, {v.high:+.2f}] {v.word:<5}" if v else "no pair" for v in columns]
    n = max((v.n for v in columns if v), default=0)
    print(f"  {row:<42}" + "".join(f"{cell:>28}" for cell in cells) + f"   n = {n} pairs")


def print_times(lines: Sequence[dict[str, Any]]) -> None:
    print("\nmilliseconds of a suggest() that gave a new configuration by the model: median [quartiles]")
    print(f"  {'':<14}{'observations':>14}{'refit':>26}{'refit, CPU':>26}{'idle':>26}{'idle, CPU':>26}")
    for name, wanted in dict.fromkeys((line["scheduler"], line["wanted"]) for line in lines):
        group = [line for line in lines if (line["scheduler"], line["wanted"]) == (name, wanted)]
        columns, counts = [], []
        for kind in ("refit_wall", "refit_cpu", "idle_wall", "idle_cpu"):
            values = [value for line in group for value in line[kind]]
            columns.append(f"{_spread(values, '.2f'):>26}")
            counts.append(len(values))
        reached = round(statistics.median(line["observations"] for line in group))
        print(f"  {name:<14}{reached:>14}" + "".join(columns) + f"   n = {counts[0]}, {counts[2]}")


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "none"
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def as_json(options: argparse.Namespace, tables: Sequence[Table], runs: Runs, times: Sequence[dict[str, Any]]) -> str:
    """Everything that is printed, as one object."""
    totals = options.epochs
    regrets = [
        {"scheduler": name, "table": table, "seed": seed,
         "log_regret": {total: log_regret(regret_after(run["improvements"], total)) for total in totals}}
        for (name, table, seed), run in sorted(runs.items())
    ]  # fmt: skip
    names = [None, *(table.name for table in tables)]
    against: list[tuple[str, dict[int, dict[tuple[str, int], float]]]] = [
        (baseline, {total: log_regrets(runs, baseline, total) for total in totals}) for baseline in BASELINES
    ]
    if options.record is not None:
        against.append(("record", read_record(options.record, tables, totals)))
    verdicts = [
        {"scheduler": name, "against": other, "table": table, "epochs": total, "verdict": verdict.word, **vars(verdict)}
        for name in options.schedulers
        for other, regret in against
        for table in names
        for total in totals
        if name != other and (verdict := paired(log_regrets(runs, name, total), regret[total], table)) is not None
    ]
    return json.dumps({"regrets": regrets, "verdicts": verdicts, "times": list(times)})


# --- the command


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    try:
        tables = _tables(options)
        file = RunFile(options.out)
        options.schedulers = list(_present(options.schedulers))
        runs = regret_part(options, tables, file) if "regret" in options.parts else {}
        times = time_part(options, file) if "time" in options.parts else []
        _progress("")
        if options.json:
            print(as_json(options, tables, runs, times))
            return
        if "regret" in options.parts:
            print_regret(options, tables, runs)
            print_verdicts(options, tables, runs)
            if options.record is not None:
                print_record(options, tables, runs)
        if times:
            print_times(times)
    except (TableError, FileNotFoundError, PermissionError, json.JSONDecodeError) as error:
        parser.error(str(error))


def _tables(options: argparse.Namespace) -> list[Table]:
    if "regret" not in options.parts:
        return []
    names = table_names(options.tables)
    if options.data is None and options.tables in ("dev", "test"):
        names = [name for name in names if name.startswith("synthetic-")]
        print("synthetic tables only: the recorded ones need --data", file=sys.stderr)
    tables = load_tables(names, options.data)
    unknown = [table.name for table in tables if options.seconds and table.seconds is None]
    if unknown:
        raise TableError(f"table {unknown[0]} has no record of the seconds an epoch took; leave --seconds out")
    return tables


def _present(names: Iterable[str]) -> Iterator[str]:
    """The schedulers that this checkout has; the others are named on stderr."""
    for name in names:
        try:
            make_scheduler(name, synthetic(1000, n=8), 0)
            yield name
        except MissingScheduler as error:
            print(error, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; the usage is a page and has ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the recorded tables")
    parser.add_argument("--tables", default="dev", help="dev, test, or names, with commas (default: dev)")
    parser.add_argument("--schedulers", type=_schedulers, default=[*MODEL_FREE, *MODEL_BASED], help="default: all")
    parser.add_argument("--seeds", type=_seeds, default=list(range(20)), help="0..19 or 0,3,4 (default: 0..19)")
    parser.add_argument("--epochs", type=_counts, default=[50, 100, 200, 300], help="totals (default: 50,100,200,300)")
    parser.add_argument("--workers", type=_count, default=1, help="simulated workers (default: 1)")
    parser.add_argument("--seconds", action="store_true", help="an epoch costs the seconds recorded in the table")
    parser.add_argument("--record", type=Path, help="recorded DyHPO runs on TaskSet to compare with, JSON lines")
    parser.add_argument("--parts", type=_parts, default=["regret", "time"], help="regret,time (default: both)")
    parser.add_argument("--observations", type=_counts, default=[50, 200, 500], help="of part time")
    parser.add_argument("--repeats", type=_count, default=3, help="seeds of part time (default: the first 3)")
    parser.add_argument("--processes", type=_count, default=1, help="of part regret (default: 1)")
    parser.add_argument("--out", type=Path, help="file that keeps the runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _schedulers(text: str) -> list[str]:
    return _words(text, [*MODEL_FREE, *MODEL_BASED])


def _parts(text: str) -> list[str]:
    return _words(text, ["regret", "time"])


def _words(text: str, possible: Sequence[str]) -> list[str]:
    words = list(dict.fromkeys(text.split(",")))
    for word in words:
        if word not in possible:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(possible)}")
    return words


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return sorted({_count(word) for word in text.split(",")})


def _seeds(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    if not all(word.isdigit() for word in words) or (dots and int(first) > int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a range such as 0..19 nor a list such as 0,3,4")
    return list(range(int(first), int(last) + 1)) if dots else list(dict.fromkeys(int(word) for word in words))


if __name__ == "__main__":
    main()
