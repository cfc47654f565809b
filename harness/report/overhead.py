"""What a warm start costs: busy seconds by kind, FLOPs, peak memory, and off against zero as the A/A control."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.record import BUSY_KINDS, CellPaths, RecordError, read_summary
from harness.report import slurm
from harness.report.compare import OFF, pair, ranges
from harness.report.document import Figure, Section, Table, file_name
from harness.report.load import Results
from harness.report.stats import median_interval, median_of, reductions, wilcoxon_signed_rank
from harness.report.study import Condition, Study
from harness.report.tables import memory, p_value, percent

WORDS = {"startup": "start-up", "warm_start": "warm start", "train": "train", "validate": "validate", "test": "test",
         "checkpoint": "checkpoint"}  # fmt: skip
CHARGED = tuple(kind for kind in BUSY_KINDS if kind != "test")  # what GPU-hours are made of
BARS = 60  # in one figure
ZERO = "zero"

AA_TEXT = (
    "A/A control. The variant zero does everything that a warm start does (the batches, the gradient, the checkpoint) "
    "with a step of length 0, so its trials train exactly as those of off do. Whatever differs between the two is "
    "therefore no effect of moved hyperparameters: in GPU-hours it is the cost of warm starts, and in times to target, "
    "and in scores where asynchronous workers made other decisions, it is that cost and timing noise. An effect of "
    "another variant that is no larger than the spread seen here is not evidence of anything."
)


def section(study: Study) -> Section:
    """Cost by condition and variant, and the A/A control."""
    out = Section("overhead", "Overhead")
    if not study.conditions:
        out.notes.append("There is no usable cell, so there is no overhead to report.")
        return out
    out.text = [
        "Busy seconds are the seconds for which a worker is held. GPU-hours are busy seconds without test evaluation, "
        "which exists for the study only. Extra GPU-hours are the busy seconds of warm starts over all other busy "
        "seconds (without test) of the same cells, extra FLOPs likewise.",
        AA_TEXT,
    ]
    costs = [_cost(study, condition, variant) for condition in study.conditions for variant in condition.variants]
    decisions = _decision_seconds(study.results)
    out.tables = [_seconds_table(costs), _shares_table(costs), _cost_table(costs, decisions)]
    out.figures = list(_share_figures(costs))
    if not decisions:
        out.notes.append(
            "The scheduler's own seconds are not in the table: no finished cell has them in its summary.json."
        )
    if not any(cost.busy.sum() for cost in costs):
        out.notes.append("No busy seconds are recorded, so there are no shares to draw.")
    controls, notes = _controls(study)
    out.notes += notes
    if controls:
        out.tables.append(_control_table(controls))
        if drawn := [control for control in controls if control.pairs]:
            out.figures.append(_control_figure(drawn))
    slurm.add_to(out, study)
    return out


@dataclass(frozen=True)
class Cost:
    """What the cells of one variant in one condition spent, so far where they are unfinished.

    busy: mean seconds a cell by ``BUSY_KINDS``; cells: their names; warm_seconds: of single warm starts, (n,).
    """

    condition: str
    variant: str
    cells: list[str]
    unfinished: int
    busy: NDArray[np.float64]
    extra_hours: float
    extra_flops: float
    peak_train: float
    peak_warm: float
    extra_memory: float
    memory_pairs: int
    warm_seconds: NDArray[np.float64]
    wallclock: float

    @property
    def charged(self) -> float:
        """Mean busy seconds a cell without test evaluation."""
        return float(sum(self.busy[i] for i, kind in enumerate(BUSY_KINDS) if kind != "test"))

    def share(self, kind: str) -> float:
        """Mean busy seconds of ``kind`` over those that are charged."""
        return float(self.busy[BUSY_KINDS.index(kind)]) / self.charged if self.charged else math.nan


def _cost(study: Study, condition: Condition, variant: str) -> Cost:
    cells = condition.cells[condition.cells["variant"] == variant]
    busy = cells[[f"busy_{kind}" for kind in BUSY_KINDS]].to_numpy(dtype=float)
    warm, flops = busy[:, BUSY_KINDS.index("warm_start")].sum(), cells["flops_warm_start"].sum()
    charged = busy.sum() - busy[:, BUSY_KINDS.index("test")].sum()
    unrecorded = flops == 0 and cells["warm_started"].sum() > 0
    ratios = memory_ratios(condition, variant)
    return Cost(
        condition=condition.label,
        variant=variant,
        cells=[str(cell) for cell in cells["cell"]],
        unfinished=int((cells["status"] != "finished").sum()),
        busy=busy.mean(axis=0),
        extra_hours=_ratio(warm, charged - warm),
        extra_flops=math.nan if unrecorded else _ratio(flops, cells["flops_train"].sum()),
        peak_train=_median_size(cells["peak_memory_train"]),
        peak_warm=_median_size(cells["peak_memory_warm_start"]),
        extra_memory=median_of(ratios) - 1,
        memory_pairs=len(ratios),
        warm_seconds=_warm_seconds(study, condition, variant),
        wallclock=float(cells["wallclock"].mean()),
    )


def memory_ratios(condition: Condition, variant: str) -> NDArray[np.float64]:
    """Peak memory of a cell (the larger of training's and warm starts') over that of off, (n,): one a pair of finished
    cells in which both are recorded; none for off itself."""
    cells = condition.cells
    if variant == OFF:
        return np.empty(0)
    paired, _ = pair(cells[cells["variant"] == variant], cells[cells["variant"] == OFF])
    kinds = ("peak_memory_train", "peak_memory_warm_start")
    on, off = (
        paired[[f"{kind}_{side}" for kind in kinds]].to_numpy(dtype=float).max(axis=1, initial=0)
        for side in ("on", "off")
    )
    known = (on > 0) & (off > 0)
    return np.asarray(on[known] / off[known])


def _warm_seconds(study: Study, condition: Condition, variant: str) -> NDArray[np.float64]:
    trials = study.trials
    if trials.empty:
        return np.empty(0)
    setting = condition.cells["setting"].iloc[0]
    here = (trials["setting"] == setting).to_numpy() & (trials["variant"] == variant).to_numpy()
    seconds = trials["seconds"].to_numpy(dtype=float)[here]
    return np.asarray(seconds[~np.isnan(seconds)])


def _decision_seconds(results: Results) -> dict[str, float]:
    """Seconds that a cell's scheduler took for all suggestions and reports, by cell, where summary.json has them."""
    found = {}
    for cell in results.cells["cell"]:
        try:
            taken = (read_summary(CellPaths.of(results.folder(cell))) or {}).get("decision_seconds")
        except (OSError, RecordError):
            continue  # the folder changed after it was loaded
        if taken:
            found[str(cell)] = float(taken["suggest"]) + float(taken["reports"])
    return found


def _seconds_table(costs: Sequence[Cost]) -> Table:
    rows = [
        {"condition": cost.condition, "variant": cost.variant, "cells": len(cost.cells), "unfinished": cost.unfinished}
        | {f"{WORDS[kind]} (s)": cost.busy[i] for i, kind in enumerate(BUSY_KINDS)}
        | {"all but test (s)": cost.charged}
        for cost in costs
    ]
    caption = (
        "Busy seconds by kind: mean per cell, all workers together. Unfinished cells count with what they have spent "
        "so far. Test evaluation is recorded, but not charged to any variant."
    )
    return Table(file_name("busy-seconds", "all"), caption, pd.DataFrame(rows))


def _shares_table(costs: Sequence[Cost]) -> Table:
    rows = [
        {"condition": cost.condition, "variant": cost.variant, "cells": len(cost.cells)}
        | {WORDS[kind]: cost.share(kind) for kind in CHARGED}
        | {"test (beside)": cost.share("test")}
        for cost in costs
    ]
    caption = (
        "Shares of the GPU-hours (busy seconds without test evaluation) by kind, from the sums over the cells of a "
        "variant; they add up to 100 %. Test evaluation, which is not part of GPU-hours, is put in relation to them "
        "beside it."
    )
    columns = [*(WORDS[kind] for kind in CHARGED), "test (beside)"]
    return Table(file_name("overhead-shares", "all"), caption, pd.DataFrame(rows), dict.fromkeys(columns, percent))


def _cost_table(costs: Sequence[Cost], decisions: dict[str, float]) -> Table:
    rows = []
    for cost in costs:
        q25, median, q75 = quartiles(cost.warm_seconds)
        row: dict[str, Any] = {
            "condition": cost.condition, "variant": cost.variant, "cells": len(cost.cells),
            "extra GPU-hours": cost.extra_hours, "extra FLOPs": cost.extra_flops, "peak train": cost.peak_train,
            "peak warm start": cost.peak_warm, "extra memory": cost.extra_memory, "memory pairs": cost.memory_pairs,
            "warm starts": len(cost.warm_seconds), "median s": median, "q25 s": q25, "q75 s": q75,
        }  # fmt: skip
        if decisions:
            taken = [decisions[cell] for cell in cost.cells if cell in decisions]
            row |= {"decisions s": float(np.mean(taken)) if taken else math.nan, "cells with decisions": len(taken)}
        rows.append(row)
    caption = (
        "Cost of warm starts. Extra GPU-hours: busy seconds of warm starts over all other busy seconds (without test) "
        "of the same cells; extra FLOPs: of warm starts over those of training (a dash where the warm starts' are not "
        "recorded). Peak memory: median over cells of the largest value in a cell (on a CPU that of the whole "
        "process); extra memory: median over pairs (finished cells of one seed) of the ratio to off, minus 1, where a "
        "cell's peak is the larger of training's and warm starts'. Seconds of a single warm start: median and "
        "quartiles over warm starts."
    )
    if decisions:
        caption += " Decisions: seconds a finished cell that the scheduler itself took, mean over cells."
    formats = dict.fromkeys(("extra GPU-hours", "extra FLOPs", "extra memory"), percent)
    return Table(file_name("warm-start-cost", "all"), caption, pd.DataFrame(rows),
                 formats | dict.fromkeys(("peak train", "peak warm start"), memory))  # fmt: skip


def _share_figures(costs: Sequence[Cost]) -> Iterator[Figure]:
    """As many figures as the bars need."""
    groups: dict[str, list[Cost]] = {}
    for cost in costs:
        if cost.charged:
            groups.setdefault(cost.condition, []).append(cost)
    pages = list(_pages(list(groups.values()), BARS))
    for number, page in enumerate(pages, 1):
        blocks = [
            {"label": group[0].condition, "variants": [cost.variant for cost in group],
             "shares": np.array([[cost.share(kind) for kind in CHARGED] for cost in group])}
            for group in page
        ]  # fmt: skip
        part = f", part {number} of {len(pages)}" if len(pages) > 1 else ""
        caption = (
            f"Where the GPU-hours went{part}: share of each kind of busy seconds (test evaluation left out) in "
            "percent, from the sums over the cells of a variant. One bar a variant, one block a condition "
            "(task / scheduler)."
        )
        name = file_name("overhead", "all", *([number] if number > 1 else []))
        yield Figure(name, caption, draw_shares, {"blocks": blocks})


def _pages(groups: Sequence[list[Cost]], most: int) -> Iterator[list[list[Cost]]]:
    """Cut the groups, in order, into pages of at most ``most`` bars (more only for a group that has more itself)."""
    page: list[list[Cost]] = []
    for group in groups:
        if page and sum(map(len, page)) + len(group) > most:
            yield page
            page = []
        page.append(group)
    if page:
        yield page


def draw_shares(blocks: Sequence[dict[str, Any]]) -> Any:
    """A stacked bar a variant, in blocks of a condition; two columns where there are many."""
    import seaborn
    from matplotlib.figure import Figure as Canvas

    rows = [len(block["variants"]) + 1.6 for block in blocks]  # a block's heading and the gap below it
    columns = 2 if len(blocks) > 1 and sum(rows) > 16 else 1
    half = sum(rows) / columns
    split = next((i for i in range(1, len(blocks)) if sum(rows[: i + 1]) > half + rows[i] / 2), len(blocks))
    parts = [blocks[:split], blocks[split:]] if columns == 2 and split < len(blocks) else [blocks]
    height = max(sum(len(block["variants"]) + 1.6 for block in part) for part in parts)
    canvas = Canvas(figsize=(4.4 * len(parts), 0.9 + 0.17 * height), layout="constrained")
    colors = dict(zip(CHARGED, seaborn.color_palette("colorblind", len(CHARGED)), strict=True))
    axes = canvas.subplots(1, len(parts), squeeze=False, sharex=True)[0]
    for axis, part in zip(axes, parts, strict=True):
        _draw_blocks(axis, part, colors)
        axis.set(xlim=(0, 100), ylim=(height - 0.6, -1.4), xlabel="share of GPU-hours (%)")
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", visible=False)
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=len(CHARGED), fontsize=8)
    return canvas


def _draw_blocks(axis: Any, blocks: Sequence[dict[str, Any]], colors: dict[str, Any]) -> None:
    y: list[float] = []
    begin = 0.0
    for block in blocks:
        y += [begin + i for i in range(len(block["variants"]))]
        axis.text(0, begin - 0.6, block["label"], fontsize=8, fontweight="bold", va="bottom")
        begin += len(block["variants"]) + 1.6
    shares = 100 * np.concatenate([block["shares"] for block in blocks])
    left = np.zeros(len(y))
    for i, kind in enumerate(CHARGED):
        axis.barh(y, shares[:, i], left=left, color=colors[kind], label=WORDS[kind], height=0.8)
        left += shares[:, i]
    axis.set_yticks(y, [variant for block in blocks for variant in block["variants"]])


# ---- the A/A control


@dataclass(frozen=True)
class Control:
    """zero against off in one condition. low, high: bounds (n,) of each pair's 1 - T_zero / T_off, NaN without a tau;
    ratios: T_zero / T_off of the pairs in which both reached tau; score: differences zero - off (n,) of the incumbent's
    final test score. effect: (low, high, ci low, ci high, p) of the time to target by unit, as of any variant."""

    condition: str
    variant: str
    pairs: int
    without: str
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    ratios: NDArray[np.float64]
    effect: dict[str, tuple[float, ...]]
    score: NDArray[np.float64]
    extra_hours: float
    extra_memory: float


def _controls(study: Study) -> tuple[list[Control], list[str]]:
    controls, lacking, no_off = [], [], []
    for condition in study.conditions:
        zeros = [name for name in condition.variants if name.split("(")[0] == ZERO]
        if not zeros:
            lacking.append(condition.label)
        elif OFF not in condition.variants:
            no_off.append(condition.label)
        else:
            controls += [_control(condition, name) for name in zeros]
    notes = []
    if lacking:
        where = "in any condition" if len(lacking) == len(study.conditions) else f"in {'; '.join(lacking)}"
        notes.append(f"There is no A/A control {where}: the override ohgw=zero adds its cells to the same command.")
    if no_off:
        notes.append(f"The A/A control needs off cells: the override ohgw=off adds them to {'; '.join(no_off)}.")
    notes += [f"A/A control in {c.condition}: there is no pair of finished cells." for c in controls if not c.pairs]
    return controls, notes


def _control(condition: Condition, variant: str) -> Control:
    cells = condition.cells
    own = cells[cells["variant"] == variant]
    paired, missing = pair(own, cells[cells["variant"] == OFF])
    on, off = (paired[f"time_wallclock_{side}"].to_numpy(dtype=float) for side in ("on", "off"))
    ends = paired[["end_wallclock_on", "end_wallclock_off"]].to_numpy(dtype=float)
    bounds = reductions(on, off, float(ends.max()) if len(ends) else math.nan)
    if math.isnan(condition.tau):
        bounds = np.full_like(bounds, math.nan)
    both = np.isfinite(on) & np.isfinite(off)
    compared = next(entry for entry in condition.comparison.variants if entry.variant == variant)
    score = (paired["incumbent_test_score_on"] - paired["incumbent_test_score_off"]).to_numpy(dtype=float)
    warm = own["busy_warm_start"].sum()
    return Control(
        condition=condition.label,
        variant=variant,
        pairs=len(paired),
        without=", ".join(f"{kind.replace('_', ' ')} {ranges(seeds)}" for kind, seeds in missing.items() if seeds)
        or "none",
        low=bounds[:, 0],
        high=bounds[:, 1],
        ratios=np.asarray(on[both] / off[both]),
        effect={
            unit: (math.nan,) * 5
            if math.isnan(condition.tau)
            else (effect.low, effect.high, effect.ci_low, effect.ci_high, effect.p)
            for unit, effect in compared.effect.items()
        },
        score=score[~np.isnan(score)],
        extra_hours=_ratio(warm, sum(own[f"busy_{kind}"].sum() for kind in BUSY_KINDS if kind != "test") - warm),
        extra_memory=median_of(memory_ratios(condition, variant)) - 1,
    )


def _control_table(controls: Sequence[Control]) -> Table:
    rows = []
    for control in controls:
        q25, median, q75 = quartiles(control.ratios)
        row: dict[str, Any] = {"condition": control.condition, "variant": control.variant, "pairs": control.pairs,
                               "seeds without pair": control.without}  # fmt: skip
        for unit, word in (("wallclock", "T"), ("gpu_hours", "T in GPU-hours")):
            low, high, ci_low, ci_high, p = control.effect.get(unit, (math.nan,) * 5)
            row |= {f"{word}: effect": low, f"{word}: effect, upper bound": high, f"{word}: CI low": ci_low,
                    f"{word}: CI high": ci_high, f"{word}: p": p}  # fmt: skip
        difference = median_of(control.score)
        low, high = median_interval(control.score, control.score)
        row |= {
            "both reached": len(control.ratios), "ratio q25": q25, "ratio median": median, "ratio q75": q75,
            "ratio log SD": float(np.log(control.ratios).std(ddof=1)) if len(control.ratios) > 1 else math.nan,
            "score difference": difference, "score CI low": low, "score CI high": high,
            "score p": wilcoxon_signed_rank(control.score),
            "scores equal": _ratio(np.count_nonzero(control.score == 0), len(control.score)),
            "extra GPU-hours": control.extra_hours, "extra memory": control.extra_memory,
        }  # fmt: skip
        rows.append(row)
    caption = (
        "A/A control: zero (the whole warm start, a step of 0) against off, over pairs (finished cells of one seed). "
        "Effect: median over pairs of 1 - T/T_off of the time to target T (in wall-clock and in GPU-hours; between "
        "effect and its upper bound where censoring leaves the median open), with its 95 % interval "
        "(order statistics) and p of the two-sided Wilcoxon signed-rank test, as for any variant. Ratio: T_zero/T_off "
        "of the pairs in which both reached the target, with the standard deviation of its logarithm: the timing "
        "noise. Score: median difference zero - off of the incumbent's final test score, with the same interval and "
        "test, and the share of pairs with exactly equal scores. Extra GPU-hours and memory: as in the table of costs."
    )
    shares = [column for column in rows[0] if column.startswith("T") and not column.endswith("p")]
    formats: Any = dict.fromkeys([*shares, "scores equal", "extra GPU-hours", "extra memory"], percent)
    return Table(file_name("aa-control", "all"), caption, pd.DataFrame(rows),
                 formats | dict.fromkeys(("T: p", "T in GPU-hours: p", "score p"), p_value))  # fmt: skip


def _control_figure(controls: Sequence[Control]) -> Figure:
    rows = [
        {"label": c.condition if c.variant == ZERO else f"{c.condition}, {c.variant}", "low": c.low, "high": c.high,
         "effect": c.effect.get("wallclock", (math.nan,) * 5)[:4], "score": c.score, "score_median": median_of(c.score),
         "score_ci": median_interval(c.score, c.score)}
        for c in controls
    ]  # fmt: skip
    caption = (
        "A/A control, one row a condition, one mark a pair of finished cells of one seed. Left: 1 - T_zero/T_off of "
        "the wall-clock time to target in percent, positive where zero was sooner; hollow at 0: equal times, or "
        "neither reached it; triangles: only one did, so that the value lies between the triangle and the side that it "
        "points to. What lies beyond the axis stands at its edge. Right: incumbent's final test score, zero - off. "
        "Black: median over pairs and its 95 % interval (order statistics; "
        "none for fewer than six pairs)."
    )
    return Figure(file_name("aa-control", "all"), caption, draw_control, {"rows": rows})


def draw_control(rows: Sequence[dict[str, Any]]) -> Any:
    """Pairs as dots with median and interval, a row a condition: time to target on the left, score on the right."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.0, 1.0 + 0.32 * len(rows)), layout="constrained")
    times, scores = canvas.subplots(1, 2, sharey=True)
    gray = (0.45, 0.45, 0.45)
    ends = np.concatenate([100 * np.concatenate([row["low"], row["high"]]) for row in rows])
    edge = max(1.0, 1.1 * float(np.max(np.abs(ends[np.isfinite(ends) & (ends < 100)]), initial=0.0)))
    edge = min(edge, 200.0)
    for y, row in enumerate(rows):
        low, high = 100 * row["low"], 100 * row["high"]
        jitter = y + 0.5 * (np.linspace(-0.5, 0.5, len(low)) if len(low) > 1 else np.zeros(len(low)))
        exact, tied = (low == high) & (low != 0), (low == high) & (low == 0)
        sooner, later = (high > low) & np.isfinite(low), (high > low) & ~np.isfinite(low)
        dots = {"s": 10, "alpha": 0.6, "linewidths": 0.6}
        times.scatter(np.clip(low[exact], -edge, edge), jitter[exact], color=gray, label="pairs", **dots)
        times.scatter(low[tied], jitter[tied], facecolors="none", edgecolors=gray, **dots)
        times.scatter(np.clip(low[sooner], -edge, edge), jitter[sooner], marker=">", color=gray, **dots)
        times.scatter(np.clip(high[later], -edge, edge), jitter[later], marker="<", color=gray, **dots)
        middle = 100 * (row["effect"][0] + row["effect"][1]) / 2
        _mark(times, y, middle, 100 * row["effect"][2], 100 * row["effect"][3], edge)
        spread = y + 0.5 * (np.linspace(-0.5, 0.5, len(row["score"])) if len(row["score"]) > 1 else 0.0)
        scores.scatter(row["score"], np.broadcast_to(spread, row["score"].shape), color=gray, **dots)
        _mark(scores, y, row["score_median"], row["score_ci"][0], row["score_ci"][1], math.inf)
    times.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    times.set(
        xlim=(-edge * 1.05, min(edge, 100.0) * 1.05), ylim=(len(rows) - 0.4, -0.6), xlabel="1 - T_zero / T_off (%)"
    )
    scores.set(xlabel="final test score, zero - off")
    for axis in (times, scores):
        axis.axvline(0, color="black", linewidth=0.6)
        axis.grid(axis="y", visible=False)
    return canvas


def _mark(axis: Any, y: float, middle: float, low: float, high: float, edge: float) -> None:
    """A median with its interval; what is not finite or beyond ``edge`` ends there."""
    if math.isfinite(middle):
        axis.plot([middle], [y], "D", color="black", markersize=4, zorder=3)
    if not math.isnan(low):
        axis.plot(np.clip([low, high], -edge, edge), [y, y], color="black", linewidth=1.4, zorder=3)


def quartiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile of (n,); NaN for none."""
    if not len(values):
        return math.nan, math.nan, math.nan
    q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75])
    return float(q25), float(median), float(q75)


def _median_size(values: pd.Series) -> float:
    sizes = values.to_numpy(dtype=float)
    return median_of(sizes[sizes > 0])


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole else math.nan
