"""Tables of learning curves, synthetic and recorded, that `bench_schedulers.py` lets schedulers run on.

    python scripts/curve_tables.py --data DIR      # what each table holds

A table holds for every configuration its value after 1..T steps of training, scaled to [0, 1] over the whole table and
maximised, so that the regret of a value y is 1 - y. NaN: the configuration has diverged by then. Recorded tables:

TaskSet (Metz et al., 2020; the subset of Kadra et al., DyHPO, 2022): 12 text RNNs, 8 optimiser hyperparameters, 51
steps, y = 1 - (ln loss - min) / (max - min) of the validation loss. As in DyHPO's experiments, rows with NaN are left
out and then rows with any loss >= the smallest per-step 95 % quantile. Logarithmic where DyHPO's features are.
OPDA (Lourie et al., 2024): AlexNet and ConvNeXt (ImageNet top-1), DeBERTa base and v3-base (MultiNLI matched accuracy).
Each configuration has its own length of training, whose end its learning-rate schedule is made for; a step is 1/T of
it, with T = 20 (ImageNet) or 6 (DeBERTa), and its value is that of the last evaluation within it. A curve that ends
early has diverged, perhaps before its first evaluation.
CNN-CIFAR10 (Klein et al., 2017): 256 small CNNs, 5 hyperparameters, validation error over 40 epochs.
"""

import argparse
import gzip
import json
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.schedulers.bo.encoding import Encoder
from harness.seeds import rng
from harness.space import Categorical, Float, Integer, Space

# Development: whatever was chosen by looking at results was chosen on these. Test: nothing was.
TASKSET_PREFIX = "FixedTextRNNClassification_imdb_"
TASKSET_DEV = ["patch128_LSTM128_embed128_bs64", "patch32_GRU64_avg_bs128", "patch32_IRNN64_relu_last_bs128",
               "patch32_LSTM128_E128_bs128", "patch32_VRNN128_tanh_bs128", "patch32_VRNN64_relu_avg_bs128"]  # fmt: skip
TASKSET_TEST = ["patch128_LSTM128_avg_bs64", "patch128_LSTM128_bs64", "patch32_GRU128_bs128",
                "patch32_IRNN64_relu_avg_bs128", "patch32_LSTM128_bs128", "patch32_VRNN64_tanh_avg_bs128"]  # fmt: skip
GROUPS = {
    "dev": [f"synthetic-{seed}" for seed in (1000, 1001, 1002)] + [f"taskset-{t}" for t in TASKSET_DEV] + ["convnext"],
    "test": [f"synthetic-{seed}" for seed in (0, 1, 2)] + [f"taskset-{t}" for t in TASKSET_TEST]
    + ["alexnet", "deberta-base", "deberta-v3-base", "cnn-cifar10"],
}  # fmt: skip
OPDA_FILES = {
    "alexnet": "alexnet/alexnet_tuning.results.jsonl",
    "convnext": "convnext/convnext-tiny_tuning.results.jsonl",
    "deberta-base": "deberta/deberta-base_tuning.results.jsonl",
    "deberta-v3-base": "deberta/deberta-v3-base_tuning.results.jsonl",
}
CNN_FILE = "cnn-cifar10-curves/configs_0_255.jsonl.gz"

TASKSET_SPACE = Space({
    "learning_rate": Float(1e-8, 1e1, log=True), "beta1": Float(0.0, 1.0), "beta2": Float(0.0, 1.0),
    "epsilon": Float(1e-10, 1e3), "l1": Float(1e-8, 1e1, log=True), "l2": Float(1e-8, 1e1, log=True),
    "linear_decay": Float(1e-7, 1e-4, log=True), "exponential_decay": Float(1e-6, 1e-3, log=True),
})  # fmt: skip
IMAGENET_SPACE = Space({
    "epochs": Integer(20, 100), "batch_size": Integer(128, 1024, log=True), "lr": Float(5e-3, 5e1, log=True),
    "lr_peak_epoch": Integer(0, 80), "momentum": Float(0.7, 1.0), "weight_decay": Float(1e-6, 1e-3, log=True),
    "label_smoothing": Float(0.0, 0.5),
})  # fmt: skip
DEBERTA_SPACE = Space({
    "num_train_epochs": Integer(1, 4), "train_batch_size": Integer(16, 64),
    "learning_rate": Float(1e-6, 1e-3, log=True), "warmup_steps": Integer(0, 15000), "cls_drop_out": Float(0.0, 0.3),
})  # fmt: skip
CNN_SPACE = Space({
    "batch_size": Float(32.0, 512.0), "log10_learning_rate": Float(-6.0, 0.0),
    **{f"log2_n_units_{layer}": Float(4.0, 10.0) for layer in (1, 2, 3)},
})  # fmt: skip
IMAGENET_STEPS, DEBERTA_STEPS = 20, 6  # the most for which every curve that did not diverge has a value in each step
SYNTHETIC_SPACE = Space({
    "lr": Float(1e-5, 1.0, log=True), "momentum": Float(0.0, 0.99), "width": Integer(16, 1024, log=True),
    "layers": Integer(1, 8), "activation": Categorical(("relu", "tanh", "gelu")),
})  # fmt: skip
SYNTHETIC_CONFIGS, SYNTHETIC_STEPS = 1000, 27


class TableError(ValueError):
    """A table that does not exist, or whose file is missing or damaged."""


@dataclass(frozen=True)
class Table:
    """``values[i, t - 1]``: of ``configs[i]`` after ``t`` steps, in [0, 1], maximised, NaN once it has diverged.

    ``seconds``: what each step took, same shape; None if that was not recorded. ``rows[i]``: the line of configuration
    i in the recorded table, which may hold more.
    """

    name: str
    space: Space
    configs: list[dict[str, Any]]
    values: np.ndarray
    seconds: np.ndarray | None = None
    rows: Sequence[int] = ()

    @property
    def max_t(self) -> int:
        return int(self.values.shape[1])


def table_names(words: str) -> list[str]:
    """The tables of a comma-separated list of names and groups (``dev``, ``test``). Raises TableError."""
    names = [name for word in words.split(",") for name in GROUPS.get(word, [word])]
    known = {name for group in GROUPS.values() for name in group}
    for name in names:
        if name not in known and not name.removeprefix("synthetic-").isdigit():
            raise TableError(f"no table {name!r}; possible: dev, test, synthetic-SEED, {', '.join(sorted(known))}")
    return list(dict.fromkeys(names))


def load_tables(names: Iterable[str], data: Path | None) -> list[Table]:
    """``data``: the folder of the recorded tables (None: there is none). Raises TableError."""
    names = list(names)
    recorded = [name for name in names if not name.startswith("synthetic-")]
    if recorded and data is None:
        raise TableError(f"table {recorded[0]} is a recorded one: give the folder of the recorded tables with --data")
    texts = _read_files({name: _file_of(name) for name in recorded}, data) if data is not None else {}
    return [_parse(name, texts[name]) if name in texts else synthetic(int(name.split("-")[1])) for name in names]


def _file_of(name: str) -> str:
    if name.startswith("taskset-"):
        return f"taskset/{TASKSET_PREFIX}{name.removeprefix('taskset-')}.json"
    return CNN_FILE if name == "cnn-cifar10" else f"opda/{OPDA_FILES[name]}"


def _read_files(files: Mapping[str, str], data: Path) -> dict[str, bytes]:
    """The contents by table, from unpacked files or else from ``<first folder>.tar.xz``, each archive read once."""
    texts = {name: (data / file).read_bytes() for name, file in files.items() if (data / file).exists()}
    missing = {file: name for name, file in files.items() if name not in texts}
    for archive in sorted({data / f"{file.split('/')[0]}.tar.xz" for file in missing}):
        if archive.exists():
            with tarfile.open(archive) as members:
                for member in members:
                    content = members.extractfile(member) if member.name in missing else None
                    if content is not None:
                        texts[missing.pop(member.name)] = content.read()
    if missing:
        file = next(iter(missing))
        raise TableError(f"{data} holds neither {file} nor {file.split('/')[0]}.tar.xz with it")
    return texts


def _parse(name: str, text: bytes) -> Table:
    try:
        if name.startswith("taskset-"):
            return taskset(name, text)
        return cnn(name, text) if name == "cnn-cifar10" else opda(name, text)
    except (KeyError, TypeError, IndexError, EOFError, OSError, json.JSONDecodeError) as error:
        raise TableError(f"table {name}: its file is not in the published format ({error!r})") from error


def taskset(name: str, text: bytes) -> Table:
    """A task of TaskSet from its JSON: a list of {hp: {name: value}, valid: {loss: [51 values]}, ...}."""
    entries = json.loads(text)
    losses = np.array([entry["valid"]["loss"] for entry in entries], dtype=float)
    rows = np.flatnonzero(~np.isnan(losses).any(axis=1))
    limit = np.quantile(losses[rows], 0.95, axis=0).min()
    rows = rows[(losses[rows] < limit).all(axis=1)]
    configs = [{key: entries[row]["hp"][key] for key in TASKSET_SPACE} for row in rows]
    return Table(name, TASKSET_SPACE, configs, 1.0 - scaled(np.log(losses[rows])), rows=rows.tolist())


def opda(name: str, text: bytes) -> Table:
    """A table of OPDA from its JSON lines, one configuration each."""
    entries = [json.loads(line) for line in text.splitlines()]
    if name.startswith("deberta"):
        space, steps, curve_of = DEBERTA_SPACE, DEBERTA_STEPS, _deberta_curve
    else:
        space, steps, curve_of = IMAGENET_SPACE, IMAGENET_STEPS, _imagenet_curve
    curves = [resample(*curve_of(entry), steps) for entry in entries]
    values, clock = (np.array(side) for side in zip(*curves, strict=True))
    configs = [{key: entry[key] for key in space} for entry in entries]
    seconds = None if np.isnan(clock).all() else _filled(np.diff(clock, axis=1, prepend=0.0))
    return Table(name, space, configs, scaled(values), seconds, range(len(entries)))


def _imagenet_curve(entry: Mapping[str, Any]) -> tuple[list[float], list[float], list[float]]:
    """Accuracies, when they were measured as shares of the training, and seconds since its start."""
    points = entry["learning_curve"]
    shares = [(point["epoch"] + 1) / entry["epochs"] for point in points]
    return [point["top_1"] for point in points], shares, [point["time"] for point in points]


def _deberta_curve(entry: Mapping[str, Any]) -> tuple[list[float], list[float], list[float]]:
    points = entry["learning_curves"]["matched"]
    shares = [step / entry["total_model_steps"] for step, _ in points]
    return [value for _, value in points], shares, [math.nan] * len(points)


def resample(
    values: Sequence[float], shares: Sequence[float], clock: Sequence[float], steps: int
) -> tuple[list[float], list[float]]:
    """Value and clock of the last evaluation within each of ``steps`` equal shares of the training; NaN from the first
    one without any, because evaluation has stopped there. ``shares`` ascend in (0, 1]; each step holds one unless the
    training diverged."""
    step_values: list[float] = []
    step_clock: list[float] = []
    used = 0
    for step in range(1, steps + 1):
        last = used
        while last < len(values) and shares[last] <= step / steps + 1e-9:
            last += 1
        ended = last == used or math.isnan(math.fsum(step_values))
        step_values.append(math.nan if ended else float(values[last - 1]))
        step_clock.append(math.nan if ended else float(clock[last - 1]))
        used = last
    return step_values, step_clock


def _filled(seconds: np.ndarray) -> np.ndarray:
    """A step that ended in divergence took what the row's steps took on average; with no such step, the table's."""
    rows = [np.nanmean(row) if not np.isnan(row).all() else np.nanmean(seconds) for row in seconds]
    return np.where(np.isnan(seconds), np.array(rows)[:, None], seconds)


def cnn(name: str, text: bytes) -> Table:
    """CNN-CIFAR10 from its gzipped JSON lines."""
    entries = [json.loads(line) for line in gzip.decompress(text).splitlines()]
    errors = np.array([entry["learning_curve"] for entry in entries], dtype=float)
    seconds = np.diff(np.array([entry["time_steps"] for entry in entries]), axis=1, prepend=0.0)
    configs = [{key: entry["config"][key] for key in CNN_SPACE} for entry in entries]
    return Table(name, CNN_SPACE, configs, 1.0 - scaled(errors), seconds, range(len(entries)))


def scaled(values: np.ndarray) -> np.ndarray:
    """Values mapped linearly to [0, 1] over the whole array; NaN stays."""
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low)


def synthetic(seed: int, n: int = SYNTHETIC_CONFIGS, steps: int = SYNTHETIC_STEPS) -> Table:
    """Losses that fall, exponentially or by a power law, to an asymptote with several valleys over the cube.

    Small learning rates are slower but often end lower, and speed differs otherwise by a random factor, so that curves
    cross; noise is small beside the spread of the asymptotes but not beside the differences among the best; some
    configurations of large learning rate diverge.
    """
    draw = rng(seed, "synthetic table", "configurations")
    configs = [SYNTHETIC_SPACE.sample(draw) for _ in range(n)]
    draw = rng(seed, "synthetic table", "curves")
    cube = Encoder(SYNTHETIC_SPACE).encode_all(configs)
    asymptote = _valleys(cube, draw)
    lr = cube[:, 0]
    speed = np.exp(3.0 * (lr - 0.7) + draw.normal(0.0, 0.4, n))  # in steps; fast ones are done within five
    step = np.arange(1, steps + 1)
    exponential = np.exp(-0.6 * speed[:, None] * step)
    power = (1.0 + speed[:, None] * step) ** -1.2
    decay = np.where(draw.random(n)[:, None] < 0.5, exponential, power)
    losses = asymptote[:, None] + (1.0 - asymptote[:, None]) * decay + draw.normal(0.0, 0.005, (n, steps))
    diverges = draw.random(n) < np.clip((lr - 0.85) * 4.0, 0.0, 0.9)
    since = draw.integers(1, steps + 1, n)
    losses[diverges[:, None] & (step >= since[:, None])] = np.nan
    return Table(f"synthetic-{seed}", SYNTHETIC_SPACE, configs, 1.0 - scaled(losses), rows=range(n))


def _valleys(cube: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Asymptotes (n,) in about [0.1, 0.9] of points (n, d): six Gaussian valleys, narrower ones are deeper."""
    centres = draw.uniform(0.1, 0.9, (6, cube.shape[1]))
    widths = np.linspace(0.35, 0.9, 6)
    depths = np.linspace(0.8, 0.4, 6) * draw.uniform(0.8, 1.0, 6)
    square = ((cube[:, None, :] - centres) ** 2).sum(axis=2)
    return 0.9 - (depths * np.exp(-square / (2.0 * widths**2))).max(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with taskset, opda, cnn-cifar10-curves")
    parser.add_argument("--tables", default="dev", help="dev, test, or names, with commas")
    options = parser.parse_args()
    try:
        tables = load_tables(table_names(options.tables), options.data)
    except TableError as error:
        parser.error(str(error))
    for table in tables:
        ends = table.values[:, -1]
        print(f"{table.name}: {len(table.configs)} configurations x {table.max_t} steps, {len(table.space)} "
              f"hyperparameters, {np.isnan(ends).mean():.0%} diverge, final regret "
              f"median {1 - np.nanmedian(ends):.3f}, 1st percentile {1 - np.nanquantile(ends, 0.99):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
