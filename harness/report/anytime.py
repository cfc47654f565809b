"""Anytime performance: scores over time, their area, final scores, profiles, ranks and probability of improvement."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.report import aggregate
from harness.report.compare import OFF, pair
from harness.report.document import Figure, Section, Table, file_name
from harness.report.stats import holm, median_interval, median_of, relative_drop, wilcoxon_signed_rank
from harness.report.study import Condition, Study
from harness.report.tables import p_value, percent
from harness.report.time_to_target import AXES, ForestRow, draw_forest, incumbent_changes
from harness.seeds import rng

ALONG = {**AXES, "epochs": "epochs trained"}
SCORES = {"validation": "best_validation_score", "test": "incumbent_test_score"}
IQM_AXES = {"wallclock": "wall-clock time", "gpu_hours": "GPU-hours", "epochs": "epochs"}
POINTS = 101  # of a curve over time: steps of 1 % of the span
IQM_POINTS, THRESHOLDS = 41, 51  # of the curves and profiles that are resampled
RESAMPLES = 500  # of a figure's bands; an end of a band is good to about 0.1 of its width
FEW_METHODS = 12  # that a critical-difference diagram can show

TEXT = (
    "The incumbent is the configuration that is best on validation so far; its test score is what a user would get "
    "who stopped there. Cells that have ended keep their last score, and unfinished cells count as they stand; cells "
    "without a test score yet are left out. Before its first report a cell has no score, which counts as worse than "
    "any.",
    "Scores of different tasks are not comparable. Over tasks, a score is therefore put between the worst (0) and "
    "the best (1) final test score of all cells of its task; what is worse than the worst is 0.",
    "IQM: interquartile mean over cells of all tasks and seeds, with a 95 % bootstrap interval that resamples cells "
    "within each task (Agarwal et al., 2021). Area under the curve: mean test score of the incumbent over wall-clock "
    "time, from the latest first report of a condition's cells to its horizon, the end of its longest finished cell "
    "(or the configured budget, if that is shorter).",
    "Tests against off, ranks and the probability of improvement use finished cells only.",
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One cell: its scores (k,) at the reports where the incumbent changed, the times (k,) of these along each axis."""

    times: Mapping[str, Array]
    scores: Mapping[str, Array]


Curves = dict[str, Curve]  # of the cells that have a score, by folder


def section(study: Study) -> Section:
    """Curves of each condition; areas, final scores, profiles, ranks and improvement over all of them."""
    section = Section("anytime", "Anytime performance")
    curves = _curves(study)
    conditions = [
        condition for condition in study.conditions if any(cell in curves for cell in condition.cells["cell"])
    ]
    if not conditions:
        section.notes.append("No cell has a test score yet, hence no anytime performance.")
        return section
    section.text += TEXT
    section.notes += _without_score(study, curves)
    section.figures += [_anytime(condition, curves, study.colors) for condition in conditions]
    section.tables += [_areas(conditions, curves), _final_scores(conditions)]
    _add_over_tasks(section, conditions, curves, study.colors)
    _add_ranks(section, conditions, study.colors)
    _add_improvement(section, conditions, study.colors)
    return section


def _curves(study: Study) -> Curves:
    if study.results.reports.empty:
        return {}
    changes = incumbent_changes(study.results.reports)
    known = changes[changes["incumbent_test_score"].notna() & changes["best_validation_score"].notna()]
    columns = {"wallclock": "t", "gpu_hours": "gpu_hours", "epochs": "count", **SCORES}
    arrays = {name: known[column].to_numpy(dtype=float) for name, column in columns.items()}
    codes = known["cell"].cat.codes.to_numpy()
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    names = known["cell"].cat.categories[codes[begins]]
    curves = {}
    for name, begin, end in zip(names, begins, np.append(begins[1:], len(codes)), strict=False):
        part = {column: array[begin:end] for column, array in arrays.items()}
        curves[str(name)] = Curve({axis: part[axis] for axis in ALONG}, {kind: part[kind] for kind in SCORES})
    return curves


def _without_score(study: Study, curves: Curves) -> Iterator[str]:
    for condition in study.conditions:
        empty = condition.cells[[cell not in curves for cell in condition.cells["cell"]]]
        if len(empty):
            counts = ", ".join(f"{variant} {n}" for variant, n in empty["variant"].value_counts(sort=False).items())
            yield f"{condition.label}: cells without a test score are left out: {counts}."


def _scored(condition: Condition, curves: Curves) -> dict[str, pd.DataFrame]:
    """The cells with a score, by variant in the report's order."""
    cells = condition.cells[[cell in curves for cell in condition.cells["cell"]]]
    groups = dict(list(cells.groupby("variant")))
    return {variant: groups[variant] for variant in condition.variants if variant in groups}


def _counts(groups: Mapping[str, pd.DataFrame]) -> str:
    parts = []
    for variant, cells in groups.items():
        unfinished = int((cells["status"] != "finished").sum())
        parts.append(f"{variant} {len(cells)}{f' ({unfinished} unfinished)' if unfinished else ''}")
    return f"Cells: {', '.join(parts)}."


# ---- curves of a condition


def _anytime(condition: Condition, curves: Curves, colors: Mapping[str, Any]) -> Figure:
    groups = _scored(condition, curves)
    worst = -math.inf if condition.mode == "max" else math.inf
    panels = {}
    for along in ALONG:
        end = max(float(cells[along].max()) for cells in groups.values())
        grid = np.linspace(0.0, end, POINTS)
        whole = {variant: float(cells[along].min()) for variant, cells in groups.items()}
        quartiles = {
            kind: {variant: _quartiles([curves[cell] for cell in cells["cell"]], along, kind, grid, worst)
                   for variant, cells in groups.items()}
            for kind in SCORES
        }  # fmt: skip
        panels[along] = {"grid": grid, "whole": whole, "quartiles": quartiles}
    return Figure(
        file_name("anytime", *condition.words),
        f"{condition.label}: best validation {condition.metric} so far (top) and the test {condition.metric} of that "
        "configuration (bottom) against wall-clock time, GPU-hours without test evaluation and epochs trained by all "
        "workers. Lines: median over the cells of a variant; bands: quartiles. Dashed from the end of the variant's "
        "first cell to end: ended cells keep their last score; one before its first report counts as worse than any. "
        f"The vertical axes leave out what is before a fifth of the span. {_counts(groups)}",
        draw_anytime,
        {
            "panels": panels,
            "colors": {variant: colors[variant] for variant in groups},
            "metric": condition.metric,
        },
    )


def _quartiles(cells: Sequence[Curve], along: str, kind: str, grid: Array, worst: float) -> Array:
    """Quartiles (3, grid) over cells; a cell before its first score is ``worst``, and a quartile that is so is NaN."""
    values = np.stack([aggregate.step_values(cell.times[along], cell.scores[kind], grid) for cell in cells])
    with np.errstate(invalid="ignore"):
        quartiles = np.quantile(np.where(np.isnan(values), worst, values), [0.25, 0.5, 0.75], axis=0)
    return np.where(np.isfinite(quartiles), quartiles, math.nan)


def draw_anytime(panels: Mapping[str, Any], colors: Mapping[str, Any], metric: str) -> Any:
    """A row for validation and one for test, a column for each of the three times."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(7.2, 4.4), layout="constrained")
    axes = drawing.subplots(len(SCORES), len(panels), sharex="col", sharey="row", squeeze=False)
    for column, (along, panel) in enumerate(panels.items()):
        for axis, (kind, quartiles) in zip(axes[:, column], panel["quartiles"].items(), strict=True):
            for variant, (low, middle, high) in quartiles.items():
                _draw_line(axis, panel["grid"], middle, panel["whole"][variant], color=colors[variant], label=variant)
                axis.fill_between(panel["grid"], low, high, color=colors[variant], alpha=0.13, linewidth=0)
            if not column:
                axis.set_ylabel(f"{'best ' if kind == 'validation' else ''}{kind} {metric}")
        axes[-1, column].set_xlabel(ALONG[along])
        axes[-1, column].locator_params(axis="x", nbins=4)
        axes[-1, column].ticklabel_format(axis="x", scilimits=(-2, 5))
    for row, kind in zip(axes, SCORES, strict=True):
        _limit(row[0], [panel["quartiles"][kind] for panel in panels.values()])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5))
    return drawing


def _draw_line(axis: Any, grid: Array, values: Array, whole: float, color: Any, label: str) -> None:
    """Solid as long as every cell is followed, dashed after."""
    axis.plot(grid, np.where(grid <= whole, values, math.nan), color=color, linewidth=1.3, label=label)
    rest = np.append(grid[1:], math.inf) > whole
    axis.plot(grid, np.where(rest, values, math.nan), color=color, linewidth=1.1, linestyle=(0, (2, 1)))


def _limit(axis: Any, panels: Sequence[Mapping[str, Array]]) -> None:
    """Leave out the first steps, next to which nothing else could be seen."""
    later = np.array([quartiles[:, POINTS // 5 :] for panel in panels for quartiles in panel.values()])
    if np.isnan(later).all():
        return
    low, high = np.nanmin(later), np.nanmax(later)
    margin = 0.04 * (high - low) or 0.01
    axis.set_ylim(low - margin, high + margin)


# ---- tables a condition and variant


def _areas(conditions: Sequence[Condition], curves: Curves) -> Table:
    rows = [row for condition in conditions for row in _area_rows(condition, curves)]
    frame = pd.DataFrame(rows)
    frame["Holm p"] = holm(frame["p"])
    return Table(
        "auc_all",
        "Area under the curve: mean test score of the incumbent over wall-clock seconds from start (the latest first "
        "report of the condition's cells) to horizon (the end of its longest finished cell); cells that have ended "
        "keep their last score, and n leaves out running ones without a score by the horizon. Median and quartiles "
        "over cells. Gain: median over pairs (finished cells of one seed) of the difference to off, positive = "
        "better, with its 95 % interval (order statistics); p: two-sided Wilcoxon signed-rank test of the "
        "differences, exact up to 200 pairs; Holm p: adjusted for all rows.",
        frame,
        {"p": p_value, "Holm p": p_value},
    )


def horizon(cells: pd.DataFrame, axis: str = "wallclock") -> float:
    """The end along an axis of the longest finished cell (or of the longest at all); its budget, if that is shorter."""
    finished = cells[cells["status"] == "finished"]
    return float((finished if len(finished) else cells)["epochs" if axis == "epochs" else f"end_{axis}"].max())


def _area_rows(condition: Condition, curves: Curves) -> Iterator[dict[str, Any]]:
    groups, end = _scored(condition, curves), horizon(condition.cells)
    firsts = [curves[cell].times["wallclock"][0] for cells in groups.values() for cell in cells["cell"]]
    start = max((first for first in firsts if first <= end), default=math.nan)  # a running cell may be far slower
    areas = {
        variant: cells.assign(
            area=[aggregate.area_under_curve(curve.times["wallclock"], curve.scores["test"], end, start)
                  for curve in map(curves.__getitem__, cells["cell"])]
        )
        for variant, cells in groups.items()
    }  # fmt: skip
    sign = 1.0 if condition.mode == "max" else -1.0
    for variant, cells in areas.items():
        differences = np.empty(0)
        if variant != OFF and OFF in areas:
            paired, _ = pair(cells, areas[OFF])
            differences = sign * (paired["area_on"] - paired["area_off"]).dropna().to_numpy()
        low, high = median_interval(differences, differences)
        yield {
            "condition": condition.label, "variant": variant, "n": int(cells["area"].notna().sum()), "start": start,
            "horizon": end,
            **_spread(cells["area"].to_numpy(dtype=float)), "pairs": len(differences), "gain": median_of(differences),
            "CI low": low, "CI high": high, "p": wilcoxon_signed_rank(differences),
        }  # fmt: skip


def _spread(values: Array) -> dict[str, float]:
    known = values[~np.isnan(values)]
    q25, median, q75 = np.quantile(known, [0.25, 0.5, 0.75]).tolist() if len(known) else [math.nan] * 3
    return {"median": median, "q25": q25, "q75": q75}


def _final_scores(conditions: Sequence[Condition]) -> Table:
    rows = [
        _final_row(condition, variant, kind)
        for condition in conditions
        for kind in SCORES
        for variant in condition.variants
    ]
    return Table(
        "final-scores_all",
        "Final scores: best validation score, and the test score of that configuration (unfinished cells as they "
        "stand, n with a score). Median, quartiles and interquartile mean (IQM) over cells, the IQM with its 95 % "
        "bootstrap interval. Drop: median over pairs (finished cells of one seed) of the relative loss against off, "
        "positive = worse than off, with its 95 % interval (order statistics; from six pairs on).",
        pd.DataFrame(rows),
        dict.fromkeys(("drop", "drop CI low", "drop CI high"), lambda value: percent(value, 2)),
    )


def _final_row(condition: Condition, variant: str, kind: str) -> dict[str, Any]:
    column = SCORES[kind]
    cells = condition.cells[condition.cells["variant"] == variant]
    values = cells[column].to_numpy(dtype=float)
    values = values[~np.isnan(values)]
    low, high = math.nan, math.nan
    if len(values) > 1:
        draws = rng(0, "final score", condition.label, variant, kind)
        low, high = map(float, aggregate.stratified_bootstrap([values], aggregate.iqm, draws, RESAMPLES))
    drop: tuple[int, float, float, float] = (0, math.nan, math.nan, math.nan)
    off = condition.cells[condition.cells["variant"] == OFF]
    if variant != OFF and len(off):
        paired, _ = pair(cells, off)
        estimate = relative_drop(paired[f"{column}_on"].to_numpy(), paired[f"{column}_off"].to_numpy(), condition.mode)
        drop = estimate.n, estimate.value, *estimate.ci
    return {
        "condition": condition.label, "score": kind, "variant": variant, "n": len(values),
        "unfinished": int((cells["status"] != "finished").sum()), **_spread(values),
        "IQM": float(aggregate.iqm(values)) if len(values) else math.nan, "CI low": low, "CI high": high,
        "pairs": drop[0], "drop": drop[1], "drop CI low": drop[2], "drop CI high": drop[3],
    }  # fmt: skip


# ---- over tasks


def _add_over_tasks(
    section: Section, conditions: Sequence[Condition], curves: Curves, colors: Mapping[str, Any]
) -> None:
    """IQM over time and performance profiles, a panel a scheduler."""
    scales = {kind: _scales(conditions, kind) for kind in SCORES}
    profile: dict[str, Any] = {}
    time: dict[tuple[str, str], dict[str, Any]] = {(kind, axis): {} for kind in SCORES for axis in IQM_AXES}
    for scheduler in dict.fromkeys(condition.scheduler for condition in conditions):
        own = [condition for condition in conditions if condition.scheduler == scheduler]
        groups = {condition.label: _scored(condition, curves) for condition in own}
        kept, variants, left_out = complete(
            pd.DataFrame({label: {v: len(cells) for v, cells in group.items()} for label, group in groups.items()}).T
        )
        section.notes += [f"Over tasks, {scheduler}: {line}" for line in left_out]
        chosen = [condition for condition in own if condition.label in kept]
        cells = {v: [(condition, groups[condition.label][v]) for condition in chosen] for v in variants}
        runs = sum(len(part) for parts in cells.values() for _, part in parts)
        title = f"{scheduler} ({len(chosen)} {'task' if len(chosen) == 1 else 'tasks'}, {runs} cells)"
        for (kind, axis), panels in time.items():
            panels[title] = {
                v: _iqm_curve(parts, curves, scales[kind], kind, axis, (scheduler, v)) for v, parts in cells.items()
            }
        profile[title] = {v: _profile(parts, scales["test"], (scheduler, v)) for v, parts in cells.items()}
    shown = {variant: colors[variant] for variant in colors if any(variant in panel for panel in profile.values())}
    bands = (
        f"bands: 95 % bootstrap intervals, cells resampled {RESAMPLES} times within each task; unfinished cells as "
        "they stand"
    )
    for (kind, axis), panels in time.items():
        across = f"share of the horizon in {IQM_AXES[axis]}"
        caption = (
            f"Interquartile mean over tasks and seeds of the incumbent's {kind} score, by scheduler and variant, "
            f"against the {across} (the end of the condition's longest finished cell, or its budget if shorter). "
            f"Scores are put between the worst (0) and the best (1) final {kind} score of their task; ended cells keep "
            "their last; "
            f"{bands}."
        )
        data = {"panels": panels, "colors": shown, "x": across, "y": f"IQM of the normalised {kind} score"}
        section.figures.append(
            Figure(file_name(f"anytime-iqm-{kind}-{axis.replace('_', '-')}", "all"), caption, draw_panels, data)
        )
    section.figures.append(
        Figure(
            "profiles_all",
            "Performance profiles: share of the cells whose final test score, put between the worst (0) and the best "
            f"(1) of its task, is above a threshold, by scheduler and variant; {bands}. Higher is better.",
            draw_panels,
            {"panels": profile, "colors": shown, "x": "normalised final score", "y": "share of cells above"},
        )
    )


def complete(counts: pd.DataFrame) -> tuple[list[Any], list[Any], list[str]]:
    """The rows and the columns of ``counts`` (cells of each; 0 or NaN for none) to keep so that no entry is empty.

    Either the columns with a gap go or the rows with one, whichever keeps more cells: a mean over tasks may only
    compare variants that have cells in all of them. The third entry says in words what goes.
    """
    there = counts.fillna(0) > 0
    columns, rows = list(counts.columns[there.all(axis=0)]), list(counts.index[there.all(axis=1)])
    if counts[columns].to_numpy().sum() >= counts.loc[rows].to_numpy().sum():
        lacking = {
            c: [row for row in counts.index if not there.loc[row, c]] for c in counts.columns if c not in columns
        }
        return list(counts.index), columns, [f"{c} is left out: not in {', '.join(lacking[c])}" for c in lacking]
    lacking = {row: [c for c in counts.columns if not there.loc[row, c]] for row in counts.index if row not in rows}
    return rows, list(counts.columns), [f"{row} is left out: without {', '.join(lacking[row])}" for row in lacking]


Scale = Callable[[Condition, Array], Array]


def _scales(conditions: Sequence[Condition], kind: str) -> Scale:
    """What puts scores of a condition between 0 and 1, by the worst and best final score of that kind of its task."""
    column = "incumbent_test_score" if kind == "test" else "best_validation_score"
    ends: dict[tuple[str, str], tuple[float, float]] = {}
    for task in {(condition.task, condition.mode) for condition in conditions}:
        own = [c.cells[column] for c in conditions if (c.task, c.mode) == task]
        final = pd.concat(own).to_numpy(dtype=float)
        worst, best = np.nanquantile(np.where(np.isfinite(final), final, math.nan), [0.0, 1.0])
        ends[task] = (worst, best) if task[1] == "max" else (best, worst)

    def scale(condition: Condition, scores: Array) -> Array:
        worst, best = ends[condition.task, condition.mode]
        if worst == best:  # all are the best of their task
            return np.where(np.isnan(scores), 0.0, 1.0)
        return np.nan_to_num(np.clip((scores - worst) / (best - worst), 0.0, 1.0), nan=0.0)

    return scale


def _iqm_curve(
    parts: Sequence[tuple[Condition, pd.DataFrame]],
    curves: Curves,
    scale: Scale,
    kind: str,
    axis: str,
    name: Sequence[str],
) -> Array:
    """(4, points): share of the horizon, IQM, and its interval."""
    grid = np.linspace(0.0, 1.0, IQM_POINTS)
    strata = []
    for condition, cells in parts:
        end = horizon(condition.cells, axis)
        own = [curves[cell] for cell in cells["cell"]]
        values = [aggregate.step_values(curve.times[axis], curve.scores[kind], grid * end) for curve in own]
        strata.append(scale(condition, np.stack(values)))
    draws = rng(0, "iqm", kind, axis, *name)
    low, high = aggregate.stratified_bootstrap(strata, aggregate.iqm, draws, RESAMPLES)
    return np.stack([grid, aggregate.iqm(np.concatenate(strata)), low, high])


def _profile(parts: Sequence[tuple[Condition, pd.DataFrame]], scale: Scale, name: Sequence[str]) -> Array:
    """(4, thresholds): threshold, share of cells above it, and its interval."""
    thresholds = np.linspace(0.0, 1.0, THRESHOLDS)
    strata = [scale(condition, cells["incumbent_test_score"].to_numpy(dtype=float)) for condition, cells in parts]
    shares = [aggregate.above(scores, thresholds) for scores in strata]
    low, high = aggregate.stratified_bootstrap(shares, np.mean, rng(0, "profile", *name), RESAMPLES)
    return np.stack([thresholds, aggregate.performance_profile(np.concatenate(strata), thresholds), low, high])


def draw_panels(panels: Mapping[str, Mapping[str, Array]], colors: Mapping[str, Any], x: str, y: str) -> Any:
    """A panel a scheduler; a line with its band a variant, (x, y, low, high) each."""
    from matplotlib.figure import Figure as Drawing

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    drawing = Drawing(figsize=(max(4.0, 2.5 * across), 0.7 + 1.9 * down), layout="constrained")
    axes = drawing.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for variant, (at, middle, low, high) in lines.items():
            axis.plot(at, middle, color=colors[variant], linewidth=1.3)
            axis.fill_between(at, low, high, color=colors[variant], alpha=0.13, linewidth=0)
        axis.set_title(title, fontsize=8)
    for i, axis in enumerate(axes):
        axis.set_visible(i < len(panels))
        axis.tick_params(labelbottom=i + across >= len(panels))
    drawing.supxlabel(x, fontsize=9)
    drawing.supylabel(y, fontsize=9)
    handles = [axes[0].plot([], [], color=color)[0] for color in colors.values()]
    drawing.legend(handles, list(colors), loc="outside upper center", ncols=min(len(colors), 5))
    return drawing


# ---- ranks


@dataclass(frozen=True)
class Blocks:
    """Scores (blocks, methods), higher is better. words: what the blocks are. variants: of each method."""

    scores: pd.DataFrame
    words: str
    variants: dict[str, str]
    left_out: list[str]


def blocks(conditions: Sequence[Condition]) -> Blocks:
    """What the ranks compare, and over what.

    Methods are (scheduler, variant) and blocks tasks, where there are few methods and each has finished cells of every
    task; else methods are variants, and blocks conditions. An entry is the median over seeds. With fewer than three
    blocks, a block is one seed of one of them.
    """
    cells = pd.concat([_final(condition) for condition in conditions])
    whole = cells.pivot_table(index="task", columns="method", values="score", aggfunc="count")
    few = len(whole.columns) <= FEW_METHODS and not whole.isna().to_numpy().any()
    index, columns = ("task", "method") if few else ("condition", "variant")
    kept, methods, left_out = complete(cells.pivot_table(index=index, columns=columns, values="score", aggfunc="count"))
    chosen = cells[cells[index].isin(kept) & cells[columns].isin(methods)]
    what = "tasks" if few else "conditions (task and scheduler)"
    words = f"blocks are {what}, scores medians over seeds"
    if not few and len(set(chosen["task"])) < len(kept):
        words += "; conditions of one task are not independent, so that p may be too small"
    seeds = len(kept) < aggregate.FEWEST_BLOCKS
    if seeds:
        words = (
            f"with fewer than {aggregate.FEWEST_BLOCKS} {what} a block is one seed of one of them, so that this is "
            f"about seeds of {', '.join(kept)} only, not about other tasks"
        )
    scores = chosen.pivot_table(
        index=[index, "seed"] if seeds else index, columns=columns, values="score", aggfunc="median"
    )
    return Blocks(scores.dropna(), words, dict(zip(chosen[columns], chosen["variant"], strict=True)), left_out)


def _final(condition: Condition) -> pd.DataFrame:
    """Final test scores of the finished cells, turned so that higher is better."""
    cells = condition.cells
    finished = cells[(cells["status"] == "finished") & cells["incumbent_test_score"].notna()]
    sign = 1.0 if condition.mode == "max" else -1.0
    return pd.DataFrame(
        {
            "task": " ".join([condition.task, *condition.words[2:]]),
            "condition": condition.label,
            "method": [f"{condition.scheduler} {variant}" for variant in finished["variant"]],
            "variant": finished["variant"].astype(str).to_numpy(),
            "seed": finished["seed"].to_numpy(),
            "score": sign * finished["incumbent_test_score"].to_numpy(dtype=float),
        }
    )


def _add_ranks(section: Section, conditions: Sequence[Condition], colors: Mapping[str, Any]) -> None:
    found = blocks(conditions)
    section.notes += [f"Ranks: {line}." for line in found.left_out]
    if found.scores.shape[1] < 2 or len(found.scores) < aggregate.FEWEST_BLOCKS:
        section.notes.append(
            "There are no ranks and no critical-difference diagram: they need two methods and "
            f"{aggregate.FEWEST_BLOCKS} blocks (tasks, or seeds of them) in which all methods have finished; there "
            f"are {found.scores.shape[1]} and {len(found.scores)}."
        )
        return
    ranks = aggregate.ranks(found.scores.to_numpy())
    names = [str(method) for method in found.scores.columns]
    p = pd.DataFrame(ranks.nemenyi_p, index=names, columns=names)
    about = (
        f"Average ranks of the final test score over {ranks.blocks} blocks (1 is best): {found.words}. Friedman's "
        f"test that all are alike: p = {p_value(ranks.friedman_p)}"
    )
    offs = {name: name.removesuffix(found.variants[name]) + OFF for name in names}
    against = [p[off][name] if off in p and off != name else math.nan for name, off in offs.items()]
    frame = pd.DataFrame(
        {"method": names, "blocks": ranks.blocks, "average rank": ranks.average, "p against off": against}
    ).sort_values("average rank", kind="stable")
    caption = f"{about}. p against off: Nemenyi's test, adjusted for all pairs of methods (Demsar, 2006)."
    section.tables.append(Table("ranks_all", caption, frame, {"p against off": p_value}))
    palette = {name: colors[found.variants[name]] for name in names}
    section.figures.append(
        Figure(
            "critical-difference_all",
            f"{about}. Bars join methods that Nemenyi's test does not tell apart at 5 % (Demsar, 2006).",
            draw_critical_difference,
            {"ranks": dict(zip(names, ranks.average.tolist(), strict=True)), "p": p, "colors": palette},
        )
    )


def draw_critical_difference(ranks: Mapping[str, float], p: pd.DataFrame, colors: Mapping[str, Any]) -> Any:
    """The diagram of scikit-posthocs: methods by average rank, joined where they are not told apart."""
    import scikit_posthocs
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(7.2, 0.9 + 0.22 * len(ranks)), layout="constrained")
    axis = drawing.subplots()
    axis.grid(False)
    scikit_posthocs.critical_difference_diagram(
        pd.Series(ranks), p.fillna(1.0), ax=axis, color_palette=dict(colors), text_h_margin=0.02,
        label_fmt_left="{label} ({rank:.2f})", label_fmt_right="({rank:.2f}) {label}",
        label_props={"fontsize": 9}, crossbar_props={"color": "black", "linewidth": 2.5},
    )  # fmt: skip
    axis.spines["top"].set_visible(True)
    axis.set_title("average rank", fontsize=9)
    return drawing


# ---- probability of improvement


def _add_improvement(section: Section, conditions: Sequence[Condition], colors: Mapping[str, Any]) -> None:
    found = {condition.label: dict(list(_final(condition).groupby("variant"))) for condition in conditions}
    rows = []
    for scheduler in dict.fromkeys(condition.scheduler for condition in conditions):
        own = [condition for condition in conditions if condition.scheduler == scheduler]
        for variant in dict.fromkeys(v for condition in own for v in condition.variants if v != OFF):
            scores = [found[c.label] for c in own if {variant, OFF} <= set(found[c.label])]
            if scores:
                rows.append(_improvement_row(scheduler, variant, [(part[variant], part[OFF]) for part in scores]))
    if not rows:
        section.notes.append(
            "There is no probability of improvement: it needs finished cells of off and of another variant."
        )
        return
    frame = pd.DataFrame(rows)
    caption = (
        "Probability that a cell of the variant has a better final test score than a cell of off with the same "
        "scheduler and task (ties count half), mean over tasks, with a 95 % bootstrap interval that resamples cells "
        "within each task (Agarwal et al., 2021); 50 % is no difference"
    )
    section.tables.append(
        Table(
            "improvement_all",
            f"{caption}. Paired: the same from pairs of one seed and task, with Wilson's interval. Finished cells "
            "only.",
            frame,
            {column: percent for column in frame.columns if column.startswith(("P", "CI", "paired "))},
        )
    )
    section.figures.append(
        Figure(
            "improvement_all",
            f"{caption}. In brackets: tasks, cells of the variant. Finished cells only.",
            draw_forest,
            {
                "rows": [_improvement_line(row) for row in rows],
                "colors": {row["variant"]: colors[row["variant"]] for row in rows},
                "titles": ["probability of improvement over off"],
                "reference": 0.5,
                "least": 0.0,
            },
        )
    )


def _improvement_row(
    scheduler: str, variant: str, scores: Sequence[tuple[pd.DataFrame, pd.DataFrame]]
) -> dict[str, Any]:
    ours, offs = ([part["score"].to_numpy() for part in side] for side in zip(*scores, strict=True))
    draws = rng(0, "improvement", scheduler, variant)
    estimate = aggregate.probability_of_improvement(ours, offs, draws)
    pairs = pd.concat([a.merge(b, on="seed", suffixes=("", "_off")) for a, b in scores])
    paired = aggregate.paired_probability_of_improvement(pairs["score"].to_numpy(), pairs["score_off"].to_numpy())
    return {
        "scheduler": scheduler, "variant": variant, "tasks": estimate.n, "cells": sum(map(len, ours)),
        "cells of off": sum(map(len, offs)), "P": estimate.value, "CI low": estimate.ci[0], "CI high": estimate.ci[1],
        "pairs": paired.n, "paired P": paired.value, "paired CI low": paired.ci[0], "paired CI high": paired.ci[1],
    }  # fmt: skip


def _improvement_line(row: Mapping[str, Any]) -> ForestRow:
    label = f"{row['variant']} ({row['tasks']}, {row['cells']})"
    return ForestRow(row["scheduler"], row["variant"], label, [(row["P"], row["P"], row["CI low"], row["CI high"])])
