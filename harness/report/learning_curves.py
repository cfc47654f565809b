"""Learning curves of chosen trials, and one page a chosen run: its incumbent, trials, busy time and workers."""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.record import BUSY_KINDS, CellPaths, read_events
from harness.report.compare import OFF
from harness.report.document import Figure, Section, file_name
from harness.report.hyperparameters import incumbents
from harness.report.overhead import WORDS
from harness.report.rungs import levels
from harness.report.study import Condition, Study

RUNS = 12  # figures of single runs in a report
RANKS = (0.25, 0.5)  # quantiles of the ranking by validation score whose trials are drawn, beside the first two
ROLES = ("rank 1 (incumbent)", "rank 2", *(f"rank at {share:.0%}" for share in RANKS))
ENDS = ("complete", "error", "retry")  # events that end an attempt; a report that stops or pauses does, too

Array = NDArray[np.float64]


def section(study: Study) -> Section:
    """Curves of chosen trials, a figure a condition, and pages of chosen runs."""
    out = Section("learning-curves", "Learning curves")
    chosen = {condition.label: _median_runs(condition) for condition in study.conditions}
    cells = [str(row["cell"]) for runs in chosen.values() for row in runs.values()]
    if not cells:
        out.notes.append("No cell has a score, so there are no learning curves.")
        return out
    out.text = [
        "Runs are chosen, not averaged, here: of each variant in each condition the one whose final test score is the "
        "median of its finished runs (the lower of two; where none is finished, of those that have a score)."
    ]
    reports = study.results.reports
    by_cell = dict(list(reports[reports["cell"].isin(cells)].groupby("cell", observed=True)))
    best = incumbents(study).set_index("cell")["trial"]
    for condition in study.conditions:
        runs = chosen[condition.label]
        if lacking := [variant for variant in condition.variants if variant not in runs]:
            out.notes.append(f"{condition.label}: no run of {', '.join(lacking)} has a score, so none is drawn.")
        if runs:
            out.figures.append(_curves_figure(condition, runs, by_cell, best))
    pages = _spread([(condition, v) for condition in study.conditions for v in chosen[condition.label]])
    for condition, variant in pages:
        run = chosen[condition.label][variant]
        out.figures.append(_run_figure(study, condition, run, by_cell[str(run["cell"])]))
    total, drawn = len(study.results.cells), len(pages)
    if drawn < total:
        out.notes.append(
            f"Pages of single runs: {drawn} of {total}, the chosen ones, spread evenly over conditions, off first and "
            f"controls last. python -m harness.report {study.results.path}/CELL draws that of any other, CELL being "
            "its folder."
        )
    return out


# ---- which runs and trials


def _median_runs(condition: Condition) -> dict[str, pd.Series]:
    """By variant the run with the median final test score; a variant without any score is left out."""
    runs = {}
    for variant in condition.variants:
        cells = condition.cells[condition.cells["variant"] == variant]
        cells = cells[cells["incumbent_test_score"].notna()]
        finished = cells[cells["status"] == "finished"]
        ranked = (finished if len(finished) else cells).sort_values(["incumbent_test_score", "seed"])
        if len(ranked):
            runs[variant] = ranked.iloc[(len(ranked) - 1) // 2]
    return runs


def _spread(pages: Sequence[tuple[Condition, str]]) -> list[tuple[Condition, str]]:
    """At most RUNS of the pages, as evenly over conditions as possible, off first, controls last."""
    by_condition: dict[str, list[tuple[Condition, str]]] = {}
    for condition, variant in pages:
        by_condition.setdefault(condition.label, []).append((condition, variant))
    queues = [sorted(queue, key=_precedence) for queue in by_condition.values()]
    if len(queues) > RUNS:
        queues = [queues[i] for i in np.linspace(0, len(queues) - 1, RUNS).round().astype(int)]
    turns = [(turn, place) for place, queue in enumerate(queues) for turn in range(len(queue))]
    taken = sorted(sorted(turns)[:RUNS], key=lambda entry: (entry[1], entry[0]))
    return [queues[place][turn] for turn, place in taken]


def _precedence(page: tuple[Condition, str]) -> int:
    """off first, the controls (steps of zero or at random) last."""
    condition, variant = page
    if variant == OFF:
        return 0
    ohgw = condition.ohgw(variant)
    return 2 if ohgw.get("eta") == 0 or ohgw.get("estimator") == "random" else 1


def chosen_trials(reports: pd.DataFrame, incumbent: int, mode: str) -> dict[int, int]:
    """The trial for each of ROLES (its index) among a cell's ``reports``; each trial for its first role only.

    Trials are ranked by their best validation score, the incumbent first; those without one are left out.
    """
    scores = reports.groupby("trial", sort=False)["validation_score"].agg("max" if mode == "max" else "min").dropna()
    ranking = [int(trial) for trial in scores.sort_values(ascending=mode == "min", kind="stable").index]
    if incumbent in ranking:  # of equals the first that reported the score, which need not be the first that started
        ranking.remove(incumbent)
        ranking.insert(0, incumbent)
    n = len(ranking)
    ranks = (1, 2, *(math.ceil(share * n) for share in RANKS))
    found: dict[int, int] = {}
    for role, rank in enumerate(ranks):
        if 1 <= rank <= n and ranking[rank - 1] not in found.values():
            found[role] = ranking[rank - 1]
    return found


# ---- learning curves of trials


def _curves_figure(
    condition: Condition, runs: Mapping[str, pd.Series], by_cell: Mapping[Any, pd.DataFrame], best: pd.Series
) -> Figure:
    panels = []
    for variant, run in runs.items():
        reports = by_cell[run["cell"]]
        curves = []
        for role, trial in chosen_trials(reports, int(best.get(run["cell"], -1)), condition.mode).items():
            part = reports[reports["trial"] == trial].sort_values("epoch")
            columns = ("epoch", "train_loss", "validation_loss", "train_score", "validation_score")
            values = {column: part[column].to_numpy(dtype=float) for column in columns}
            curves.append({"role": role, "trial": trial, **values})
        count = reports["trial"].nunique()
        panels.append({"variant": variant, "seed": int(run["seed"]), "trials": count, "curves": curves})
    caption = (
        f"{condition.label}: learning curves of single trials, loss above and {condition.metric} below, training "
        "dashed and validation solid, a dot a reported epoch. Of each variant the run with the median final test score "
        "(its seed and number of trials with a report in the heading); of this run the trials at ranks 1 (the "
        f"incumbent), 2, and {' and '.join(f'{share:.0%}' for share in RANKS)} of the ranking by best validation "
        "score."
    )
    data = {"panels": panels, "metric": condition.metric}
    return Figure(file_name("curves", *condition.words), caption, draw_curves, data)


def draw_curves(panels: Sequence[dict[str, Any]], metric: str) -> Any:
    """Loss and score by epoch, a column a run, a colour a rank."""
    import seaborn
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(5, len(panels))
    blocks = -(-len(panels) // columns)
    width, height = 0.6 + 1.5 * columns, 0.9 + 2.9 * blocks
    canvas = Canvas(figsize=(width, height))  # no layout engine: with many panels one takes half a second
    outer = canvas.add_gridspec(blocks, 1, hspace=0.36, left=0.55 / width, right=1 - 0.05 / width,
                                bottom=0.45 / height, top=1 - 0.8 / height)  # fmt: skip
    grid = [outer[block].subgridspec(2, columns, wspace=0.08, hspace=0.12).subplots(squeeze=False, sharey="row")
            for block in range(blocks)]  # fmt: skip
    palette = seaborn.color_palette("viridis", len(ROLES))
    log = _spans_decades([curve for panel in panels for curve in panel["curves"]])
    for j in range(blocks * columns):
        top, bottom = grid[j // columns][:, j % columns]
        if j >= len(panels):
            top.remove()
            bottom.remove()
            continue
        panel = panels[j]
        for axis, kind in ((top, "loss"), (bottom, "score")):
            for curve in panel["curves"]:
                style = {"color": palette[curve["role"]], "linewidth": 1.0, "marker": "o", "markersize": 2}
                axis.plot(curve["epoch"], curve[f"train_{kind}"], linestyle="--", **style)
                axis.plot(curve["epoch"], curve[f"validation_{kind}"], **style)
            axis.tick_params(labelsize=7)
            axis.locator_params(axis="x", nbins=3)
        if log:
            top.set(yscale="log")
            top.yaxis.set_major_formatter("{x:g}")
            top.yaxis.minorticks_off()
        top.set_title(f"{panel['variant']}\nseed {panel['seed']}, {panel['trials']} trials", fontsize=8)
        top.tick_params(labelbottom=False)
        bottom.set_xlabel("epoch", fontsize=8)
        if j % columns == 0:
            top.set_ylabel("loss", fontsize=8)
            bottom.set_ylabel(metric, fontsize=8)
    handles = [Line2D([], [], color=color, label=word) for word, color in zip(ROLES, palette, strict=True)]
    handles += [Line2D([], [], color="black", linestyle="--", label="train"),
                Line2D([], [], color="black", label="validation")]  # fmt: skip
    canvas.legend(handles=handles, loc="upper center", ncols=3 if columns < 4 else 6,
                  fontsize=8)  # fmt: skip
    return canvas


def _spans_decades(curves: Sequence[Mapping[str, Any]]) -> bool:
    """Whether losses span more than a factor of 20: drawn linearly, one diverged trial would hide the others."""
    losses = np.concatenate([curve[f"{kind}_loss"] for curve in curves for kind in ("train", "validation")])
    known = losses[np.isfinite(losses)]
    return bool(len(known)) and 0 < known.min() < known.max() / 20


# ---- one page a run


def _run_figure(study: Study, condition: Condition, run: pd.Series, reports: pd.DataFrame) -> Figure:
    cell, variant, seed = str(run["cell"]), str(run["variant"]), int(run["seed"])
    at, _ = levels(condition)
    reports = reports.sort_values(["trial", "epoch"], kind="stable")
    lengths = reports.groupby("trial")["epoch"].max()
    caption = (
        f"{condition.label}, {variant}, seed {seed} ({cell}, {run['status']}): {len(lengths)} trials with "
        f"{len(reports)} epochs. Top left: {condition.metric} of the incumbent (best on validation so far) against "
        "wall-clock, on validation and on the test set; dotted: target. Top right: validation curves of all trials, "
        "coloured by the last rung reached. Bottom left: busy seconds by kind, all workers together. Bottom right: "
        "when trials were held by workers, from each start or resume to its last report; the lines are packed, so that "
        "their number is that of the workers in use, coloured as above."
    )
    timeline = worker_lanes(attempts(study.results.folder(cell)))
    data = {
        "time": reports.sort_values("t", kind="stable")[["t", "best_validation_score", "incumbent_test_score"]]
        .to_numpy(dtype=float).T,
        "trial": reports["trial"].to_numpy(), "epoch": reports["epoch"].to_numpy(dtype=float),
        "score": reports["validation_score"].to_numpy(dtype=float),
        "rungs": at or [1], "last": dict(zip(lengths.index.tolist(), lengths.tolist(), strict=True)),
        "busy": [float(run[f"busy_{kind}"]) for kind in BUSY_KINDS], "timeline": timeline,
        "tau": condition.tau, "metric": condition.metric,
    }  # fmt: skip
    return Figure(file_name("run", *condition.words, variant, f"seed{seed}"), caption, draw_run, data)


def attempts(folder: Any) -> list[tuple[int, float, float]]:
    """(trial, begin, end) of the stretches for which a trial was held, in cell seconds, from the events of a cell.

    A stretch goes from a start or resume to what ended it: a report whose decision stopped or paused the trial, its
    completion, a failure; else to its last report (a stretch without any is left out, as its end is not known). Empty
    where the file cannot be read.
    """
    try:
        events, _ = read_events(CellPaths.of(folder).events)
    except OSError:
        return []
    begun: dict[int, float] = {}
    reached: dict[int, float] = {}
    found = []
    for event in events:
        kind, trial = event["e"], event.get("trial", -1)
        if kind in ("start", "resume"):
            begun[trial], reached[trial] = event["t"], math.nan
        elif trial in begun and kind in ("report", *ENDS):
            reached[trial] = event["t"]
            if kind in ENDS or event["decision"] in ("STOP", "PAUSE"):
                found.append((trial, begun.pop(trial), reached.pop(trial)))
    found += [(trial, begin, reached[trial]) for trial, begin in begun.items() if not math.isnan(reached[trial])]
    return sorted(found, key=lambda stretch: stretch[1:])


def worker_lanes(stretches: Sequence[tuple[int, float, float]]) -> list[tuple[int, int, float, float]]:
    """(lane, trial, begin, end): stretches packed into as few lanes as possible, none overlapping in a lane.

    stretches: (trial, begin, end) by begin. Each takes the lowest lane that is free (greedy interval partitioning).
    """
    free: list[int] = []
    held: list[tuple[float, int]] = []  # (end, lane)
    packed, lanes = [], 0
    for trial, begin, end in stretches:
        while held and held[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(held)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, lanes = lanes, lanes + 1
        heapq.heappush(held, (end, lane))
        packed.append((lane, trial, begin, end))
    return packed


def draw_run(
    time: Array,
    trial: NDArray[Any],
    epoch: Array,
    score: Array,
    rungs: Sequence[int],
    last: Mapping[int, int],
    busy: Sequence[float],
    timeline: Sequence[tuple[int, int, float, float]],
    tau: float,
    metric: str,
) -> Any:
    """Incumbent against time, curves of all trials, busy seconds, workers against time."""
    import seaborn
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    canvas = Canvas(figsize=(7.2, 5.4), layout="constrained")
    (incumbent, curves), (kinds, workers) = canvas.subplots(2, 2)
    palette = seaborn.color_palette("viridis", len(rungs))
    place = {key: max(0, int(np.searchsorted(rungs, epochs, side="right")) - 1) for key, epochs in last.items()}
    for row, words, color in ((1, "validation", "tab:blue"), (2, "test", "tab:orange")):
        incumbent.step(time[0], time[row], where="post", color=color, label=words, linewidth=1.2)
    if not math.isnan(tau):
        incumbent.axhline(tau, color="black", linestyle=":", linewidth=1)
    incumbent.set(xlabel="wall-clock (s)", ylabel=f"incumbent's {metric}")
    incumbent.legend(loc="lower right", fontsize=8)
    _draw_trials(curves, trial, epoch, score, place, palette)
    curves.set(xlabel="epoch", ylabel=f"validation {metric}")
    kinds.barh([WORDS[kind] for kind in BUSY_KINDS], busy, color=(0.45, 0.45, 0.45), height=0.7)
    kinds.invert_yaxis()
    kinds.grid(axis="y", visible=False)
    kinds.set(xlabel="busy seconds")
    _draw_workers(workers, timeline, place, palette)
    handles = [Line2D([], [], color=palette[i], label=f"rung {rung}", linewidth=3)
               for i, rung in enumerate(rungs) if i in set(place.values())]  # fmt: skip
    canvas.legend(handles=handles, loc="outside upper center", ncols=min(8, len(handles)), fontsize=8)
    return canvas


def _draw_trials(
    axis: Any, trial: NDArray[Any], epoch: Array, score: Array, place: Mapping[int, int], palette: Any
) -> None:
    from matplotlib.collections import LineCollection

    cuts = np.flatnonzero(np.diff(trial)) + 1
    parts = list(zip(np.split(trial, cuts), np.split(epoch, cuts), np.split(score, cuts), strict=True))
    colors = [palette[place[int(keys[0])]] for keys, _, _ in parts]
    lines = [np.column_stack([at, values]) for _, at, values in parts]
    axis.add_collection(LineCollection(lines, colors=colors, linewidths=0.8, alpha=0.7))
    single = [i for i, (keys, _, _) in enumerate(parts) if len(keys) == 1]
    axis.scatter([parts[i][1][0] for i in single], [parts[i][2][0] for i in single],
                 color=[colors[i] for i in single], s=6, linewidths=0, alpha=0.7)  # fmt: skip
    axis.autoscale_view()


def _draw_workers(
    axis: Any, timeline: Sequence[tuple[int, int, float, float]], place: Mapping[int, int], palette: Any
) -> None:
    if not timeline:
        axis.text(0.5, 0.5, "no start and end times of trials", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    lanes, trials, begins, ends = (np.array(column) for column in zip(*timeline, strict=True))
    colors = [palette[place.get(int(trial), 0)] for trial in trials]
    axis.barh(lanes, ends - begins, left=begins, color=colors, height=0.8, edgecolor="white",
              linewidth=0.3 if len(lanes) <= 100 * (1 + max(lanes)) else 0)  # fmt: skip
    axis.set(xlabel="wall-clock (s)", ylabel="worker", ylim=(max(lanes) + 0.6, -0.6))
    axis.set_yticks(range(int(max(lanes)) + 1) if max(lanes) < 10 else [0, int(max(lanes))])
    axis.grid(axis="y", visible=False)
