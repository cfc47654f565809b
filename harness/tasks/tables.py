"""Tables of numbers and words, read, split and encoded: the data of the families ``tabular`` and ``boosting``.

    table = load("breast_cancer", metric="accuracy")        # a set that scikit-learn ships
    table = load("~/adult.csv", target="income", metric="f1")   # any text table, also .gz; or openml:NAME[:VERSION]
    table.parts["train"].numeric, table.parts["train"].target

Half of the rows are for training and a quarter each for validation and test, so that a score on a small set still tells
two good configurations apart; the same rows for every trial, in equal shares of every class. Whatever is estimated
(levels, medians, means) comes from the training part alone.

A column of text, of a pandas category, or named in ``categorical``, is categorical, all others are numeric. A target of
text, of truth values or of at most MAX_CLASSES different whole numbers asks for classification, others for regression.
"""

import csv
import gzip
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.context import UserError
from harness.seeds import rng
from harness.tasks.data import SPLIT_SEED, installed_file, stratified_split, with_label_noise

MAX_CLASSES = 30  # different whole numbers in a target; more of them are a quantity
MISSING = ["?"]  # besides what pandas takes for missing: the UCI repository's mark
EMBEDDED = ("breast_cancer", "diabetes", "digits", "iris", "wine")
METRICS = {"classification": ("accuracy", "f1"), "regression": ("r2",)}


@dataclass(frozen=True)
class Columns:
    """A table as it was read: float64 with NaN for missing, or objects (str, None for missing), by column."""

    features: Mapping[str, np.ndarray]
    target: np.ndarray


@dataclass(frozen=True)
class Part:
    """``numeric`` (n, columns) float64, NaN where missing; ``levels`` (n, columns) int64, 0 for missing and for what
    the training part has not; ``target`` (n,): int64 classes, or float32, standardised by the training part."""

    numeric: Tensor
    levels: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Table:
    """A data set, split. ``levels``: number of levels of each categorical column, level 0 included. ``classes``: names
    of the classes, none for regression. ``mean``, ``std``: of the target of a regression. ``metric``: the score."""

    parts: Mapping[str, Part]
    numeric: tuple[str, ...]
    levels: Mapping[str, int]
    classes: tuple[str, ...]
    mean: float
    std: float
    metric: str

    @property
    def outputs(self) -> int:
        """Numbers that a model predicts for an example."""
        return len(self.classes) or 1

    def statistics(self, output: Tensor, target: Tensor) -> Tensor:
        """Sums over examples for ``scores``, float64: the loss and the confusion matrix (rows: true classes), or the
        squared error, the targets and their squares. ``output``: (n, outputs) logits or values."""
        output = output.detach()
        if not self.classes:
            value, answer = output.squeeze(1).double(), target.double()
            return torch.stack([(value - answer).square().sum(), answer.sum(), answer.square().sum()])
        k = len(self.classes)
        confusion = torch.bincount(target * k + output.argmax(1), minlength=k * k)
        loss = F.cross_entropy(output.float(), target, reduction="none").double().sum()
        return torch.cat([loss.view(1), confusion.double()])

    def scores(self, statistics: Tensor, n: int) -> dict[str, float]:
        """``loss``, ``score`` (the metric) and more from the sums over a part of ``n`` examples. Classification:
        accuracy and macro-F1; regression: R^2 about the part's own mean, loss on the standardised target, rmse in the
        target's own units."""
        if not self.classes:
            error, total, squares = statistics.tolist()
            spread = squares - total**2 / n
            r2 = 1 - error / spread if spread > 0 else math.nan
            return {"loss": error / n, "score": r2, "rmse": self.std * math.sqrt(error / n)}
        confusion = statistics[1:].view(self.outputs, self.outputs)
        found = {"accuracy": float(confusion.trace()) / n, "f1": macro_f1(confusion)}
        return {"loss": float(statistics[0]) / n, "score": found.pop(self.metric), **found}


def macro_f1(confusion: Tensor) -> float:
    """The mean F1 of the classes that occur, or are predicted, as ``sklearn.metrics.f1_score(average="macro")``;
    ``confusion``: (true, predicted) counts."""
    both = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * confusion.diagonal() / both.clamp(min=1)
    return float(f1[both > 0].mean())


def load(
    data: str,
    *,
    metric: str,
    target: str | None = None,
    kind: str = "auto",
    header: bool = True,
    categorical: Sequence[str] = (),
    data_dir: str | None = None,
    label_noise: float = 0.0,
) -> Table:
    """The table ``data``: a name of EMBEDDED, a file (a relative path is inside ``data_dir``, if that is given), or
    ``openml:NAME[:VERSION]`` (kept in ``data_dir``). ``label_noise``: share of training targets replaced at random, by
    another class or by another row's value.

    Errors: UserError for data, a column or a kind that are not possible, and for a ``metric`` of the other kind."""
    columns = read(data, target, header, categorical, data_dir)
    kind = kind_of(columns.target, kind)
    if metric not in METRICS[kind]:
        raise UserError(f"{data} is a {kind} task: set task.metric={METRICS[kind][0]} (and task.tau), not {metric}")
    name = Path(data).name if "/" in data else data
    if kind == "regression":
        return _regression(columns, name, metric, label_noise)
    return _classification(columns, name, metric, label_noise)


def read(data: str, target: str | None, header: bool, categorical: Sequence[str], data_dir: str | None) -> Columns:
    """All rows of ``data`` that have a target."""
    if data in EMBEDDED:
        if target is not None or categorical:
            raise UserError(f"task.target and task.categorical are for files and OpenML, not for {data}")
        return _embedded(data)
    frame, default = _openml(data, data_dir) if data.startswith("openml:") else (_file(data, header, data_dir), None)
    names = [str(name) for name in frame.columns]
    frame.columns = names
    target = target or default or names[-1]
    for name in (target, *categorical):
        if name not in names:
            raise UserError(f"{data} has no column {name!r}; it has {', '.join(names[:20])}")
    frame = frame[frame[target].notna()]
    if len(frame) < 8 or len(names) < 2:
        raise UserError(f"{data} has {len(frame)} rows with a target and {len(names) - 1} other columns: too few")
    features = {name: _column(frame[name], name in categorical) for name in names if name != target}
    return Columns(features, _column(frame[target], frame[target].dtype == bool))


def kind_of(target: np.ndarray, kind: str) -> str:
    """ "classification" or "regression", by the target where ``kind`` is "auto"."""
    words = target.dtype == object
    if kind == "regression" and words:
        raise UserError("task.kind=regression needs a numeric target; this one has words")
    if kind != "auto":
        return kind
    few = words or (np.unique(target).size <= MAX_CLASSES and bool((target == np.round(target)).all()))
    return "classification" if few else "regression"


def _classification(columns: Columns, name: str, metric: str, label_noise: float) -> Table:
    values, codes = np.unique(columns.target, return_inverse=True)
    if len(values) < 2:
        raise UserError(f"the target of {name} has one class only")
    labels = torch.from_numpy(codes.reshape(-1).astype(np.int64))
    train, rest = stratified_split(labels, 0.5, name, "train")
    validation, test = stratified_split(labels[rest], 0.5, name, "validation")
    rows = {"train": train, "validation": rest[validation], "test": rest[test]}
    targets = {part: labels[index] for part, index in rows.items()}
    targets["train"] = with_label_noise(targets["train"], label_noise, len(values), name)
    return _encoded(columns, rows, targets, tuple(map(str, values)), 0.0, 1.0, metric)


def _regression(columns: Columns, name: str, metric: str, label_noise: float) -> Table:
    generator = rng(SPLIT_SEED, "split", name, "regression")
    n = len(columns.target)
    order = torch.from_numpy(generator.permutation(n))
    train, validation, test = order.tensor_split([n // 2, n // 2 + n // 4])
    rows = {"train": train, "validation": validation, "test": test}
    values = torch.from_numpy(columns.target)
    noisy = values[train]
    generator = rng(SPLIT_SEED, "label_noise", name)
    chosen = generator.permutation(len(noisy))[: round(label_noise * len(noisy))]
    noisy[chosen] = noisy[generator.integers(0, len(noisy), len(chosen))]
    mean, std = float(noisy.mean()), float(noisy.std(correction=0))
    if not std > 0:
        raise UserError(f"the target of {name} is constant")
    parts = {"train": noisy, "validation": values[validation], "test": values[test]}
    targets = {part: ((value - mean) / std).float() for part, value in parts.items()}
    return _encoded(columns, rows, targets, (), mean, std, metric)


def _encoded(
    columns: Columns, rows: Mapping[str, Tensor], targets: Mapping[str, Tensor], classes: tuple[str, ...],
    mean: float, std: float, metric: str,
) -> Table:  # fmt: skip
    numeric = {name: x for name, x in columns.features.items() if x.dtype != object}
    words = {name: x for name, x in columns.features.items() if x.dtype == object}
    n = len(columns.target)
    numbers = torch.from_numpy(np.stack(list(numeric.values()), 1) if numeric else np.zeros((n, 0)))
    levels, codes = {}, np.zeros((n, len(words)), dtype=np.int64)
    for i, (name, column) in enumerate(words.items()):
        known = sorted({word for word in column[rows["train"].numpy()] if word is not None})
        code = {word: number for number, word in enumerate(known, 1)}
        codes[:, i] = [code.get(word, 0) for word in column]
        levels[name] = len(known) + 1
    encoded = torch.from_numpy(codes)
    parts = {part: Part(numbers[index], encoded[index], targets[part]) for part, index in rows.items()}
    return Table(parts, tuple(numeric), levels, classes, mean, std, metric)


def _embedded(name: str) -> Columns:
    """Read from the files inside scikit-learn, without importing it, which takes seconds."""

    def file(path: str) -> Path:
        return installed_file("sklearn", f"datasets/data/{path}", "scikit-learn")

    if name == "diabetes":
        with gzip.open(file("diabetes_data_raw.csv.gz"), "rt") as lines:
            x = np.loadtxt(lines)
        with gzip.open(file("diabetes_target.csv.gz"), "rt") as lines:
            y = np.loadtxt(lines)
    elif name == "digits":
        with gzip.open(file("digits.csv.gz"), "rt") as lines:
            x, y = _last_apart(np.loadtxt(lines, delimiter=","))
    else:
        path = {"wine": "wine_data.csv"}.get(name, f"{name}.csv")
        x, y = _last_apart(np.loadtxt(file(path), delimiter=",", skiprows=1))
    return Columns({str(i): column for i, column in enumerate(x.T)}, y)


def _last_apart(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return table[:, :-1], table[:, -1]


def _file(data: str, header: bool, data_dir: str | None) -> Any:
    """A text table with any of the usual delimiters as a pandas frame."""
    import pandas as pd

    path = Path(os.path.expanduser(data_dir or ""), os.path.expanduser(data))
    if not path.is_file():
        raise UserError(
            f"task.data={data}: there is no file {path}; possible: {', '.join(EMBEDDED)}, a CSV or TSV file, "
            "openml:NAME[:VERSION]"
        )
    try:
        return pd.read_csv(path, sep=_delimiter(path), header=0 if header else None, na_values=MISSING,
                           skipinitialspace=True, low_memory=False)  # fmt: skip
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"task.data={data} cannot be read as a table: {error}") from None


def _delimiter(path: Path) -> str:
    """The one that the first line has most of, outside quotes."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
        line = lines.readline()
    counts = {mark: len(next(csv.reader([line], delimiter=mark), [])) for mark in ",\t;| "}
    return max(counts, key=lambda mark: counts[mark])


def _openml(data: str, data_dir: str | None) -> tuple[Any, str | None]:
    """(frame, name of its default target) of an OpenML data set, from ``data_dir`` (default: scikit-learn's own folder)
    once it is there."""
    from sklearn.datasets import fetch_openml

    _, name, *version = data.split(":")
    if len(version) > 1 or not name or (version and not version[0].isdigit()):
        raise UserError(f"task.data={data} must be openml:NAME or openml:NAME:VERSION, as in openml:credit-g:1")
    home = os.path.expanduser(data_dir) if data_dir else None
    try:
        found = fetch_openml(name, version=int(version[0]) if version else "active", data_home=home, as_frame=True,
                             parser="pandas", n_retries=1)  # fmt: skip
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        raise UserError(
            f"task.data={data}: OpenML did not give it ({str(error).splitlines()[0]}); check the name, the version and "
            "the network, or save it as a CSV file and give its path"
        ) from None
    targets = found.target_names or []
    return found.frame, targets[0] if targets else None


def _column(column: Any, categorical: bool) -> np.ndarray:
    """A column of a frame: float64 with NaN, or objects (str or None)."""
    import pandas as pd

    is_category = isinstance(column.dtype, pd.CategoricalDtype)
    if pd.api.types.is_numeric_dtype(column) and not categorical and not is_category:
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return np.where(np.isfinite(values), values, np.nan)
    return np.array([None if pd.isna(word) else str(word) for word in column], dtype=object)
