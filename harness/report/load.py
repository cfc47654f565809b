"""Read a results folder into two data frames: its cells and their reports."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from harness.record import CellPaths, RecordError, read_config, read_events, read_summary, report_columns, summarize

_SET_ASIDE = re.compile(r"\.broken-\d+$")
_NO_COLUMNS = {"labels", "seed", "t_tau", "incumbent"}  # of a summary: elsewhere in the row, or not one number


class ResultsError(ValueError):
    """The path holds no results; the message is one sentence that says what it is or what was expected."""


@dataclass
class Results:
    """Loaded results.

    cells: one row a usable cell; columns cell (folder), task, scheduler, variant, seed, setting (equal for cells that
        may be compared, see ``sweep.setting``), status (finished | interrupted | running or killed), tau, mode, opened
        (unix seconds), budget_wallclock (seconds), budget_gpu_hours, and the numbers of ``record.summarize``, nested
        keys joined by "_" (busy_train, flops_warm_start, peak_memory_train, ...).
    reports: one row a report; columns cell and those of ``record.report_columns``.
    configs: the resolved configuration of each usable cell.
    commands: the arguments of ``python -m harness`` that began it, where they are recorded.
    corrupt: cells that are left out, each with the reason; warnings: what was skipped, set aside or is ambiguous.
    """

    path: Path
    cells: pd.DataFrame
    reports: pd.DataFrame
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    corrupt: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def load_results(path: str | Path) -> Results:
    """Load ``results/NAME`` (a folder of cells) or one cell. Raises ResultsError if it is neither.

    Unfinished cells are loaded as such; corrupt ones are named in ``Results.corrupt`` and are in no frame.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    frames: list[pd.DataFrame] = []
    results = Results(path, pd.DataFrame(), pd.DataFrame())
    for folder in _cell_folders(path, results.warnings):
        try:
            row, columns, config = _load_cell(CellPaths.of(folder), results.warnings)
        except RecordError as error:
            results.corrupt[folder.name] = str(error)
            continue
        rows.append(row)
        frames.append(pd.DataFrame({"cell": folder.name, **columns}))
        results.configs[folder.name] = config
        if (arguments := _arguments(CellPaths.of(folder))) is not None:
            results.commands[folder.name] = arguments
    if rows:
        results.cells = pd.DataFrame(rows)
        results.reports = pd.concat(frames, ignore_index=True).astype({"cell": "category"})
        _drop_copies(results)
    return results


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


def _load_cell(paths: CellPaths, warnings: list[str]) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, Any]]:
    try:
        config, summary = read_config(paths), read_summary(paths)
        events, problems = read_events(paths.events)
        labels, task, budget = config["labels"], config["task"], config["budget"]
        fatal = [problem for problem in problems if problem.fatal]
        if fatal:
            more = f" (and {len(fatal) - 1} more)" if len(fatal) > 1 else ""
            raise RecordError(f"{fatal[0]}{more}")
        columns = report_columns(events, task.get("mode", "max"))
        computed = summarize(config, events, columns)
        row = {
            "cell": paths.folder,
            **{key: str(labels[key]) for key in ("task", "scheduler", "variant", "setting")},
            "seed": int(config["seed"]),
            "status": _status(computed, finished=summary is not None),
            "tau": task.get("tau"),
            "mode": task.get("mode", "max"),
            "opened": next((event["time"] for event in events if "time" in event), None) or _begun(paths),
            "budget_wallclock": budget.get("wallclock"),
            "budget_gpu_hours": budget.get("gpu_hours"),
            **_flat({key: value for key, value in computed.items() if key not in _NO_COLUMNS}),
        }
    except OSError as error:
        raise RecordError(f"{error.filename or paths.root} cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{paths.root} has a record of another form ({type(error).__name__}: {error})") from error
    warnings += [str(problem) for problem in problems]
    if summary is not None:
        _check_summary(paths, summary, computed)
    return row, columns, config


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


def _begun(paths: CellPaths) -> float | None:
    """When the cell was begun, by meta.json; the events of an experiment in virtual time do not say."""
    try:
        return float(json.loads(paths.meta.read_bytes())["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _arguments(paths: CellPaths) -> list[str] | None:
    """What was typed after ``python -m harness`` when the cell was begun; None where meta.json does not say so."""
    try:
        program, *arguments = json.loads(paths.meta.read_bytes())["command"]
        ours = Path(program).parts[-2:] == ("harness", "__main__.py")  # else a script called the harness
    except (OSError, ValueError, KeyError, TypeError):
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


def _drop_copies(results: Results) -> None:
    """Of cells with the same setting, variant and seed (copied folders) keep the first finished one, and say so."""
    keys = ["setting", "variant", "seed"]
    cells = results.cells.assign(unfinished=results.cells["status"] != "finished").sort_values(["unfinished", "cell"])
    copies = cells[cells.duplicated(keys)]
    for _, copy in copies.iterrows():
        twin = cells[(cells[keys] == copy[keys]).all(axis=1)].iloc[0]
        what = "same setting, variant and seed"
        results.warnings.append(f"{copy['cell']} repeats {twin['cell']} ({what}) and is not counted")
    results.cells = results.cells[~results.cells["cell"].isin(copies["cell"])].reset_index(drop=True)
    results.reports = results.reports[~results.reports["cell"].isin(copies["cell"])].reset_index(drop=True)
