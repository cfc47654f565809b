"""What is on disk: the paths of a cell, how its files are written and read, and what one cell's events amount to.

    results/<name>/<cell>/config.yaml meta.json events.jsonl trials.jsonl decisions.jsonl summary.json
                          stdout.log stderr.log slurm.json
    results/<name>/.locks/<cell>.lock <cell>.guard          (harness/ownership.py)

``events.jsonl`` only ever grows, one JSON object a line, so that a killed run loses at most the line being written;
``summary.json`` is written last and atomically: its presence means that the cell is finished.
"""

import contextlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import orjson
import yaml

from harness.ownership import Superseded

if TYPE_CHECKING:
    from harness.sweep import Cell

BUSY_KINDS = ("startup", "warm_start", "train", "validate", "test", "checkpoint")
SYNC_SECONDS = 5.0  # a power cut costs at most this much of the record; a kill costs only the line being written
_OPEN = b'{"e": "open"'  # how EventLog begins the line of an open event


class RecordError(ValueError):
    """A cell's files cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class CellPaths:
    """Every path of one cell."""

    results_dir: Path
    name: str
    folder: str

    @classmethod
    def of(cls, cell: str | Path) -> "CellPaths":
        """The paths of an existing cell folder ``<results_dir>/<name>/<folder>``."""
        path = Path(cell).absolute()
        return cls(path.parent.parent, path.parent.name, path.name)

    @classmethod
    def of_cell(cls, cell: "Cell") -> "CellPaths":
        """The absolute paths of a planned cell."""
        return cls(Path(os.path.abspath(cell.config["results_dir"])), cell.config["name"], cell.folder)

    @property
    def root(self) -> Path:
        return Path(self.results_dir) / self.name / self.folder

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def meta(self) -> Path:
        return self.root / "meta.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def trials(self) -> Path:
        """One line a trial: x, x' and the warm start's record."""
        return self.root / "trials.jsonl"

    @property
    def decisions(self) -> Path:
        """One line a suggestion: how long the scheduler took for it, and for the reports since the last one."""
        return self.root / "decisions.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def slurm(self) -> Path:
        """Slurm's account of the cell, where it ran in Slurm jobs that have ended (harness/slurm/accounting.py)."""
        return self.root / "slurm.json"

    @property
    def stdout(self) -> Path:
        return self.root / "stdout.log"

    @property
    def stderr(self) -> Path:
        return self.root / "stderr.log"

    @property
    def checkpoints(self) -> Path:
        return self.root / "trials"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def lock(self) -> Path:
        """Outside the cell's folder, so that it stays held while the folder is set aside."""
        return Path(self.results_dir) / self.name / ".locks" / f"{self.folder}.lock"

    @property
    def finished(self) -> bool:
        return self.summary.exists() and self.events.exists()


class EventLog:
    """Append-only JSON lines; every line is one write, synced to disk at most every ``sync_seconds`` and on close.

    A torn last line left by a killed run is never touched: a newline goes before the next line, so that the two cannot
    merge. Raises OSError (with the file's name) when the disk is full or the file cannot be written; what a failed
    append had already written of its own line is taken back. Raises Superseded, at a sync, if the file was replaced
    (``detach``).
    """

    def __init__(self, path: str | Path, *, sync_seconds: float = SYNC_SECONDS):
        self.path = Path(path)
        self._sync_seconds = sync_seconds
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self._prefix = b"\n" if size and os.pread(self._fd, 1, size - 1) != b"\n" else b""
        self._synced = time.monotonic()

    def append(self, event: Mapping[str, Any]) -> None:
        """Write ``event`` (JSON-able; numpy scalars and NaN are fine) as one line."""
        line = json.dumps({"e": event["e"], **event} if "e" in event else dict(event), default=_item)
        self._write(self._prefix + line.encode("ascii") + b"\n")
        self._prefix = b""
        if time.monotonic() - self._synced >= self._sync_seconds:
            os.fsync(self._fd)
            self._synced = time.monotonic()
            if self._replaced():
                raise Superseded

    def close(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _replaced(self) -> bool:
        """Whether another file is at the path by now; opened anew, as network file systems show stat an old one."""
        try:
            with open(self.path, "rb") as file:
                return not os.path.sameopenfile(file.fileno(), self._fd)
        except FileNotFoundError:
            return False

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._fd).st_size
        rest = memoryview(data)
        try:
            while rest:  # a write may be short, for example just before the disk is full
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None


@dataclass(frozen=True)
class Problem:
    """Something wrong with a line of a record. ``fatal``: the record is corrupt, not merely torn by a kill."""

    path: Path
    line: int
    what: str
    fatal: bool

    def __str__(self) -> str:
        return f"{self.path} line {self.line}: {self.what}"


def read_events(path: str | Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The events of one cell in order, and what is wrong with the file; a missing file has no events.

    Skipped with a warning (``fatal=False``): a torn last line, and one that a killed run left before the next ``open``.
    Fatal: any other line that is no event, a (trial, epoch) reported twice, a record that does not begin with ``open``.
    """
    path = Path(path)
    events: list[dict[str, Any]] = []
    problems: list[Problem] = []
    seen: set[tuple[Any, Any]] = set()
    torn: list[tuple[int, bytes]] = []
    for number, line in _lines(path):
        event = _parse(line)
        if event is None:
            torn.append((number, line))
            continue
        if torn:
            problems += _judge(path, torn, reopened=event.get("e") == "open")
            torn = []
        if fault := _fault(event, seen):
            problems.append(Problem(path, number, fault, fatal=True))
        else:
            events.append(event)
    if events and events[0]["e"] != "open":
        problems.append(Problem(path, 1, "the record does not begin with an open event", fatal=True))
    return events, problems + _judge(path, torn, reopened=True)


def read_trials(path: str | Path) -> tuple[dict[int, dict[str, Any]], list[Problem]]:
    """The rows of trials.jsonl by trial. Unreadable lines are warnings: ``trial_rows(events)`` has the same content."""
    rows: dict[int, dict[str, Any]] = {}
    problems = []
    for number, line in _lines(Path(path)):
        row = _parse(line)
        if row is None or "trial" not in row:
            problems.append(Problem(Path(path), number, "is not a trial's record (skipped)", fatal=False))
        else:
            rows[row["trial"]] = row
    return rows, problems


def trial_rows(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of trials.jsonl that ``events`` imply: one a trial, as of its first report or its failure before it."""
    configs: dict[Any, Any] = {}
    rows: dict[Any, dict[str, Any]] = {}
    for event in events:
        if event["e"] == "start":
            configs[event["trial"]] = event["config"]
        elif event["e"] in ("report", "error") and event["trial"] not in rows:
            warm = event.get("result", event).get("warm_start") or {"x": configs.get(event["trial"])}
            rows[event["trial"]] = {"trial": event["trial"], "t": event["t"], **warm}
    return list(rows.values())


def write_atomic(path: str | Path, text: str) -> None:
    """Replace the file's content all or nothing: temporary file, fsync, rename, fsync of the folder. Raises OSError."""
    path = Path(path)
    with _replacing(path) as file:
        file.write(text.encode("utf-8"))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, which takes the place of ``path`` if the block does not fail."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_config(paths: CellPaths, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration (plain dicts, lists and scalars)."""
    write_atomic(paths.config, yaml.safe_dump(dict(config), sort_keys=False, width=120))


def read_config(paths: CellPaths) -> dict[str, Any]:
    """The resolved configuration; RecordError if it is missing or is not one."""
    try:
        config = yaml.load(paths.config.read_bytes(), Loader=_YAML_LOADER)
    except FileNotFoundError:
        raise RecordError(f"{paths.config} is missing") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecordError(f"{paths.config} is not readable YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict) or not isinstance(config.get("labels"), dict) or "seed" not in config:
        raise RecordError(f"{paths.config} is not a cell's configuration (it has no labels and seed)")
    return config


def read_summary(paths: CellPaths) -> dict[str, Any] | None:
    """The summary of a finished cell, None if it is not finished; RecordError if the file is damaged."""
    try:
        summary = json.loads(paths.summary.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise RecordError(f"{paths.summary} is not readable JSON")
    return summary


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` atomically as strict JSON (see ``plain``)."""
    write_atomic(path, json.dumps(plain(value), indent=1) + "\n")


def detach(paths: CellPaths) -> None:
    """Replace the files that only grow by copies: what a process that still has them open appends is in no record."""
    for path in (paths.events, paths.trials, paths.decisions, paths.stdout, paths.stderr):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as old, _replacing(path) as new:
            shutil.copyfileobj(old, new)


def set_aside(paths: CellPaths) -> Path:
    """Rename a cell's folder to ``<cell>.broken-N`` with the first free N, and return the new path. Hold its lock."""
    number = 1
    while (target := paths.root.with_name(f"{paths.folder}.broken-{number}")).exists():
        number += 1
    paths.root.rename(target)
    return target


# What the events of one cell amount to


def report_columns(events: Iterable[Mapping[str, Any]], mode: str = "max", gpus: int = 1) -> dict[str, list[Any]]:
    """One entry a report, in order, under each name.

    trial, epoch, decision; t (cell seconds); gpu_hours (busy hours of all workers so far, test evaluation left out,
    times ``gpus`` of a trial);
    train_loss, train_score, validation_loss, validation_score, test_score; best_validation_score and
    incumbent_test_score: of the report that is best on validation so far (the first of equals; NaN before any).
    """
    sign = 1.0 if mode == "max" else -1.0
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    add = [columns[name].append for name in _COLUMNS]
    seconds, best, test = 0.0, math.nan, math.nan
    for event in events:
        report = event["e"] == "report"
        result = event["result"] if report else event
        spent = result.get("busy")
        if spent:
            seconds += gpus * (sum(spent.values()) - spent.get("test", 0.0))
        if not report:
            continue
        score = result["validation_score"]
        if score * sign > best * sign or (best != best and score == score):
            best, test = score, result["test_score"]
        row = (event["trial"], result["epoch"], event.get("decision"), event["t"], seconds / 3600,
               result.get("train_loss", math.nan), result.get("train_score", math.nan),
               result.get("validation_loss", math.nan), score, result["test_score"], best, test)  # fmt: skip
        for append, value in zip(add, row, strict=True):
            append(value)
    return columns


def time_to(tau: float, score: Sequence[float], time: Sequence[float], mode: str = "max") -> float | None:
    """The first ``time`` at which ``score`` is ``tau`` or better; None if it never is (right-censored)."""
    for value, t in zip(score, time, strict=True):
        if value >= tau if mode == "max" else value <= tau:
            return t
    return None


def summarize(
    config: Mapping[str, Any], events: Sequence[Mapping[str, Any]], columns: Mapping[str, list[Any]] | None = None
) -> dict[str, Any]:
    """The content of summary.json.

    busy: seconds by kind; gpu_hours: busy hours without test evaluation times a trial's GPUs; wallclock: seconds;
    peak_memory: bytes, of a trial's first process; flops: counts; t_tau: by target, seconds and GPU-hours until the
    incumbent's test (or the best validation) score reached it, None = censored; warm_start_share: of busy time
    without test evaluation, and of FLOPs.
    columns: ``report_columns`` of the events, where the caller has them already.
    An event other than a report may carry ``busy`` and ``flops`` too (what a failed attempt had spent).
    """
    task = config["task"]
    mode = task.get("mode", "max")
    gpus = task.get("gpus_per_trial", 1)
    columns = columns or report_columns(events, mode, gpus)
    totals = _totals(events, gpus)
    return {
        "labels": config["labels"],
        "seed": config["seed"],
        "stop_reason": _stop_reason(events),
        "trials": sum(event["e"] == "start" for event in events),
        "epochs": len(columns["t"]),
        "failures": sum(event["e"] == "error" for event in events),
        "retries": sum(event["e"] == "retry" for event in events),
        "model_failures": sum("failure" in event.get("origin", {}) for event in events),
        "wallclock": events[-1]["t"] if events else 0.0,
        **totals,
        **_incumbent(columns, mode),
        "t_tau": {str(tau): _times_to(tau, columns, mode) for tau in targets(task)},
    }


def decision_seconds(path: str | Path) -> dict[str, Any]:
    """What a scheduler's decisions took, from decisions.jsonl: number of suggestions, seconds in total, their median
    and maximum, and seconds for all reports. Unreadable lines are left out."""
    rows = [row for _, line in _lines(Path(path)) if (row := _parse(line)) is not None and "suggest" in row]
    suggest = [row["suggest"] for row in rows]
    return {
        "suggestions": len(rows),
        "suggest": sum(suggest),
        "suggest_median": statistics.median(suggest) if rows else None,
        "suggest_max": max(suggest, default=None),
        "reports": sum(row["reports"] for row in rows),
    }


def targets(task: Mapping[str, Any]) -> list[float]:
    """The task's target scores: tau first, then the further ``taus``."""
    taus = [task.get("tau"), *(task.get("taus") or [])]
    return list(dict.fromkeys(float(tau) for tau in taus if tau is not None))


def plain(value: Any) -> Any:
    """``value`` for strict JSON: numpy scalars as Python's, NaN and infinities as None, paths as strings."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLUMNS = (
    "trial", "epoch", "decision", "t", "gpu_hours", "train_loss", "train_score", "validation_loss",
    "validation_score", "test_score", "best_validation_score", "incumbent_test_score",
)  # fmt: skip
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _totals(events: Iterable[Mapping[str, Any]], gpus: int) -> dict[str, Any]:
    busy = dict.fromkeys(BUSY_KINDS, 0.0)
    flops = {"train": 0, "warm_start": 0}
    peak = {"train": 0, "warm_start": 0}
    warm_started = fallbacks = 0
    for event in events:
        result = event["result"] if event["e"] == "report" else event
        for kind, seconds in (result.get("busy") or {}).items():
            busy[kind] = busy.get(kind, 0.0) + seconds
        for kind, count in (result.get("flops") or {}).items():
            flops[kind] = flops.get(kind, 0) + count
        peak["train"] = max(peak["train"], result.get("peak_memory") or 0)
        if warm := result.get("warm_start"):
            warm_started += 1
            fallbacks += warm.get("fallback") is not None
            peak["warm_start"] = max(peak["warm_start"], warm.get("peak_memory") or 0)
    charged = sum(busy.values()) - busy["test"]
    shares = {"busy": _share(busy["warm_start"], charged), "flops": _share(flops["warm_start"], sum(flops.values()))}
    return {"busy": busy, "gpu_hours": gpus * charged / 3600, "flops": flops, "peak_memory": peak,
            "warm_started": warm_started, "fallbacks": fallbacks, "warm_start_share": shares}  # fmt: skip


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _incumbent(columns: Mapping[str, list[Any]], mode: str) -> dict[str, Any]:
    scores = [(value, i) for i, value in enumerate(columns["validation_score"]) if value == value]
    if not scores:
        return {"incumbent": None, "best_validation_score": None, "incumbent_test_score": None}
    best = (max if mode == "max" else min)(value for value, _ in scores)
    first = next(i for value, i in scores if value == best)
    where = {name: columns[name][first] for name in ("trial", "epoch", "t", "gpu_hours")}
    return {"incumbent": where, "best_validation_score": best, "incumbent_test_score": columns["test_score"][first]}


def _times_to(tau: float, columns: Mapping[str, list[Any]], mode: str) -> dict[str, float | None]:
    test, validation = columns["incumbent_test_score"], columns["best_validation_score"]
    return {
        "wallclock": time_to(tau, test, columns["t"], mode),
        "gpu_hours": time_to(tau, test, columns["gpu_hours"], mode),
        "validation_wallclock": time_to(tau, validation, columns["t"], mode),
        "validation_gpu_hours": time_to(tau, validation, columns["gpu_hours"], mode),
    }


def _stop_reason(events: Sequence[Mapping[str, Any]]) -> str:
    if events and events[-1]["e"] == "close":
        return str(events[-1].get("reason") or events[-1]["why"])
    return "running or killed"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, content) of each line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    yield from enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds, None if it holds none; records are ASCII, so another byte is damage."""
    try:
        value = orjson.loads(line)
    except ValueError:  # orjson has no NaN and no infinities, which json writes and reads
        try:
            value = json.loads(line)
        except ValueError:
            return None
    return value if isinstance(value, dict) and line.isascii() else None


def _judge(path: Path, torn: Sequence[tuple[int, bytes]], reopened: bool) -> list[Problem]:
    """Problems of adjacent unreadable lines: a kill tears one, and a kill while reopening the ``open`` after it."""
    problems = []
    for position, (number, line) in enumerate(torn):
        fits = position == 0 or line.startswith(_OPEN) or _OPEN.startswith(line)
        if reopened and fits:
            problems.append(Problem(path, number, "is torn by a kill and was skipped", fatal=False))
        else:
            problems.append(Problem(path, number, "is not a JSON object", fatal=True))
    return problems


_NEEDED = {
    "start": ("trial", "config"), "resume": ("trial",), "report": ("trial", "result"), "error": ("trial",),
    "complete": ("trial",), "retry": ("trial",), "close": ("why",),
}  # fmt: skip


def _fault(event: Mapping[str, Any], seen: set[tuple[Any, Any]]) -> str | None:
    """What makes a parsed line no event (None: nothing); ``seen`` collects the trials started and epochs reported."""
    kind = event.get("e")
    if not isinstance(kind, str) or not isinstance(event.get("t"), (int, float)):
        return "is not an event (it needs a kind e and a time t)"
    if missing := [key for key in _NEEDED.get(kind, ()) if key not in event]:
        return f"event {kind!r} lacks {', '.join(missing)}"
    if kind == "start":
        seen.add((event["trial"], "start"))
    elif kind in ("resume", "report", "error", "complete") and (event["trial"], "start") not in seen:
        return f"trial {event['trial']} was never started"
    if kind != "report":
        return None
    result = event["result"]
    if not isinstance(result, dict):
        return "event 'report' has no result object"
    if missing := [key for key in ("epoch", "validation_score", "test_score") if key not in result]:
        return f"a report lacks {', '.join(missing)}"
    key = (event["trial"], result["epoch"])
    if key in seen:
        return f"epoch {key[1]} of trial {key[0]} is reported a second time"
    seen.add(key)
    return None


def _item(value: Any) -> Any:
    """numpy and torch scalars for json."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be recorded as JSON")
