"""The numbers of the summary: for each (task, scheduler) its variants, and each variant against ``off``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.record import BUSY_KINDS
from harness.report.load import Results
from harness.report.stats import kaplan_meier, median_of, paired_effect, signed_differences, wilcoxon_signed_rank
from harness.seeds import rng

UNITS = ("wallclock", "gpu_hours")  # of the time to target: seconds since the cell's start; busy hours without test
ENOUGH_PAIRS = 30  # fewer is marked preliminary
OFF = "off"


@dataclass(frozen=True)
class TimeToTarget:
    """T@tau of one variant in one unit: Kaplan-Meier median and quartiles (inf = not reached by that share)."""

    median: float
    q25: float
    q75: float
    reached: int
    censored: int  # finished without reaching tau
    pending: int  # unfinished and not there yet


@dataclass(frozen=True)
class Against:
    """One variant against off in one unit, over pairs of finished cells of the same seed.

    low, high: bounds of the median reduction (equal when identified); ci_low, ci_high: 95 % bootstrap; p: Wilcoxon.
    """

    pairs: int
    low: float
    high: float
    ci_low: float
    ci_high: float
    p: float
    preliminary: bool


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: medians over the cells, shares of the sums over the cells, mean busy hours a cell."""

    variant: str
    n: int
    unfinished: int
    time: dict[str, TimeToTarget]
    validation_time: dict[str, TimeToTarget]
    effect: dict[str, Against]  # empty for off itself and where no off cell exists
    best_validation_score: float
    incumbent_test_score: float
    busy_hours: dict[str, float]
    warm_start_share: dict[str, float]
    peak_memory: dict[str, float]  # bytes
    warm_started: int
    fallback_share: float
    failures: int
    missing: dict[str, list[int]]  # seeds without a pair: only_here, only_off, unfinished


@dataclass(frozen=True)
class Comparison:
    """All variants of one (task, scheduler) under one setting. budget: the common end B of the time axis by unit."""

    task: str
    scheduler: str
    setting: dict[str, Any]  # what tells it from other comparisons of the same task and scheduler; mostly empty
    metric: str
    tau: float
    budget: dict[str, float]
    variants: list[Variant]
    add_off: str | None  # the command that adds the missing off cells, None if there are some

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def summary_tables(results: Results, tau: float | None = None) -> list[Comparison]:
    """Compare the variants of every (task, scheduler, setting); ``tau`` replaces the recorded targets."""
    if results.cells.empty:
        return []
    groups: Any = results.cells.groupby(["task", "scheduler", "setting"], sort=True)
    told_apart = _differences([key for key, _ in groups])
    return [_compare(results, cells, told_apart[key], tau) for key, cells in groups]


def _compare(results: Results, cells: pd.DataFrame, differs: dict[str, Any], tau: float | None) -> Comparison:
    first = cells.iloc[0]
    target = tau if tau is not None else _target(cells, results.warnings)
    reports = results.reports[results.reports["cell"].isin(cells["cell"])]
    budget = {unit: _budget(cells, unit) for unit in UNITS}
    cells = cells.assign(**_times(cells, reports, target, str(first["mode"]), budget))
    off = cells[cells["variant"] == OFF]
    names = sorted(cells["variant"].unique(), key=lambda name: (name != OFF, name))
    config = results.configs[first["cell"]]
    return Comparison(
        task=str(first["task"]),
        scheduler=str(first["scheduler"]),
        setting=differs,
        metric=str(config["task"].get("metric", "score")),
        tau=target,
        budget=budget,
        variants=[_variant(name, cells[cells["variant"] == name], off, budget) for name in names],
        add_off=_add_off(config, sorted(cells["seed"].unique())) if off.empty else None,
    )


def _target(cells: pd.DataFrame, warnings: list[str]) -> float:
    """The group's tau; cells of different tau (it is no part of a cell's identity) all get the newest one's."""
    taus = cells.sort_values("opened")["tau"].dropna().astype(float)
    if taus.nunique() > 1:
        warnings.append(
            f"cells of {cells.iloc[0]['task']} / {cells.iloc[0]['scheduler']} were recorded with different tau "
            f"({', '.join(f'{t:g}' for t in sorted(taus.unique()))}); all are read with the newest, {taus.iloc[-1]:g}"
        )
    return float(taus.iloc[-1]) if len(taus) else math.nan


def _budget(cells: pd.DataFrame, unit: str) -> float:
    """B: the longest cell, or the configured budget where that is shorter."""
    configured = cells[f"budget_{unit}"].dropna().astype(float)
    longest = float(cells[unit].max())
    return min(longest, float(configured.iloc[0])) if len(configured) else longest


def _times(
    cells: pd.DataFrame, reports: pd.DataFrame, tau: float, mode: str, budget: Mapping[str, float]
) -> dict[str, Any]:
    """T@tau of each cell by unit, test and validation: a number, inf (budget used up) or NaN (not there yet)."""
    times: dict[str, Any] = {}
    for kind, score in (("", "incumbent_test_score"), ("validation_", "best_validation_score")):
        there = reports[score] >= tau if mode == "max" else reports[score] <= tau
        firsts = reports[there].drop_duplicates("cell").set_index("cell")
        for unit, column in (("wallclock", "t"), ("gpu_hours", "gpu_hours")):
            reached = firsts[column].reindex(cells["cell"]).to_numpy(dtype=float)
            late = np.isnan(reached) | (reached > budget[unit])
            missing = np.where(cells["status"] == "finished", math.inf, math.nan)
            times[f"time_{kind}{unit}"] = np.where(late, missing, reached)
    return times


def _variant(name: str, cells: pd.DataFrame, off: pd.DataFrame, budget: Mapping[str, float]) -> Variant:
    paired, missing = _pair(cells, off)
    compared = name != OFF and not off.empty
    charged = sum(cells[f"busy_{kind}"].sum() for kind in BUSY_KINDS if kind != "test")
    flops = cells["flops_train"].sum() + cells["flops_warm_start"].sum()
    warm_started = int(cells["warm_started"].sum())
    return Variant(
        variant=name,
        n=len(cells),
        unfinished=int((cells["status"] != "finished").sum()),
        time={unit: _time_to_target(cells, f"time_{unit}", unit, budget[unit]) for unit in UNITS},
        validation_time={unit: _time_to_target(cells, f"time_validation_{unit}", unit, budget[unit]) for unit in UNITS},
        effect={unit: _against(paired, unit, budget[unit], name) for unit in UNITS} if compared else {},
        best_validation_score=median_of(cells["best_validation_score"].to_numpy(dtype=float)),
        incumbent_test_score=median_of(cells["incumbent_test_score"].to_numpy(dtype=float)),
        busy_hours={kind: float(cells[f"busy_{kind}"].mean()) / 3600 for kind in BUSY_KINDS},
        warm_start_share={
            "busy": _ratio(cells["busy_warm_start"].sum(), charged),
            "flops": _ratio(cells["flops_warm_start"].sum(), flops),
        },
        peak_memory={
            kind: median_of(cells[f"peak_memory_{kind}"].to_numpy(dtype=float)) for kind in ("train", "warm_start")
        },
        warm_started=warm_started,
        fallback_share=_ratio(cells["fallbacks"].sum(), warm_started),
        failures=int(cells["failures"].sum()),
        missing=missing if compared else {},
    )


def _pair(cells: pd.DataFrame, off: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """Pairs of finished cells (index seed, columns with suffixes _on and _off), and the seeds that form none."""
    both = cells.set_index("seed").add_suffix("_on").join(off.set_index("seed").add_suffix("_off"), how="inner")
    finished = (both["status_on"] == "finished") & (both["status_off"] == "finished")
    here, there = set(cells["seed"]), set(off["seed"])
    missing = {
        "only_here": sorted(int(seed) for seed in here - there),
        "only_off": sorted(int(seed) for seed in there - here),
        "unfinished": sorted(int(seed) for seed in both.index[~finished]),
    }
    return both[finished].sort_index(), missing


def _time_to_target(cells: pd.DataFrame, column: str, unit: str, budget: float) -> TimeToTarget:
    times = cells[column].to_numpy(dtype=float)
    pending = np.isnan(times)
    observed = np.isfinite(times)
    so_far = np.minimum(cells[unit].to_numpy(dtype=float), budget)  # unfinished: followed until now
    km = kaplan_meier(np.where(observed, times, np.where(pending, so_far, budget)), observed)
    return TimeToTarget(km.quantile(0.5), km.quantile(0.25), km.quantile(0.75), int(observed.sum()),
                        int(np.isinf(times).sum()), int(pending.sum()))  # fmt: skip


def _against(paired: pd.DataFrame, unit: str, budget: float, name: str) -> Against:
    variant, off = (paired[f"time_{unit}_{side}"].to_numpy(dtype=float) for side in ("on", "off"))
    effect = paired_effect(variant, off, budget, rng(0, "bootstrap", unit, name))
    p = wilcoxon_signed_rank(signed_differences(variant, off, budget))
    return Against(effect.n, effect.low, effect.high, *effect.ci, p, preliminary=effect.n < ENOUGH_PAIRS)


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _differences(keys: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """For each (task, scheduler, setting): the entries in which it differs from others of its task and scheduler."""
    flat = {key: _leaves(json.loads(key[2])) for key in keys}
    differs = {}
    for key in keys:
        twins = [flat[other] for other in keys if other[:2] == key[:2]]
        names = sorted({name for twin in twins for name in twin})
        several = [name for name in names if len({json.dumps(twin.get(name)) for twin in twins}) > 1]
        differs[key] = {name: flat[key].get(name) for name in several}
    return differs


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, entry in value.items() for k, v in _leaves(entry, f"{prefix}.{key}" if prefix else key).items()
    }


def _add_off(config: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """The command that runs the off cells belonging to cells of ``config`` and ``seeds``."""
    labels = config["labels"]
    words = [*_choice("scheduler", str(labels["scheduler"])), *_choice("task", str(labels["task"])), "ohgw=off"]
    words.append(f"seed={ranges(seeds)}")
    words += [f"budget.{key}={value}" for key, value in config["budget"].items() if isinstance(value, (int, float))]
    words += [f"{key}={config[key]}" for key in ("n_workers", "name", "results_dir") if config.get(key) is not None]
    return "python -m harness " + " ".join(_quoted(word) for word in words)


def _choice(group: str, label: str) -> list[str]:
    """``asha(eta=4)`` -> ``scheduler=asha scheduler.eta=4``."""
    preset, _, changed = label.partition("(")
    return [f"{group}={preset}", *(f"{group}.{part}" for part in _split(changed.removesuffix(")")))]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{(") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _quoted(word: str) -> str:
    return f"'{word}'" if any(char in word for char in " []{}()&;$*?~") else word


def ranges(seeds: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0..2,5``, the command line's own grammar."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
