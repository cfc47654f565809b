"""The numbers of the summary: for each (task, scheduler) its variants, and each variant against ``off``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from harness.record import BUSY_KINDS
from harness.report.load import Results
from harness.report.stats import kaplan_meier, median_of, paired_effect, signed_differences, wilcoxon_signed_rank
from harness.schema import OUTSIDE_IDENTITY
from harness.sweep import off_command

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

    budget: the common end B of the pairs' time axis; low, high: bounds of the median reduction (equal when identified);
    ci_low, ci_high: 95 %, see ``stats.paired_effect``; p: Wilcoxon.
    """

    pairs: int
    budget: float
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
    """All variants of one (task, scheduler) under one setting.

    setting: what tells it from other comparisons of the same task and scheduler; mostly empty. add_off: the commands
    that add the missing off cells; no_command: cells that lack off and whose command is not known, seeds by variant.
    Both empty if there are off cells. cells: those of ``Results`` that were compared, with until when each was followed
    (``end_wallclock``, ``end_gpu_hours``) and its T@tau (``time_wallclock``, ``time_gpu_hours``, and by validation
    ``time_validation_...``): a number, inf (finished without it) or NaN (not there yet).
    """

    task: str
    scheduler: str
    setting: dict[str, Any]
    metric: str
    tau: float
    variants: list[Variant]
    add_off: list[str]
    no_command: dict[str, list[int]]
    cells: pd.DataFrame = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the cells, for JSON."""
        numbers = asdict(replace(self, cells=pd.DataFrame()))
        del numbers["cells"]
        return numbers


Tau = float | Mapping[str, float | None] | None  # one target for all, or by setting; None: the recorded ones


def summary_tables(results: Results, tau: Tau = None) -> list[Comparison]:
    """Compare the variants of every setting; ``tau`` replaces the recorded targets (of the settings it has)."""
    if results.cells.empty:
        return []
    groups = [cells for _, cells in results.cells.groupby("setting")]
    groups.sort(key=lambda cells: tuple(cells.iloc[0][["task", "scheduler", "setting"]]))
    told_apart = _differences(results, [cells.iloc[0] for cells in groups])
    return [_compare(results, cells, differs, tau) for cells, differs in zip(groups, told_apart, strict=True)]


def _compare(results: Results, cells: pd.DataFrame, differs: dict[str, Any], tau: Tau) -> Comparison:
    first = cells.iloc[0]
    target = _target(cells, tau, results.warnings)
    reports = results.reports[results.reports["cell"].isin(cells["cell"])]
    cells = cells.assign(**times_to(cells, reports, target, str(first["mode"])))
    off = cells[cells["variant"] == OFF]
    names = sorted(cells["variant"].unique(), key=lambda name: (name != OFF, name))
    add_off, no_command = _add_off(results, cells) if off.empty else ([], {})
    return Comparison(
        task=str(first["task"]),
        scheduler=str(first["scheduler"]),
        setting=differs,
        metric=str(results.configs[first["cell"]]["task"].get("metric", "score")),
        tau=target,
        variants=[_variant(name, cells[cells["variant"] == name], off) for name in names],
        add_off=add_off,
        no_command=no_command,
        cells=cells,
    )


def _target(cells: pd.DataFrame, tau: Tau, warnings: list[str]) -> float:
    """The group's tau: as asked for, else as recorded.

    Cells recorded with different tau (it is no part of a cell's identity) all get the newest one's.
    """
    setting = cells.iloc[0]["setting"]
    if isinstance(tau, Mapping):
        if setting in tau:
            asked = tau[setting]
            return math.nan if asked is None else float(asked)
    elif tau is not None:
        return tau
    taus = cells.sort_values("opened")["tau"].dropna().astype(float)
    if taus.nunique() > 1:
        warnings.append(
            f"cells of {cells.iloc[0]['task']} / {cells.iloc[0]['scheduler']} were recorded with different tau "
            f"({', '.join(f'{t:g}' for t in sorted(taus.unique()))}); all are read with the newest, {taus.iloc[-1]:g}"
        )
    return float(taus.iloc[-1]) if len(taus) else math.nan


def times_to(cells: pd.DataFrame, reports: pd.DataFrame, tau: float, mode: str) -> dict[str, Any]:
    """Columns of the cells by unit: until when each was followed, and its T@tau, test and validation.

    end_: the cell's own end or, if shorter, the configured budget; time_: a number, inf (finished without reaching tau
    by then) or NaN (not there yet).
    """
    columns: dict[str, Any] = {}
    for unit, time in (("wallclock", "t"), ("gpu_hours", "gpu_hours")):
        budget = cells[f"budget_{unit}"].astype(float).fillna(math.inf).to_numpy()
        columns[f"end_{unit}"] = np.minimum(cells[unit].to_numpy(dtype=float), budget)
        for kind, score in (("", "incumbent_test_score"), ("validation_", "best_validation_score")):
            there = reports[score] >= tau if mode == "max" else reports[score] <= tau
            firsts = reports[there].drop_duplicates("cell").set_index("cell")[time]
            reached = firsts.reindex(cells["cell"]).to_numpy(dtype=float)
            late = np.isnan(reached) | (reached > budget)
            missing = np.where(cells["status"] == "finished", math.inf, math.nan)
            columns[f"time_{kind}{unit}"] = np.where(late, missing, reached)
    return columns


def _variant(name: str, cells: pd.DataFrame, off: pd.DataFrame) -> Variant:
    paired, missing = pair(cells, off)
    compared = name != OFF and not off.empty
    charged = sum(cells[f"busy_{kind}"].sum() for kind in BUSY_KINDS if kind != "test")
    flops = cells["flops_train"].sum() + cells["flops_warm_start"].sum()
    warm_started = int(cells["warm_started"].sum())
    return Variant(
        variant=name,
        n=len(cells),
        unfinished=int((cells["status"] != "finished").sum()),
        time={unit: _time_to_target(cells, unit) for unit in UNITS},
        validation_time={unit: _time_to_target(cells, unit, "validation_") for unit in UNITS},
        effect={unit: _against(paired, unit) for unit in UNITS} if compared else {},
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


def pair(cells: pd.DataFrame, off: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[int]]]:
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


def _time_to_target(cells: pd.DataFrame, unit: str, kind: str = "") -> TimeToTarget:
    times = cells[f"time_{kind}{unit}"].to_numpy(dtype=float)
    observed = np.isfinite(times)
    km = kaplan_meier(np.where(observed, times, cells[f"end_{unit}"]), observed)
    return TimeToTarget(km.quantile(0.5), km.quantile(0.25), km.quantile(0.75), int(observed.sum()),
                        int(np.isinf(times).sum()), int(np.isnan(times).sum()))  # fmt: skip


def _against(paired: pd.DataFrame, unit: str) -> Against:
    variant, off = (paired[f"time_{unit}_{side}"].to_numpy(dtype=float) for side in ("on", "off"))
    budget = common_end(paired, unit)
    effect = paired_effect(variant, off, budget)
    p = wilcoxon_signed_rank(signed_differences(variant, off, budget))
    return Against(effect.n, budget, effect.low, effect.high, *effect.ci, p, preliminary=effect.n < ENOUGH_PAIRS)


def common_end(paired: pd.DataFrame, unit: str) -> float:
    """The end B of the pairs' time axis: of the longest of their cells, no matter what else there is; NaN for none."""
    ends = paired[[f"end_{unit}_on", f"end_{unit}_off"]].to_numpy(dtype=float)
    return float(ends.max()) if len(ends) else math.nan


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _differences(results: Results, firsts: Sequence[pd.Series]) -> list[dict[str, Any]]:
    """For one cell of each setting: the entries in which it differs from others of its task and scheduler."""
    flat = [_setting_entries(results.configs[first["cell"]]) for first in firsts]
    differs = []
    for first, entries in zip(firsts, flat, strict=True):
        same = [(other["task"], other["scheduler"]) == (first["task"], first["scheduler"]) for other in firsts]
        twins = [twin for twin, belongs in zip(flat, same, strict=True) if belongs]
        names = sorted({name for twin in twins for name in twin})
        several = [name for name in names if len({json.dumps(twin.get(name)) for twin in twins}) > 1]
        seen = [json.dumps([twin.get(name) for name in several]) for twin in twins]
        if len(set(seen)) < len(seen):  # for example the order of a space's names
            differs.append({name: entries.get(name) for name in several} | {"setting": first["setting"]})
        else:
            differs.append({name: entries.get(name) for name in several})
    return differs


def _setting_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a setting is made of, for headings."""
    parts = {key: config.get(key) for key in ("task", "scheduler", "budget", "n_workers", "backend")}
    return {name: value for name, value in _leaves(parts).items() if name not in OUTSIDE_IDENTITY}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, entry in value.items() for k, v in _leaves(entry, f"{prefix}.{key}" if prefix else key).items()
    }


def _add_off(results: Results, cells: pd.DataFrame) -> tuple[list[str], dict[str, list[int]]]:
    """The commands that run the off cells of ``cells``, and the cells (seeds by variant) whose command is not known."""
    known = cells["cell"].isin(list(results.commands))
    commands = sorted({off_command(results.commands[cell]) for cell in cells[known]["cell"]})
    unknown = cells[~known].groupby("variant")["seed"]
    return commands, {str(variant): sorted(int(seed) for seed in seeds) for variant, seeds in unknown}


def ranges(seeds: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0..2,5``, the command line's own grammar."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
