"""Read a results folder into data frames: its cells, their reports, their trials and where warm starts moved those."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.ohgw.coordinates import Coordinate
from harness.record import (
    CellPaths,
    RecordError,
    read_config,
    read_events,
    read_summary,
    report_columns,
    summarize,
    trial_rows,
)
from harness.report.processes import cores, map_in_processes
from harness.slurm.accounting import account_in_record, use_of_slurm
from harness.space import Categorical, Float, Space

_SET_ASIDE = re.compile(r"\.broken-\d+$")
_NO_COLUMNS = {"labels", "seed", "t_tau", "incumbent"}  # of a summary: elsewhere in the row, or not one number
PARALLEL_FROM = 100_000_000  # bytes of events; for less, starting a second process costs more than it saves

Columns = dict[str, Any]  # name -> an array or list; all of one length


class ResultsError(ValueError):
    """The path holds no results; the message is one sentence that says what it is or what was expected."""


@dataclass
class Results:
    """Loaded results.

    cells: one row a usable cell; columns cell (folder), task, scheduler, variant, preset, seed, setting (equal for
        cells that may be compared, see ``sweep.setting``), status (finished | interrupted | running or killed), tau,
        mode, opened (unix seconds), budget_wallclock (seconds), budget_gpu_hours, and the numbers of
        ``record.summarize``, nested keys joined by "_" (busy_train, flops_warm_start, peak_memory_train, ...).
    reports: one row a report, in order; columns cell and those of ``record.report_columns``.
    trials: one row a trial; columns cell, trial, t (cell seconds of its start), epochs (reported), decision (of the
        last report), failed, best_validation_score, final_validation_score, estimator (of its warm start; None without
        one), fallback (why another estimator was used, else None), loss (the objective at x), length (|x' - x| in unit
        coordinates), seconds, flops and peak_memory (bytes) of the warm start; NaN where there was none.
    coordinates: one row a trial and hyperparameter; columns cell, trial, name, x, x_prime (the values; of a categorical
        the index of the choice), unit_x, unit_x_prime (continuous ones in [0, 1], NaN for others), gradient (dF/dpsi in
        unit coordinates; NaN where there is none). Without a warm start x_prime is x.
    configs: the resolved configuration of each usable cell.
    meta: the content of meta.json of each usable cell that has one: command, commit, versions, hardware.
    commands: the arguments of ``python -m harness`` that began it, where they are recorded.
    slurm: of each usable cell whose events name Slurm jobs the content of slurm.json (``harness.slurm.accounting``), or
        else ``{"missing": why}`` and our side of it.
    corrupt: cells that are left out, each with the reason; warnings: what was skipped, set aside or is ambiguous.
    """

    path: Path
    cells: pd.DataFrame
    reports: pd.DataFrame
    trials: pd.DataFrame = field(default_factory=pd.DataFrame)
    coordinates: pd.DataFrame = field(default_factory=pd.DataFrame)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    slurm: dict[str, dict[str, Any]] = field(default_factory=dict)
    corrupt: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def folder(self, cell: str) -> Path:
        """The folder of a cell; ``path`` itself where one cell was loaded."""
        return self.path if _is_cell(self.path) else self.path / cell


@dataclass
class _Cell:
    """What is read from one folder; only ``corrupt`` if it cannot be used."""

    folder: str
    corrupt: str = ""
    row: dict[str, Any] = field(default_factory=dict)
    reports: Columns = field(default_factory=dict)
    trials: Columns = field(default_factory=dict)
    coordinates: Columns = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def load_results(path: str | Path) -> Results:
    """Load ``results/NAME`` (a folder of cells) or one cell. Raises ResultsError if it is neither.

    Unfinished cells are loaded as such; corrupt ones are named in ``Results.corrupt`` and are in no frame. Large
    folders are read by one process a core.
    """
    path = Path(path)
    results = Results(path, pd.DataFrame(), pd.DataFrame())
    loaded = _load_all(_cell_folders(path, results.warnings))
    usable = []
    for cell in loaded:
        if cell.corrupt:
            results.corrupt[cell.folder] = cell.corrupt
            continue
        usable.append(cell)
        results.warnings += cell.warnings
        results.configs[cell.folder] = cell.config
        if cell.meta:
            results.meta[cell.folder] = cell.meta
        if cell.slurm:
            results.slurm[cell.folder] = cell.slurm
        if (arguments := _arguments(cell.meta)) is not None:
            results.commands[cell.folder] = arguments
    if usable:
        usable, copies = _without_copies(usable, results.warnings)
        results.cells = pd.DataFrame([cell.row for cell in usable])
        names = [cell.folder for cell in usable]
        results.reports = _frame(names, [cell.reports for cell in usable])
        results.trials = _frame(names, [cell.trials for cell in usable])
        results.coordinates = _frame(names, [cell.coordinates for cell in usable])
        for copy in copies:
            for kept in (results.configs, results.meta, results.commands, results.slurm):
                kept.pop(copy, None)
    return results


def _load_all(folders: Sequence[Path]) -> list[_Cell]:
    size = sum((folder / "events.jsonl").stat().st_size for folder in folders if (folder / "events.jsonl").is_file())
    if size < PARALLEL_FROM or cores() < 2:
        return [_load_cell(folder) for folder in folders]
    return map_in_processes(_load_cell, folders, min(cores(), len(folders)))


def _cell_folders(path: Path, warnings: list[str]) -> list[Path]:
    if not path.is_dir():
        what = "is a file, not a folder of results" if path.exists() else "does not exist"
        raise ResultsError(f"{path} {what}; expected results/NAME or one cell's folder in it")
    if _is_cell(path):
        return [path]
    cells = sorted(child for child in path.iterdir() if _is_cell(child))
    aside = [cell.name for cell in cells if _SET_ASIDE.search(cell.name)]
    if aside:
        warnings.append(f"{len(aside)} folder(s) set aside as unusable are not counted: {', '.join(aside)}")
    usable = [cell for cell in cells if not _SET_ASIDE.search(cell.name)]
    if not usable:
        raise ResultsError(f"{path} has no cells in it; {_expected(path)}")
    return usable


def _expected(path: Path) -> str:
    folders = sorted(child for child in path.iterdir() if child.is_dir() and any(map(_is_cell, child.iterdir())))
    if folders:
        return f"it holds whole results: give one of {', '.join(map(str, folders))}"
    return "expected a folder of cells, each with config.yaml and events.jsonl"


def _is_cell(path: Path) -> bool:
    return path.is_dir() and ((path / "config.yaml").is_file() or (path / "events.jsonl").is_file())


def _load_cell(folder: Path) -> _Cell:
    paths = CellPaths.of(folder)
    cell = _Cell(paths.folder)  # of "." as well
    try:
        _read_into(cell, paths)
    except OSError as error:
        cell.corrupt = f"{error.filename or paths.root} cannot be read ({error.strerror})"
    except RecordError as error:
        cell.corrupt = str(error)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        cell.corrupt = f"{paths.root} has a record of another form ({type(error).__name__}: {error})"
    return cell


def _read_into(cell: _Cell, paths: CellPaths) -> None:
    config, summary = read_config(paths), read_summary(paths)
    events, problems = read_events(paths.events)
    labels, task, budget = config["labels"], config["task"], config["budget"]
    fatal = [problem for problem in problems if problem.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
        raise RecordError(f"{fatal[0]}{more}")
    columns = report_columns(events, task.get("mode", "max"), task.get("gpus_per_trial", 1))
    computed = summarize(config, events, columns)
    if summary is not None:
        _check_summary(paths, summary, computed)
    cell.config, cell.meta = config, _meta(paths)
    cell.warnings = [str(problem) for problem in problems]
    if (use := use_of_slurm(paths, events, task.get("gpus_per_trial", 1))) is not None:
        cell.slurm = account_in_record(use)
    cell.row = {
        "cell": paths.folder,
        **{key: str(labels[key]) for key in ("task", "scheduler", "variant", "setting")},
        "preset": str(labels.get("preset", labels["variant"])),
        "seed": int(config["seed"]),
        "status": _status(computed, finished=summary is not None),
        "tau": task.get("tau"),
        "mode": task.get("mode", "max"),
        "opened": next((event["time"] for event in events if "time" in event), cell.meta.get("time")),
        "budget_wallclock": budget.get("wallclock"),
        "budget_gpu_hours": budget.get("gpu_hours"),
        **_flat({key: value for key, value in computed.items() if key not in _NO_COLUMNS}),
    }
    cell.reports = {name: _array(values) for name, values in columns.items()}
    cell.trials, cell.coordinates = _trials(config, events, columns)


def _array(values: list[Any]) -> Any:
    return values if values and isinstance(values[0], str | None) else np.asarray(values, dtype=float)


def _trials(config: Mapping[str, Any], events: list[dict[str, Any]], reports: Columns) -> tuple[Columns, Columns]:
    """The columns of ``Results.trials`` and ``Results.coordinates`` without the cell."""
    starts = {event["trial"]: event for event in events if event["e"] == "start"}
    failed = {event["trial"] for event in events if event["e"] == "error"}
    warm = {row["trial"]: row for row in trial_rows(events)}
    rows = [warm.get(trial, {"x": start["config"]}) for trial, start in starts.items()]
    epochs: dict[int, int] = dict.fromkeys(starts, 0)
    last: dict[int, str | None] = dict.fromkeys(starts)
    best: dict[int, float] = dict.fromkeys(starts, math.nan)
    final = dict(best)
    sign = 1.0 if config["task"].get("mode", "max") == "max" else -1.0
    for trial, decision, score in zip(reports["trial"], reports["decision"], reports["validation_score"], strict=True):
        epochs[trial] += 1
        last[trial], final[trial] = decision, score
        if not score * sign <= best[trial] * sign:
            best[trial] = score if score == score else best[trial]
    trials: Columns = {
        "trial": np.asarray(list(starts), dtype=float),
        "t": np.asarray([start["t"] for start in starts.values()], dtype=float),
        "epochs": np.asarray(list(epochs.values()), dtype=float),
        "decision": list(last.values()),
        "failed": np.asarray([trial in failed for trial in starts], dtype=bool),
        "best_validation_score": np.asarray(list(best.values()), dtype=float),
        "final_validation_score": np.asarray(list(final.values()), dtype=float),
        "estimator": [row.get("estimator") for row in rows],
        "fallback": [row.get("fallback") for row in rows],
        **{key: _numbers(row.get(key) for row in rows)
           for key in ("loss", "length", "seconds", "flops", "peak_memory")},
    }  # fmt: skip
    return trials, _coordinates(config, trials["trial"], rows)


def _coordinates(config: Mapping[str, Any], trial: Any, rows: Sequence[Mapping[str, Any]]) -> Columns:
    task, ohgw = config["task"], config.get("ohgw", {})
    space = Space.from_spec(task["spaces"][task["space"]])
    parts: list[Columns] = []
    for name, domain in space.domains.items():
        place = {choice: i for i, choice in enumerate(domain.choices)} if isinstance(domain, Categorical) else None
        before = [row["x"].get(name) for row in rows]
        after = [row.get("x_prime", row["x"]).get(name) for row in rows]
        x, x_prime = (_numbers((place.get(v) for v in values) if place else values) for values in (before, after))
        unknown = np.full(len(rows), math.nan)
        part = {"name": [name] * len(rows), "trial": trial, "x": x, "x_prime": x_prime,
                "unit_x": unknown, "unit_x_prime": unknown, "gradient": unknown}  # fmt: skip
        if isinstance(domain, Float):
            log1m = name == "momentum" and ohgw.get("momentum_space") == "log1m"
            slopes = _numbers((row.get("gradient") or {}).get(name) for row in rows)
            part |= {"unit_x": _unit(domain, x), "unit_x_prime": _unit(domain, x_prime),
                     "gradient": slopes * Coordinate(domain, log1m).width}  # fmt: skip
        parts.append(part)
    return {key: _joined([part[key] for part in parts]) for key in parts[0]} if parts else {}


def _unit(domain: Float, values: Any) -> Any:
    low, high = domain.bounds
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((np.log(values) if domain.log else values) - low) / (high - low)


def _numbers(values: Iterable[Any]) -> Any:
    return np.asarray([math.nan if value is None else value for value in values], dtype=float)


def _joined(parts: list[Any]) -> Any:
    return [value for part in parts for value in part] if isinstance(parts[0], list) else np.concatenate(parts)


def _frame(cells: list[str], parts: list[Columns]) -> pd.DataFrame:
    """One frame of the columns of all cells; column cell, words as categories (small, and quick to group by)."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    lengths = [len(next(iter(part.values()), ())) for part in parts]
    columns: dict[str, Any] = {
        "cell": pd.Categorical.from_codes(np.repeat(np.arange(len(cells)), lengths).tolist(), pd.Index(cells))
    }
    for name in names:
        values = [part[name] for part, length in zip(parts, lengths, strict=True) if length]
        if any(isinstance(value, list) for value in values):
            columns[name] = pd.Categorical([word for value in values for word in value])
        else:
            columns[name] = np.concatenate(values) if values else np.empty(0)
    frame = pd.DataFrame(columns)
    return frame.astype({name: int for name in ("trial", "epoch", "epochs") if name in frame})


def _check_summary(paths: CellPaths, summary: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """A finished cell's events must be all there: a copy may have been cut at the end of a line."""
    for key in ("trials", "epochs"):
        if summary.get(key) != computed[key]:
            counted = f"{paths.summary.name} counted {summary.get(key)}"
            raise RecordError(f"{paths.events} has {computed[key]} {key}, but {counted}")


def _status(computed: Mapping[str, Any], finished: bool) -> str:
    if finished:
        return "finished"
    return "running or killed" if computed["stop_reason"] == "running or killed" else "interrupted"


def _meta(paths: CellPaths) -> dict[str, Any]:
    """meta.json; empty where it is missing or unreadable: nothing is computed from it."""
    try:
        meta = json.loads(paths.meta.read_bytes())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _arguments(meta: Mapping[str, Any]) -> list[str] | None:
    """What was typed after ``python -m harness`` when the cell was begun; None where meta.json does not say so."""
    try:
        program, *arguments = meta["command"]
        ours = Path(program).parts[-2:] == ("harness", "__main__.py")  # else a script called the harness
    except (ValueError, KeyError, TypeError):
        return None
    return arguments if ours and all(isinstance(word, str) for word in arguments) else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_pairs(value, prefix))


def _pairs(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _pairs(entry, f"{prefix}{key}_")
        else:
            yield f"{prefix}{key}", entry


def _without_copies(cells: list[_Cell], warnings: list[str]) -> tuple[list[_Cell], list[str]]:
    """Of cells with the same setting, variant and seed (copied folders) keep the first finished one, and say so."""
    kept: dict[tuple[Any, ...], _Cell] = {}
    for cell in sorted(cells, key=lambda cell: (cell.row["status"] != "finished", cell.folder)):
        key = tuple(cell.row[name] for name in ("setting", "variant", "seed"))
        if (twin := kept.setdefault(key, cell)) is not cell:
            what = "same setting, variant and seed"
            warnings.append(f"{cell.folder} repeats {twin.folder} ({what}) and is not counted")
    chosen = {cell.folder for cell in kept.values()}
    return [c for c in cells if c.folder in chosen], [c.folder for c in cells if c.folder not in chosen]
