"""Time to target: Kaplan-Meier curves, effects over pairs, and how these change with the target."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.report.compare import ENOUGH_PAIRS, OFF, UNITS, Variant, pair, ranges, times_to
from harness.report.document import Figure, Section, Table, file_name
from harness.report.stats import (
    holm,
    kaplan_meier,
    paired_effect,
    rank_biserial,
    restricted_mean,
    restricted_mean_reduction,
    sd_ratio,
    signed_differences,
)
from harness.report.study import Condition, Study
from harness.report.tables import RULES, notes, p_value, percent
from harness.seeds import rng

AXES = {"wallclock": "wall-clock time (s)", "gpu_hours": "GPU-hours"}
SYMBOLS = {"wallclock": "s", "gpu_hours": "h"}
NAMES = {"wallclock": "wall-clock", "gpu_hours": "GPU-hours"}
TARGETS = 17  # of the sweep over tau: steps of 1/16 of the range of scores
RANGE = (0.05, 0.95)  # of the final test scores, quantiles that the sweep goes from and to
FOREST_ROWS = 48  # of one figure: what fits a page
RESAMPLES = 2_000  # of the fallback effect and the SD ratio: an end of an interval is good to about 0.1 of its length

TEXT = (
    *RULES[:4],
    RULES[-1],
    "Holm p: adjusted for all (condition, variant) tuples of this report in the same unit that have a p. "
    "Rank-biserial: effect size of the signed-rank test from -1 to 1, positive = the variant is sooner in more (and "
    "larger) pairs. SD ratio: SD of min(T, B) over the pairs, variant over off.",
    "Restricted mean: area under the Kaplan-Meier curve up to the stated horizon. Fallback effect: 1 - mean(min(T, "
    "B)) / mean(min(T_off, B)) over the pairs. It is to be read instead of the median reduction where fewer than "
    "half of the pairs reach tau on a side (column 'read'), and it depends on B.",
)

Followed = dict[str, tuple[NDArray[np.float64], NDArray[np.bool_]]]  # variant -> (event or censoring times, observed)


def section(study: Study) -> Section:
    """Curves, tables, the sweep over targets and the pairs of each condition; the effects of all in one figure."""
    section = Section("time-to-target", "Time to target")
    if not study.conditions:
        section.notes.append("There are no usable cells, hence no times to target.")
        return section
    section.text += TEXT
    adjusted, changes = _adjusted(study), incumbent_changes(study.results.reports)
    effects: list[tuple[Condition, Table]] = []
    for condition in study.conditions:
        section.notes += _uncompared(condition)
        if math.isnan(condition.tau):
            section.notes.append(
                f"{condition.label}: no target is set (task.tau), so only the sweep over targets is shown."
            )
        else:
            tables = [table for unit in UNITS for table in _tables(condition, unit, adjusted)]
            section.tables += tables
            effects += [(condition, table) for table in tables if table.name.startswith("effect-")]
            section.figures += [_survival(condition, study.colors), *_pairs(condition, study.colors)]
        _add_sweep(section, condition, changes, study.colors)
    section.figures += _forest(study)
    section.tables += [*_all_effects(effects), *_missing(study)]
    return section


def _uncompared(condition: Condition) -> list[str]:
    """Why a condition has no effects."""
    if set(condition.variants) == {OFF}:
        return [f"{condition.label}: there is no variant besides off, hence no effect."]
    return [] if OFF in condition.variants else [f"{condition.label}: {line}" for line in notes(condition.comparison)]


# ---- tables


def _tables(condition: Condition, unit: str, adjusted: Mapping[tuple[str, str, str], float]) -> Iterator[Table]:
    words, name, goal = unit.replace("_", "-"), NAMES[unit], _goal(condition)
    horizon = _horizon(condition.cells, unit)
    frame = pd.DataFrame([_time_row(v, condition.cells, unit, horizon) for v in _variants(condition)])
    yield Table(
        file_name(f"time-to-target-{words}", *condition.words),
        f"Time to target in {name} ({SYMBOLS[unit]}), {goal}. reached, censored (finished without it), pending "
        "(unfinished and not there yet): cells. Median and quartiles by Kaplan-Meier, inf = not reached by that "
        "share of the cells. Restricted mean: area under the curve up to the horizon, the least over the variants of "
        "how long their longest finished cell was followed; '-' where no cell was followed that long.",
        frame,
    )
    off = condition.cells[condition.cells["variant"] == OFF]
    rows = [
        _effect_row(v, condition, unit, off, adjusted[_key(condition, v.variant, unit)])
        for v in _variants(condition)
        if v.effect
    ]
    if rows:
        shares = [column for column in rows[0] if column.startswith(("effect", "fallback", "CI", "its CI"))]
        yield Table(
            file_name(f"effect-{words}", *condition.words),
            f"Reduction of the time to target in {name} against off, {goal}: median over pairs of 1 - T/T_off "
            "(effect; from and to: the bounds that censoring leaves, equal where it is identified) with its 95 % "
            f"interval, two-sided Wilcoxon signed-rank p ({_censoring()}), Holm p over all tuples of the report, "
            "rank-biserial effect size, SD ratio of min(T, B). Fallback: reduction of the mean of min(T, B) with its "
            "95 % bootstrap interval, to be read where a side reaches tau in fewer than half of the pairs. Fewer "
            f"than {ENOUGH_PAIRS} pairs are preliminary.",
            pd.DataFrame(rows),
            {**dict.fromkeys(shares, percent), "p": p_value, "Holm p": p_value},
        )


def _all_effects(effects: Sequence[tuple[Condition, Table]]) -> Iterator[Table]:
    """The rows of all conditions in one table a unit, to be sorted and filtered by what the conditions are."""
    for unit in UNITS:
        name = f"effect-{unit.replace('_', '-')}"
        own = [(condition, table) for condition, table in effects if table.name.startswith(f"{name}_")]
        rows = []
        for condition, table in own:
            what = {"task": condition.task, "task family": condition.family, "scheduler": condition.scheduler,
                    "discrete share": condition.discrete_share, "condition": condition.label}  # fmt: skip
            rows.append(pd.DataFrame({**what, **table.frame}))
        if len(own) > 1:
            caption = (
                f"Reduction of the time to target in {NAMES[unit]}: all conditions, columns as in their own tables."
            )
            formats = {**own[0][1].formats, "discrete share": percent}
            yield Table(f"{name}_all", caption, pd.concat(rows, ignore_index=True), formats)


def _goal(condition: Condition) -> str:
    sign = "at most" if condition.mode == "min" else "at least"
    return f"{condition.label}: test {condition.metric} {sign} {condition.tau:g}"


def _censoring() -> str:
    return "neither reached: tie; only one did: it wins, ranked by B - T"


def _horizon(cells: pd.DataFrame, unit: str) -> float:
    finished = cells[cells["status"] == "finished"]
    return float(finished.groupby("variant")[f"end_{unit}"].max().min())


def _followed(cells: pd.DataFrame, unit: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Event or censoring times of the cells, and which are events."""
    times = cells[f"time_{unit}"].to_numpy(dtype=float)
    observed = np.isfinite(times)
    return np.where(observed, times, cells[f"end_{unit}"].to_numpy(dtype=float)), observed


def _time_row(variant: Variant, cells: pd.DataFrame, unit: str, horizon: float) -> dict[str, Any]:
    time = variant.time[unit]
    times, observed = _followed(cells[cells["variant"] == variant.variant], unit)
    known = times.max() >= horizon or observed.all()
    return {
        "variant": variant.variant, "n": variant.n, "unfinished": variant.unfinished, "reached": time.reached,
        "censored": time.censored, "pending": time.pending, "median": time.median, "q25": time.q25, "q75": time.q75,
        "restricted mean": restricted_mean(times, observed, horizon) if known else math.nan, "horizon": horizon,
    }  # fmt: skip


def _effect_row(variant: Variant, condition: Condition, unit: str, off: pd.DataFrame, holm_p: float) -> dict[str, Any]:
    effect = variant.effect[unit]
    cells = condition.cells[condition.cells["variant"] == variant.variant]
    times, off_times = _paired_times(pair(cells, off)[0], unit)
    names = (unit, condition.label, variant.variant)
    fallback = restricted_mean_reduction(times, off_times, effect.budget, rng(0, "restricted mean", *names), RESAMPLES)
    spread = sd_ratio(times, off_times, effect.budget, rng(0, "sd ratio", *names), RESAMPLES)
    shares = [float(np.isfinite(side).mean()) if effect.pairs else math.nan for side in (times, off_times)]
    return {
        "variant": variant.variant, "pairs": effect.pairs, "B": effect.budget,
        "effect from": effect.low, "effect to": effect.high, "CI low": effect.ci_low, "CI high": effect.ci_high,
        "p": effect.p, "Holm p": holm_p,
        "rank-biserial": rank_biserial(signed_differences(times, off_times, effect.budget)), "SD ratio": spread.value,
        "fallback": fallback.value, "its CI low": fallback.ci[0], "its CI high": fallback.ci[1],
        "read": None if not effect.pairs else "fallback" if min(shares) < 0.5 else "effect",
    }  # fmt: skip


def _paired_times(paired: pd.DataFrame, unit: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    variant, off = (paired[f"time_{unit}_{side}"].to_numpy(dtype=float) for side in ("on", "off"))
    return variant, off


def _key(condition: Condition, variant: str, unit: str) -> tuple[str, str, str]:
    return condition.label, variant, unit


def _compared(study: Study) -> Iterator[tuple[Condition, Variant]]:
    """Those with a target, a variant against off."""
    for condition in study.conditions:
        if not math.isnan(condition.tau):
            yield from ((condition, variant) for variant in _variants(condition) if variant.effect)


def _variants(condition: Condition) -> list[Variant]:
    """In the report's order."""
    return sorted(condition.comparison.variants, key=lambda variant: condition.variants.index(variant.variant))


def _adjusted(study: Study) -> dict[tuple[str, str, str], float]:
    """Holm's p by condition, variant and unit; the family is a unit's tuples."""
    found: dict[tuple[str, str, str], float] = {}
    for unit in UNITS:
        keys = [_key(condition, variant.variant, unit) for condition, variant in _compared(study)]
        raw = [variant.effect[unit].p for _, variant in _compared(study)]
        found |= dict(zip(keys, holm(raw).tolist(), strict=True))
    return found


def _missing(study: Study) -> list[Table]:
    rows = [
        {
            "condition": condition.label,
            "variant": variant.variant,
            "no off cell": ranges(variant.missing["only_here"]),
            "no cell of the variant": ranges(variant.missing["only_off"]),
            "not both finished": ranges(variant.missing["unfinished"]),
        }
        for condition in study.conditions
        for variant in _variants(condition)
        if any(variant.missing.values())
    ]
    caption = "Seeds that form no pair with off, by the reason; every comparison is over the other seeds."
    return [Table("missing-pairs_all", caption, pd.DataFrame(rows))] if rows else []


# ---- Kaplan-Meier curves


def _survival(condition: Condition, colors: Mapping[str, Any]) -> Figure:
    groups = dict(list(condition.cells.groupby("variant")))
    followed = {unit: {name: _followed(groups[name], unit) for name in condition.variants} for unit in UNITS}
    return Figure(
        file_name("survival", *condition.words),
        f"Kaplan-Meier curves, {_goal(condition)}: share of the cells that have not reached the target by a time, in "
        "wall-clock (left) and GPU-hours without test evaluation (right). Ticks: cells censored there (they ended, "
        "or stand there unfinished, without the target). Below: cells still at risk (running and without the "
        f"target). {_counts(condition)}",
        draw_survival,
        {"followed": followed, "colors": {name: colors[name] for name in condition.variants}},
    )


def _counts(condition: Condition) -> str:
    parts = [f"{v.variant} {v.n}{f' ({v.unfinished} unfinished)' if v.unfinished else ''}"
             for v in _variants(condition)]  # fmt: skip
    return f"Cells: {', '.join(parts)}."


def draw_survival(followed: Mapping[str, Followed], colors: Mapping[str, Any]) -> Any:
    """A panel a unit; under it the number at risk at the axis's ticks."""
    from matplotlib.figure import Figure as Drawing

    rows = len(colors)
    drawing = Drawing(figsize=(7.2, 2.9 + 0.16 * rows), layout="constrained")
    axes = drawing.subplots(2, len(followed), sharex="col", height_ratios=[2.5, 0.2 + 0.16 * rows], squeeze=False)
    for column, (unit, curves) in enumerate(followed.items()):
        top, bottom = axes[:, column]
        for name, (times, observed) in curves.items():
            _draw_curve(top, times, observed, color=colors[name], label=name)
        end = max((times.max() for times, _ in curves.values()), default=0.0) or 1.0
        top.set(
            ylim=(-0.02, 1.03),
            xlim=(-0.02 * end, 1.02 * end),
            ylabel="cells without the target (share)" if not column else "",
        )
        top.locator_params(axis="x", nbins=5)
        top.ticklabel_format(axis="x", scilimits=(-2, 5))
        top.tick_params(labelbottom=True)
        top.set_xlabel(AXES[unit])
        _draw_at_risk(bottom, curves, colors, [tick for tick in top.get_xticks() if 0 <= tick <= end], names=not column)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=min(rows, 5))
    return drawing


def _draw_curve(axis: Any, times: NDArray[np.float64], observed: NDArray[np.bool_], **style: Any) -> None:
    curve = kaplan_meier(times, observed)
    heights = np.concatenate([[1.0], curve.survival])
    axis.step(
        np.concatenate([[0.0], curve.times, [times.max()]]), np.append(heights, heights[-1]), where="post", **style
    )
    censored = np.sort(times[~observed])
    at = heights[np.searchsorted(curve.times, censored, side="right")]
    axis.plot(censored, at, "|", color=style["color"], markersize=7, markeredgewidth=1.1)


def _draw_at_risk(axis: Any, curves: Followed, colors: Mapping[str, Any], ticks: Sequence[float], names: bool) -> None:
    for row, (name, (times, _)) in enumerate(curves.items()):
        for tick in ticks:
            axis.text(
                tick, row, str(int((times >= tick).sum())), ha="center", va="center", fontsize=7, color=colors[name]
            )
    axis.set(ylim=(len(curves) - 0.5, -0.7), yticks=range(len(curves)))
    axis.set_yticklabels(list(curves) if names else [], fontsize=7)
    axis.set_title("number at risk", fontsize=7, loc="left", pad=2)
    axis.grid(False)
    axis.tick_params(length=0, labelbottom=False)
    axis.tick_params(axis="y", pad=9)
    for side in axis.spines.values():
        side.set_visible(False)


# ---- the sweep over targets


def incumbent_changes(reports: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``Results.reports`` at which a cell's incumbent changes, with its reports so far (``count``).

    Between them all incumbent scores stay, so T@tau is at one of them, whatever tau is.
    """
    cell, *scores = (
        column.to_numpy()
        for column in (reports["cell"].cat.codes, reports["best_validation_score"], reports["incumbent_test_score"])
    )
    begins = np.ones(len(reports), dtype=bool)
    begins[1:] = cell[1:] != cell[:-1]
    new = begins.copy()
    new[1:] |= np.logical_or.reduce([score[1:] != score[:-1] for score in scores])
    rows, first = np.flatnonzero(new), np.flatnonzero(begins)
    count = rows - first[np.searchsorted(first, rows, side="right") - 1] + 1
    return reports[new].assign(count=count)


def _add_sweep(section: Section, condition: Condition, changes: pd.DataFrame, colors: Mapping[str, Any]) -> None:
    scores = condition.cells["incumbent_test_score"].to_numpy(dtype=float)
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        section.notes.append(f"{condition.label}: no cell has a test score yet, so there is no sweep over targets.")
        return
    frame = sweep(condition, changes, targets(scores, condition.tau))
    name, goal = file_name("tau-sweep", *condition.words), "at most" if condition.mode == "min" else "at least"
    about = (
        f"{condition.label}: the effect for other targets (test {condition.metric} {goal} the target), from the 5 % "
        "to the 95 % quantile of the final test scores of all its cells, and on to the recorded target where that is "
        "outside"
    )
    formats = dict.fromkeys(["share reached", "effect from", "effect to", "CI low", "CI high"], percent)
    section.tables.append(
        Table(
            name,
            f"{about}. Share reached: of the variant's cells, unfinished ones as they stand. Effect: median over "
            "pairs of 1 - T/T_off (from and to: the bounds that censoring leaves) with its 95 % interval. Recorded: "
            "the task's tau.",
            frame,
            formats,
        )
    )
    tau = "" if math.isnan(condition.tau) else f" Dotted: the recorded tau {condition.tau:g}."
    section.figures.append(
        Figure(
            name,
            f"{about}. Upper panels: median over pairs of 1 - T/T_off, positive = sooner than off, in wall-clock and "
            "GPU-hours without test evaluation; thin bars: its 95 % interval (none where it is all of -100 % to 100 "
            "%); thick bars: its bounds where censoring leaves it open. What is below -100 % is drawn there. Bottom: "
            "share of the cells that reach the target, wall-clock. Targets are evenly spaced, whatever lies "
            f"between.{tau} {_counts(condition)}",
            draw_sweep,
            {
                "frame": frame,
                "tau": condition.tau,
                "metric": condition.metric,
                "colors": {variant: colors[variant] for variant in condition.variants},
            },
        )
    )


def targets(scores: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """Targets from the 5 % to the 95 % quantile of ``scores`` (n,) in equal steps, ascending without repeats.

    ``tau`` is one of them unless it is NaN; where it is outside of that range, there are four steps up to it.
    """
    low, high = np.quantile(scores, RANGE)
    grid = np.linspace(low, high, TARGETS)
    if math.isnan(tau):
        return np.unique(grid)
    near = min(max(tau, grid[0]), grid[-1])
    return np.unique(np.append(grid, [tau] if near == tau else np.linspace(tau, near, 5)))


def sweep(condition: Condition, reports: pd.DataFrame, at: Sequence[float] | NDArray[np.float64]) -> pd.DataFrame:
    """A row a target of ``at``, unit and variant: share of cells that reach it, pairs, the effect with its interval.

    ``reports``: those of ``incumbent_changes``.
    """
    cells = condition.cells.reset_index(drop=True)
    cells["row"] = np.arange(len(cells))
    own = reports[reports["cell"].isin(cells["cell"])]
    groups = {name: cells[cells["variant"] == name] for name in condition.variants}
    pairs = {}
    for name, group in groups.items():
        if name != OFF and OFF in groups:
            paired, _ = pair(group, groups[OFF])
            pairs[name] = paired["row_on"].to_numpy(dtype=int), paired["row_off"].to_numpy(dtype=int)
    rows = []
    for target in at:
        columns = times_to(cells, own, float(target), condition.mode)
        for unit, (name, group) in itertools.product(UNITS, groups.items()):
            times, ends = columns[f"time_{unit}"], columns[f"end_{unit}"]
            row = {
                "target": float(target),
                "recorded": bool(target == condition.tau),
                "unit": NAMES[unit],
                "variant": name,
                "n": len(group),
                "share reached": float(np.isfinite(times[group["row"].to_numpy()]).mean()),
            }
            rows.append(row | _effect_at(times, ends, pairs.get(name)))
    return pd.DataFrame(rows)


def _effect_at(times: NDArray[np.float64], ends: NDArray[np.float64], rows: Any) -> dict[str, Any]:
    if rows is None or not len(rows[0]):
        return {"pairs": 0, **dict.fromkeys(("effect from", "effect to", "CI low", "CI high"), math.nan)}
    variant, off = rows
    effect = paired_effect(times[variant], times[off], float(max(ends[variant].max(), ends[off].max())))
    return {"pairs": effect.n, "effect from": effect.low, "effect to": effect.high,
            "CI low": effect.ci[0], "CI high": effect.ci[1]}  # fmt: skip


def draw_sweep(frame: pd.DataFrame, tau: float, metric: str, colors: Mapping[str, Any]) -> Any:
    """The effects in a panel a unit, and the share of cells that reach the target; targets are evenly spaced."""
    from matplotlib.figure import Figure as Drawing

    at = np.unique(frame["target"])
    drawing = Drawing(figsize=(7.2, 5.6), layout="constrained")
    axes = drawing.subplots(len(UNITS) + 1, 1, sharex=True, height_ratios=[3] * len(UNITS) + [2])
    for axis, unit in zip(axes, UNITS, strict=False):
        part = frame[frame["unit"] == NAMES[unit]]
        compared = [name for name in colors if name != OFF]
        for offset, name in zip(_offsets(len(compared)), compared, strict=True):
            _draw_effects(axis, np.arange(len(at)) + offset, part[part["variant"] == name], colors[name])
        axis.axhline(0.0, color="black", linewidth=0.6)
        axis.set_ylabel(f"reduction of T,\n{NAMES[unit]}")
        axis.margins(y=0.03)
    shares = frame[frame["unit"] == NAMES[UNITS[0]]]
    for name, color in colors.items():
        reached = shares[shares["variant"] == name]["share reached"]
        axes[-1].plot(np.arange(len(at)), reached, ".-", color=color, label=name, markersize=4, linewidth=1)
    axes[-1].set(ylim=(-0.05, 1.05), ylabel="cells that\nreach it", xlabel=f"target (test {metric})")
    axes[-1].set_xticks(np.arange(len(at)), [f"{target:.4g}" for target in at], rotation=60, fontsize=7)
    for axis in axes:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        if tau in at:
            axis.axvline(int(np.searchsorted(at, tau)), color="black", linestyle=":", linewidth=1)
    handles, labels = axes[-1].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5))
    return drawing


def _offsets(count: int) -> NDArray[np.float64]:
    """Where the variants' bars stand beside each other."""
    return (np.arange(count) - (count - 1) / 2) * 0.7 / max(1, count)


def _draw_effects(axis: Any, at: NDArray[np.float64], lines: pd.DataFrame, color: Any) -> None:
    """Points with thin bars for the intervals; thick bars where only bounds of the effect are known."""
    low, high, ci_low, ci_high = lines[["effect from", "effect to", "CI low", "CI high"]].to_numpy(dtype=float).T
    exact, told = low == high, ~((ci_low < -1.0) & (ci_high >= 1.0))
    low, high, ci_low, ci_high = (np.maximum(side, -1.0) for side in (low, high, ci_low, ci_high))
    axis.vlines(at[told], ci_low[told], ci_high[told], color=color, linewidth=0.9)
    open_ = ~exact & ~np.isnan(low)
    axis.vlines(at[open_], low[open_], high[open_], color=color, linewidth=3, alpha=0.4)
    for bound in (low, high):
        axis.plot(at[open_], bound[open_], "_", color=color, markersize=5)
    axis.plot(at, np.where(exact, low, math.nan), ".-", color=color, markersize=5, linewidth=0.5)


# ---- the pairs


def _pairs(condition: Condition, colors: Mapping[str, Any]) -> Iterator[Figure]:
    off = condition.cells[condition.cells["variant"] == OFF]
    panels = {}
    for name in condition.variants:
        paired, _ = pair(condition.cells[condition.cells["variant"] == name], off)
        if name != OFF and len(paired):
            panels[name] = _paired_times(paired, "wallclock")
    if not panels:
        return
    counts = ", ".join(f"{name} {len(times)}" for name, (times, _) in panels.items())
    yield Figure(
        file_name("pairs", *condition.words),
        f"Pairs, {_goal(condition)}: wall-clock seconds to the target of off and of the variant with the same seed, "
        "logarithmic; below the diagonal the variant is sooner. Triangles on the edge: only one side reached the "
        "target (upper edge: off, right edge: the variant); square in the corner: neither did, with the number of "
        f"such pairs. Pairs of finished cells: {counts}.",
        draw_pairs,
        {"panels": panels, "colors": {name: colors[name] for name in panels}},
    )


def draw_pairs(panels: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], colors: Mapping[str, Any]) -> Any:
    """A panel a variant, (its times, off's times) each, at most four abreast; all have the same axes."""
    from matplotlib.figure import Figure as Drawing

    across = min(4, len(panels))
    down = -(-len(panels) // across)
    width, height = 0.8 + 1.75 * across, 0.6 + 2.1 * down  # inches; a panel takes 1.5 by 1.5
    drawing = Drawing(figsize=(width, height))
    edges = {"left": 0.7 / width, "right": 1 - 0.1 / width, "bottom": 0.55 / height, "top": 1 - 0.5 / height}
    axes = drawing.subplots(
        down, across, squeeze=False, sharex=True, sharey=True, gridspec_kw={**edges, "wspace": 0.15, "hspace": 0.4}
    ).ravel()
    known = np.concatenate([side for both in panels.values() for side in both])
    known = known[np.isfinite(known) & (known > 0)]
    limits = (known.min() / 1.15, known.max() * 1.3) if len(known) else (0.5, 2.0)
    _log_axes(axes[0], limits)
    for axis, (name, (variant, off)) in zip(axes, panels.items(), strict=False):
        _draw_pairs(axis, variant, off, limits, colors[name])
        axis.set_title(name.replace("(", "\n(", 1), fontsize=8, pad=8)
    for i, axis in enumerate(axes):
        axis.set_visible(i < len(panels))
        axis.tick_params(labelbottom=i + across >= len(panels))
    drawing.supxlabel("T of off (s)", fontsize=9)
    drawing.supylabel("T of the variant (s)", fontsize=9)
    return drawing


def _log_axes(axis: Any, limits: tuple[float, float]) -> None:
    """The same few ticks on both; they are shared by all panels."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    close = limits[1] < 30 * limits[0]
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if close else (1.0,), numticks=5))
        scale.set_major_formatter(lambda value, _: f"{value:.3g}")
        scale.set_minor_locator(NullLocator())


def _draw_pairs(
    axis: Any,
    variant: NDArray[np.float64],
    off: NDArray[np.float64],
    limits: tuple[float, float],
    color: Any,
) -> None:
    high = limits[1]
    axis.plot(limits, limits, color="black", linewidth=0.6)
    late, off_late = np.isinf(variant), np.isinf(off)
    for marker, chosen in {".": ~late & ~off_late, "^": late & ~off_late, ">": ~late & off_late}.items():
        axis.plot(np.minimum(off[chosen], high), np.minimum(variant[chosen], high), marker, color=color, markersize=5,
                  markerfacecolor=color if marker == "." else "white", clip_on=False, zorder=3)  # fmt: skip
    if both := int((late & off_late).sum()):
        axis.plot([high], [high], "s", color=color, markerfacecolor="white", markersize=6, clip_on=False, zorder=3)
        axis.annotate(str(both), (high, high), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)


# ---- all effects


def _forest(study: Study) -> Iterator[Figure]:
    rows = [_forest_row(condition, variant) for condition, variant in _compared(study)]
    parts = [rows[i : i + FOREST_ROWS] for i in range(0, len(rows), FOREST_ROWS)]
    for i, part in enumerate(parts, start=1):
        whole = "" if len(parts) == 1 else f" Part {i} of {len(parts)}."
        yield Figure(
            file_name("effects", "all", *([i] if i > 1 else [])),
            "Reduction of the time to target against off, by condition and variant: median over pairs of 1 - T/T_off "
            "with its 95 % interval, in wall-clock (left) and GPU-hours without test evaluation (right); positive = "
            "sooner than off. Open markers: censoring leaves the median open, the thick bar spans its bounds. An "
            f"arrow: it goes on beyond -100 %. In brackets: pairs, * = fewer than {ENOUGH_PAIRS}, preliminary.{whole}",
            draw_forest,
            {
                "rows": part,
                "colors": {row.variant: study.colors[row.variant] for row in part},
                "titles": [f"reduction of T, {NAMES[unit]}" for unit in UNITS],
                "reference": 0.0,
                "least": -1.0,
            },
        )


@dataclass(frozen=True)
class ForestRow:
    """A line of a forest plot. bounds: in each panel the estimate's bounds (equal if it is known) and its interval."""

    head: str
    variant: str
    label: str
    bounds: Sequence[tuple[float, float, float, float]]


def _forest_row(condition: Condition, variant: Variant) -> ForestRow:
    effects = [variant.effect[unit] for unit in UNITS]
    label = f"{variant.variant} ({effects[0].pairs}{'*' if effects[0].preliminary else ''})"
    bounds = [(effect.low, effect.high, effect.ci_low, effect.ci_high) for effect in effects]
    return ForestRow(condition.label, variant.variant, label, bounds)


def draw_forest(
    rows: Sequence[ForestRow], colors: Mapping[str, Any], titles: Sequence[str], reference: float, least: float
) -> Any:
    """Rows under their heads, a panel a title; what is below ``least`` is an arrow. All numbers are shares up to 1."""
    from matplotlib.figure import Figure as Drawing

    heads, places, place = {}, [], -1
    for row in rows:
        if row.head not in heads:
            place += 1
            heads[row.head] = place
        place += 1
        places.append(place)
    drawing = Drawing(figsize=(7.2, 0.9 + 0.19 * place), layout="constrained")
    axes = drawing.subplots(1, len(titles), sharey=True, sharex=True, squeeze=False)[0]
    for panel, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for at, row in zip(places, rows, strict=True):
            _draw_effect(axis, at, row.bounds[panel], colors[row.variant], least)
        axis.axvline(reference, color="black", linewidth=0.8)
        axis.set(yticks=places, yticklabels=[row.label for row in rows], ylim=(place + 0.6, -0.6), xlabel=title)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axis.grid(axis="y", visible=False)
    lowest = np.nanmin([min(bound[0], bound[2]) for row in rows for bound in row.bounds] + [reference - 0.25])
    axes[0].set_xlim(max(least, lowest) - 0.05, 1.05)
    _write_heads(drawing, axes[0], heads)
    return drawing


def _write_heads(drawing: Any, axis: Any, heads: Mapping[str, float]) -> None:
    """From the left edge of the figure on, over the lines of the first panel."""
    from matplotlib.transforms import blended_transform_factory

    axis.set_zorder(2)
    for label, at in heads.items():
        head = axis.text(0.01, at, label, transform=blended_transform_factory(drawing.transFigure, axis.transData),
                         va="center", fontsize=8, weight="bold",
                         bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        head.set_in_layout(False)


def _draw_effect(axis: Any, at: int, bounds: tuple[float, float, float, float], color: Any, least: float) -> None:
    low, high, ci_low, ci_high = (max(bound, least) if bound == bound else math.nan for bound in bounds)
    axis.plot([ci_low, ci_high], [at, at], color=color, linewidth=1.2)
    if low == high:
        axis.plot([low], [at], "o", color=color, markersize=4)
    else:
        axis.plot([low, high], [at, at], color=color, linewidth=4, alpha=0.5, solid_capstyle="butt")
        axis.plot([low, high], [at, at], "o", color=color, markerfacecolor="white", markersize=4)
    if any(bound < least for bound in bounds):
        axis.plot([least], [at], "<", color=color, markersize=5)
