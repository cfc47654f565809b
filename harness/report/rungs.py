"""How far configurations get, and whether the hyper-gradient tells what a warm start is worth: x against x' by pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from harness.report.compare import OFF
from harness.report.document import Figure, Section, Table, file_name
from harness.report.hyperparameters import RESAMPLES, Configurations, cluster_mean, configurations_of, gather
from harness.report.stats import Estimate, paired_bootstrap
from harness.report.study import Condition, Study
from harness.report.tables import number, percent
from harness.seeds import rng

RULER = 3.0  # eta of the levels at which schedulers without rungs are read
FEWEST = 5  # pairs of a cell: a rank correlation of fewer is left out of the mean
DECILES = 10
BENEFIT_BINS = 11  # odd, so that no benefit has a bin of its own in the middle
DARKEST = 0.6  # share of a decile's pairs from which on all are drawn alike
EXTENT = 0.95  # quantile of |benefit| at which the bins' last edges are; what is beyond is in the outermost bins

Array = NDArray[np.float64]

PAIRS_TEXT = (
    "Pairs of x and x'. A trial of a variant is paired with the trial of off in the same seed that was sampled with "
    "exactly the same x (the first with a report, if several were). One of them trained from x, the other from x', the "
    "rest (initial weights, order of the data) is the same. The benefit of x' is the difference of their validation "
    "scores, positive where x' is better, at the largest epoch that both have reported. Searches at random sample the "
    "same configurations for every variant of a seed; model-based ones part ways after the first observations, so that "
    "only their first trials form pairs. Rows of later epochs hold only pairs of which the scheduler let both trials "
    "go on."
)


def section(study: Study) -> Section:
    """Survival by rung, and hyper-gradient against benefit, a table and a figure of each a condition."""
    out = Section("rungs", "Rungs")
    if not study.conditions:
        out.notes.append("There is no usable cell, so there are no rungs to show.")
        return out
    out.text = [
        "Rungs are the numbers of epochs at which a scheduler decides who goes on. Survival is the share of the "
        "started configurations that reached a rung.",
        PAIRS_TEXT,
    ]
    scores = Scores.of(study)
    gather(out, {condition.label: _part(study, condition, scores) for condition in study.conditions})
    return out


def _part(study: Study, condition: Condition, scores: "Scores") -> Section:
    part, trials = Section("", ""), configurations_of(study, condition)
    if not trials.trials:
        part.notes.append("no configuration was started, so there are no rungs to show.")
        return part
    at, words = ruler(condition, trials)
    if not at:
        part.notes.append("no epoch was reported, so that nothing reached a rung yet.")
        return part
    _add_survival(part, study, condition, trials, at, words)
    _add_benefit(part, condition, trials, scores, at)
    return part


# ---- survival


def levels(condition: Condition) -> tuple[list[int], bool]:
    """The rung levels of a condition in epochs, up to the task's maximum, and whether its scheduler has rungs.

    ``grace_period * eta^k``, rounded, below ``max_epochs``, and ``max_epochs`` (the scheduler's own arithmetic,
    ``harness.schedulers.rungs.rung_levels``). A scheduler without ``eta`` is read at 1, 3, 9, ... as a common ruler.
    Empty where the task has no ``max_epochs``.
    """
    scheduler, most = condition.config["scheduler"], condition.config["task"].get("max_epochs")
    eta, grace_period = scheduler.get("eta"), scheduler.get("grace_period") or 1
    has_rungs = isinstance(eta, int | float) and eta >= 2  # less is no reduction factor
    if not most:
        return [], has_rungs
    factor = eta if has_rungs else RULER
    below = (grace_period * factor**k for k in range(int(most).bit_length()))  # enough, as the factor is at least 2
    return sorted({round(level) for level in below if level < most} | {int(most)}), has_rungs


def ruler(condition: Condition, trials: Configurations) -> tuple[list[int], str]:
    """The numbers of epochs at which survival is read, and what they are; none if no epoch was reported."""
    most = int(trials.frame["epochs"].max())
    if most < 1:
        return [], ""
    at, has_rungs = levels(condition)
    if at:
        return at, "rung levels of its scheduler" if has_rungs else f"{RULER:g}^k as a ruler, as its scheduler has none"
    powers = [int(RULER**k) for k in range(most.bit_length()) if RULER**k <= most]
    return powers, f"{RULER:g}^k as a ruler, as its task sets no maximum of epochs"


def _add_survival(
    part: Section, study: Study, condition: Condition, trials: Configurations, at: Sequence[int], words: str
) -> None:
    rows = [row for variant in condition.variants for row in _survival(condition, trials, variant, at)]
    frame = pd.DataFrame(rows)
    caption = (
        f"{condition.label}: how many of the started configurations reached each number of epochs ({words}). Number "
        "and share: mean over cells, with the share's 95 % bootstrap interval over cells. Cells without a started "
        "configuration are left out; unfinished ones count as they stand."
    )
    name = file_name("rungs", *condition.words)
    part.tables.append(Table(name, caption, frame, dict.fromkeys(("share", "CI low", "CI high"), percent)))
    curves: list[dict[str, Any]] = [
        {"variant": variant, **{key: own[key].to_numpy(dtype=float) for key in own.columns if key != "variant"}}
        for variant, own in frame.groupby("variant", sort=False)
    ]
    cells = ", ".join(f"{curve['variant']} {int(curve['cells'][0])}" for curve in curves)
    caption = (
        f"{condition.label}: survival of started configurations by epochs trained ({words}). Left: share that got so "
        "far, mean over cells with its 95 % bootstrap interval over cells; right: their mean number in a cell. "
        f"Logarithmic axes; the variants are set apart a little sideways. Cells: {cells}."
    )
    data = {"curves": curves, "colors": {v: study.colors[v] for v in condition.variants}}
    part.figures.append(Figure(name, caption, draw_survival, data))


def _survival(condition: Condition, trials: Configurations, variant: str, at: Sequence[int]) -> list[dict[str, Any]]:
    own = trials.variant == variant
    _, cell = np.unique(trials.seed[own], return_inverse=True)
    started = np.bincount(cell)
    rows = []
    for level in at:
        reached = np.bincount(cell, weights=trials.frame["epochs"].to_numpy()[own] >= level, minlength=len(started))
        share = _mean_over_cells(reached / started, rng(0, "survival", *condition.words, variant, level))
        rows.append({
            "variant": variant, "cells": len(started), "epochs": level,
            "number": float(reached.mean()) if len(started) else math.nan,
            "share": share.value, "CI low": share.ci[0], "CI high": share.ci[1],
        })  # fmt: skip
    return rows if len(started) else []


def _mean_over_cells(values: Array, gen: np.random.Generator) -> Estimate:
    """Mean of one value a cell (n,) with its bootstrap interval; NaN for none."""

    def mean(first: Array, _: Array) -> Array:
        return np.asarray(first.mean(axis=-1))

    return paired_bootstrap(mean, values, values, gen, RESAMPLES)


def draw_survival(curves: Sequence[dict[str, Any]], colors: dict[str, Any]) -> Any:
    """Share with interval, and number, against epochs; a line a variant."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.0, 2.9), layout="constrained")
    left, right = canvas.subplots(1, 2)
    dodge = np.linspace(0.93, 1.07, len(curves)) if len(curves) > 1 else [1.0]
    for curve, factor in zip(curves, dodge, strict=True):
        style = {"color": colors[curve["variant"]], "marker": "o", "markersize": 3, "linewidth": 1.0}
        at, share = curve["epochs"] * factor, _positive(100 * curve["share"])
        ends = np.nan_to_num(100 * np.abs(np.stack([curve["CI low"], curve["CI high"]]) - curve["share"]))
        left.errorbar(at, share, ends, label=curve["variant"], elinewidth=1.0, **style)
        right.plot(at, _positive(curve["number"]), **style)
    ticks = sorted({int(level) for curve in curves for level in curve["epochs"]})
    for axis, label in ((left, "share that got so far (%)"), (right, "configurations a cell")):
        axis.set(xscale="log", yscale="log", xlabel="epochs", ylabel=label)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axis.tick_params(which="both", labelsize=8)
    canvas.legend(loc="outside upper center", ncols=min(4, len(curves)), fontsize=8)
    return canvas


def _positive(values: Array) -> Array:
    """For a logarithmic axis: 0 is not drawn."""
    return np.where(values > 0, values, math.nan)


# ---- pairs of x and x'


@dataclass(frozen=True)
class Scores:
    """Validation scores by trial and epoch. trial_keys (trials,) ascending, keys (reports,) ascending, scores
    (reports,)."""

    trial_keys: NDArray[np.int64]
    keys: NDArray[np.int64]
    last: NDArray[np.int64]
    scores: Array
    width: int

    @classmethod
    def of(cls, study: Study) -> "Scores":
        """Those of all reports of a study."""
        reports = study.results.reports
        if reports.empty:
            none = np.empty(0, dtype=np.int64)
            return cls(none, none, none, np.empty(0), 1)
        epoch = reports["epoch"].to_numpy(dtype=np.int64)
        width = int(epoch.max()) + 1
        keys = _trial_key(reports) * width + epoch
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        ends = np.flatnonzero(np.diff(keys // width, append=-1))
        return cls(keys[ends] // width, keys, keys[ends] % width,
                   reports["validation_score"].to_numpy(dtype=float)[order], width)  # fmt: skip

    def last_epoch(self, trial_keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last epoch that each trial (n,) has reported; 0 for none."""
        place = np.searchsorted(self.trial_keys, trial_keys)
        there = np.take(self.trial_keys, place, mode="clip") == trial_keys if len(self.trial_keys) else place < 0
        return np.where(there, np.take(self.last, place, mode="clip"), 0) if len(self.last) else np.zeros_like(place)

    def at(self, trial_keys: NDArray[np.int64], epoch: NDArray[np.int64]) -> Array:
        """The score of each trial (n,) at its ``epoch`` (n,); NaN where it was not reported."""
        wanted = trial_keys * self.width + epoch
        if not len(self.keys):
            return np.full(len(wanted), math.nan)
        place = np.searchsorted(self.keys, wanted)
        there = np.take(self.keys, place, mode="clip") == wanted
        return np.where(there, np.take(self.scores, place, mode="clip"), math.nan)


def _trial_key(frame: pd.DataFrame) -> NDArray[np.int64]:
    """A number for each row's (cell, trial); the frames of one ``Results`` number their cells alike."""
    return frame["cell"].cat.codes.to_numpy(dtype=np.int64) * (1 << 24) + frame["trial"].to_numpy(dtype=np.int64)


@dataclass(frozen=True)
class Pairs:
    """Trials of one variant with the trials of off in the same seed that were sampled with the same x.

    started: trials of the variant in seeds that off has too. All others are (n,), of the pairs with scores on both
    sides: seed, epoch at which they are compared, benefit (validation score of x' over that of x, positive where x' is
    better), magnitude (length of the hyper-gradient in unit coordinates; NaN where none is recorded).
    """

    variant: str
    started: int
    seed: NDArray[np.int64]
    epoch: NDArray[np.int64]
    benefit: Array
    magnitude: Array


def pairs_of(condition: Condition, trials: Configurations, scores: Scores, variant: str) -> Pairs:
    """The pairs of ``variant``, of the first trial with a report on either side where an x was sampled repeatedly."""
    group = trials.sample
    key = _trial_key(trials.frame)
    last = scores.last_epoch(key)
    own, off = (_first(group, np.flatnonzero((trials.variant == name) & (last > 0))) for name in (variant, OFF))
    _, at_own, at_off = np.intersect1d(group[own], group[off], return_indices=True)
    own, off = own[at_own], off[at_off]
    epoch = np.minimum(last[own], last[off])
    sign = 1.0 if condition.mode == "max" else -1.0
    benefit = sign * (scores.at(key[own], epoch) - scores.at(key[off], epoch))
    gradient = trials.gradient[:, own]
    length = np.sqrt(np.nansum(gradient**2, axis=0))
    magnitude = np.where(np.isnan(gradient).all(axis=0), math.nan, length)
    known = ~np.isnan(benefit)
    seeds = trials.seed[trials.variant == OFF]
    started = int(np.isin(trials.seed[trials.variant == variant], seeds).sum())
    return Pairs(variant, started, trials.seed[own][known], epoch[known], benefit[known], magnitude[known])


def _first(group: NDArray[np.int64], places: NDArray[np.intp]) -> NDArray[np.intp]:
    """The first of ``places`` in each group."""
    return places[np.unique(group[places], return_index=True)[1]]


def _add_benefit(
    part: Section, condition: Condition, trials: Configurations, scores: Scores, at: Sequence[int]
) -> None:
    variants = [variant for variant in condition.variants if variant != OFF]
    if OFF not in condition.variants or not variants:
        lacking = "off cells (ohgw=off adds them)" if variants else "a variant besides off"
        part.notes.append(f"there are no pairs of x and x', for want of {lacking}.")
        return
    found = [pairs_of(condition, trials, scores, variant) for variant in variants]
    without = [pairs.variant for pairs in found if not len(pairs.benefit)]
    if without:
        part.notes.append(
            f"no trial of {', '.join(without)} has the x of a trial of off in its seed, with a report of both."
        )
    found = [pairs for pairs in found if len(pairs.benefit)]
    if not found:
        return
    rows = [row for pairs in found for row in _benefit_rows(condition, pairs, at)]
    name = file_name("gradient-benefit", *condition.words)
    part.tables.append(_benefit_table(condition, name, pd.DataFrame(rows)))
    drawn = [pairs for pairs in found if np.count_nonzero(~np.isnan(pairs.magnitude)) >= DECILES]
    if drawn:
        part.figures.append(_benefit_figure(condition, name, drawn, rows))
    if left := [pairs.variant for pairs in found if pairs.variant not in {pairs.variant for pairs in drawn}]:
        part.notes.append(
            f"the heat map lacks {', '.join(left)}, with fewer than {DECILES} pairs that have a hyper-gradient."
        )


def _benefit_rows(condition: Condition, pairs: Pairs, at: Sequence[int]) -> list[dict[str, Any]]:
    """All pairs, and those compared between one rung and the next."""
    rows = [_benefit_row(condition, pairs, np.ones(len(pairs.benefit), dtype=bool), "all")]
    for low, high in zip(at, [*at[1:], math.inf], strict=True):
        inside = (pairs.epoch >= low) & (pairs.epoch < high)
        words = f"{low}" if high == low + 1 or low == at[-1] else f"{low}-{high - 1:.0f}"
        if inside.any() and not inside.all():
            rows.append(_benefit_row(condition, pairs, inside, words))
    return rows


def _benefit_row(condition: Condition, pairs: Pairs, chosen: NDArray[np.bool_], words: str) -> dict[str, Any]:
    benefit, seed = pairs.benefit[chosen], pairs.seed[chosen]
    names = (*condition.words, pairs.variant, words)
    mean = cluster_mean(benefit, seed, rng(0, "benefit", *names))
    rho = within_cells(pairs.magnitude[chosen], benefit, seed, rng(0, "correlation", *names))
    return {
        "variant": pairs.variant, "compared at epoch": words, "pairs": len(benefit), "cells": mean.n,
        "trials paired": len(benefit) / pairs.started if words == "all" else math.nan,
        "mean benefit": mean.value, "CI low": mean.ci[0], "CI high": mean.ci[1],
        "better": float((benefit > 0).mean()), "equal": float((benefit == 0).mean()),
        "Spearman": rho.value, "Spearman CI low": rho.ci[0], "Spearman CI high": rho.ci[1], "Spearman cells": rho.n,
    }  # fmt: skip


def within_cells(first: Array, second: Array, cells: NDArray[Any], gen: np.random.Generator) -> Estimate:
    """Spearman's rank correlation of two values (n,) within each of ``cells`` (n,), mean over cells.

    Interval: bootstrap over cells. Left out: pairs with an unknown value, cells with fewer than FEWEST pairs or in
    which a value does not vary. ``n`` counts the cells.
    """
    known = ~np.isnan(first) & ~np.isnan(second)
    first, second, cells = first[known], second[known], cells[known]
    order = np.argsort(cells, kind="stable")
    ends = np.flatnonzero(np.diff(cells[order])) + 1
    found = []
    for part in np.split(order, ends):
        a, b = first[part], second[part]
        if len(part) >= FEWEST and np.ptp(a) > 0 and np.ptp(b) > 0:
            found.append(float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]))
    return _mean_over_cells(np.array(found), gen)


def _benefit_table(condition: Condition, name: str, frame: pd.DataFrame) -> Table:
    caption = (
        f"{condition.label}: what x' is worth against x, by pairs of trials with the same seed and exactly the same "
        f"sampled x. Benefit: difference of validation {condition.metric} at the largest epoch that both reported, "
        "positive where x' is better; mean over pairs, with its 95 % bootstrap interval over cells (whole cells are "
        "resampled); better, equal: shares of pairs. Trials paired: pairs over the variant's trials in the seeds that "
        "off has too. Spearman: rank correlation of the hyper-gradient's length (unit coordinates) with the benefit "
        f"within a cell, mean over the cells with at least {FEWEST} such pairs in which both vary, with a 95 % "
        "bootstrap interval over these cells. Rows: all pairs, and those that were compared at an epoch from one rung "
        "up to the next."
    )
    return Table(name, caption, frame, dict.fromkeys(("trials paired", "better", "equal"), percent))


def _benefit_figure(condition: Condition, name: str, drawn: Sequence[Pairs], rows: Sequence[dict[str, Any]]) -> Figure:
    sizes = np.abs(np.concatenate([pairs.benefit for pairs in drawn]))
    extent = float(np.quantile(sizes[sizes > 0], EXTENT)) if (sizes > 0).any() else 1.0
    edges = np.linspace(-extent, extent, BENEFIT_BINS - 1)
    panels = []
    for pairs in drawn:
        row = next(row for row in rows if row["variant"] == pairs.variant)
        known = ~np.isnan(pairs.magnitude)
        magnitude, benefit = pairs.magnitude[known], pairs.benefit[known]
        cuts = np.unique(np.quantile(magnitude, np.linspace(0, 1, DECILES + 1)))
        column = np.clip(np.searchsorted(cuts, magnitude, side="right") - 1, 0, max(0, len(cuts) - 2))
        counts = np.zeros((BENEFIT_BINS, max(1, len(cuts) - 1)))
        np.add.at(counts, (np.searchsorted(edges, benefit, side="right"), column), 1)
        totals = counts.sum(axis=0)
        panels.append({
            "variant": pairs.variant, "pairs": len(benefit), "cuts": cuts, "shares": counts / np.maximum(totals, 1),
            "means": np.bincount(column, weights=benefit, minlength=len(totals)) / np.maximum(totals, 1),
            "rho": (row["Spearman"], row["Spearman CI low"], row["Spearman CI high"]),
        })  # fmt: skip
    caption = (
        f"{condition.label}: length of the hyper-gradient at x (unit coordinates; deciles of the variant's pairs, "
        f"fewer where values repeat) against the benefit of x' (difference of validation {condition.metric} at the "
        "largest epoch that both trials of a pair reported, positive where x' is better). Colour: share of the "
        f"decile's pairs; the outermost rows hold what is beyond {number(extent, 2)} ({EXTENT:.0%} quantile of the "
        "absolute benefits that are not 0). Line: mean benefit of the decile. rho: Spearman's rank correlation within "
        "a cell, mean over cells, with its 95 % bootstrap interval over cells. A control with random steps has its "
        "hyper-gradient measured, but does not follow it."
    )
    return Figure(name, caption, draw_benefit, {"panels": panels, "extent": extent, "metric": condition.metric})


def draw_benefit(panels: Sequence[dict[str, Any]], extent: float, metric: str) -> Any:
    """A heat map a variant: deciles of the hyper-gradient's length across, benefit upwards."""
    from matplotlib.figure import Figure as Canvas

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Canvas(figsize=(1.4 + 1.9 * columns, 0.5 + 2.3 * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    width = 2 * extent / (BENEFIT_BINS - 2)
    edges = np.linspace(-extent - width, extent + width, BENEFIT_BINS + 1)  # an open bin is drawn as wide as others
    for axis, panel in zip(axes, panels, strict=False):
        count = panel["shares"].shape[1]
        mesh = axis.pcolormesh(np.arange(count + 1), edges, panel["shares"], cmap="Blues", vmin=0, vmax=DARKEST)
        means = np.clip(panel["means"], edges[0], edges[-1])
        axis.plot(np.arange(count) + 0.5, means, color="black", marker="o", markersize=2.5, linewidth=0.9)
        axis.axhline(0, color="black", linewidth=0.5)
        ticks = sorted({0, count // 2, count})
        cuts = panel["cuts"] if len(panel["cuts"]) > count else np.repeat(panel["cuts"], 2)
        axis.set_xticks(ticks, [f"{cuts[tick]:.2g}" for tick in ticks])
        rho, low, high = panel["rho"]
        line = "rho: -" if math.isnan(rho) else f"rho {rho:.2f} [{low:.2f}, {high:.2f}]"
        axis.set_title(f"{panel['variant']}\n{line}, n = {panel['pairs']}", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(visible=False)
    for axis in axes[len(panels) :]:
        axis.remove()
    canvas.supxlabel("length of the hyper-gradient (columns: deciles)", fontsize=8)
    canvas.supylabel(f"benefit of x' (validation {metric})", fontsize=8)
    canvas.colorbar(mesh, ax=list(axes[: len(panels)]), label="share of the decile's pairs", shrink=0.8,
                    extend="max")  # fmt: skip
    return canvas
