"""Where warm starts move configurations: distributions of x and x', mean shifts, divergences, trajectories."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.report.compare import OFF
from harness.report.divergence import BINS, KL_ESTIMATOR, kl_divergence, kl_null
from harness.report.document import Figure, Section, Table, file_name
from harness.report.stats import Estimate, paired_bootstrap
from harness.report.study import Condition, Study
from harness.report.tables import percent
from harness.seeds import rng
from harness.space import Categorical, Domain, Float, Integer

RESAMPLES = 2000  # of a bootstrap over cells; the tables have hundreds of intervals
PERMUTATIONS = 1000  # of the null distribution of a divergence
ARROWS = 200  # trials drawn in a panel of trajectories
QUANTILES = 201  # points of a drawn distribution function

Array = NDArray[np.float64]


def section(study: Study) -> Section:
    """Distributions, shifts and trajectories of the hyperparameters, a table and two figures a condition."""
    out = Section("hyperparameters", "Hyperparameters")
    if not study.conditions:
        out.notes.append("There is no usable cell, so there are no hyperparameters to show.")
        return out
    out.text = [
        "x is the sampled configuration, x' the one that the warm start made of it and that was trained; without a "
        "warm start they are equal. Unit coordinates are the search coordinates (the natural logarithm where the space "
        "is logarithmic) scaled to [0, 1] by their bounds. Integers and categoricals never move; their distributions "
        "can differ between variants all the same where the scheduler learns from x'.",
    ]
    final = incumbents(study)
    gather(out, {condition.label: _part(study, condition, final) for condition in study.conditions})
    return out


def gather(out: Section, parts: Mapping[str, Section]) -> None:
    """Add ``parts``, by the label of their condition, to ``out``; a note that several have is made once."""
    notes: dict[str, list[str]] = {}
    for label, part in parts.items():
        out.tables += part.tables
        out.figures += part.figures
        for note in part.notes:
            notes.setdefault(note, []).append(label)
    out.notes += [f"{'; '.join(labels)}: {note}" for note, labels in notes.items()]


# ---- the trials of a condition as arrays


@dataclass(frozen=True)
class Configurations:
    """The k hyperparameters of the n trials of one condition.

    names: (k,). x, x_prime (values), unit_x, unit_x_prime and gradient (continuous ones in unit coordinates, else NaN):
    (k, n). frame: the n rows of ``Study.trials``.
    """

    names: list[str]
    x: Array
    x_prime: Array
    unit_x: Array
    unit_x_prime: Array
    gradient: Array
    frame: pd.DataFrame

    @property
    def trials(self) -> int:
        return self.x.shape[1]

    @functools.cached_property
    def variant(self) -> NDArray[np.str_]:
        """The variant of each trial, (n,)."""
        return self.frame["variant"].to_numpy(dtype=str)

    @functools.cached_property
    def seed(self) -> NDArray[np.int64]:
        """The seed of each trial, (n,)."""
        return self.frame["seed"].to_numpy(dtype=np.int64)

    @functools.cached_property
    def sample(self) -> NDArray[np.int64]:
        """A number for each trial, (n,), equal for equal seed and exactly equal sampled x."""
        columns = [self.seed.astype(float), *np.where(np.isnan(self.x), math.inf, self.x)]
        order = np.lexsort(columns[::-1])
        changes = np.zeros(len(order), dtype=bool)
        for column in columns:
            changes[1:] |= column[order][1:] != column[order][:-1]
        number = np.empty(len(order), dtype=np.int64)
        number[order] = np.cumsum(changes)
        return number

    @functools.cached_property
    def warm_started(self) -> NDArray[np.bool_]:
        """Whether a trial made a warm start, (n,); one that failed or was cut off before its end did not."""
        return np.asarray(self.frame["estimator"].notna(), dtype=bool)

    def chosen(self, trials: pd.DataFrame) -> NDArray[np.bool_]:
        """Which of the trials, (n,), are among ``trials`` (columns cell, trial)."""
        here = pd.MultiIndex.from_arrays([self.frame["cell"].astype(str), self.frame["trial"]])
        return np.asarray(here.isin(pd.MultiIndex.from_frame(trials[["cell", "trial"]])))


def configurations_of(study: Study, condition: Condition) -> Configurations:
    """The trials of ``condition``, whatever their state."""
    names = list(condition.space)
    trials, rows = study.trials, study.coordinates
    if trials.empty or rows.empty:
        none = np.empty((len(names), 0))
        return Configurations(names, none, none, none, none, none, trials)
    setting = condition.cells["setting"].iloc[0]
    frame = trials[(trials["setting"] == setting).to_numpy()]
    places = np.flatnonzero((rows["setting"] == setting).to_numpy())
    code = pd.Index(names).get_indexer(pd.Index(rows["name"].cat.categories))[rows["name"].cat.codes.to_numpy()[places]]
    order = places[np.argsort(code, kind="stable")]  # a cell's rows are in the order of its trials for each name
    x, x_prime, unit_x, unit_x_prime, gradient = (
        rows[column].to_numpy(dtype=float)[order].reshape(len(names), len(frame))
        for column in ("x", "x_prime", "unit_x", "unit_x_prime", "gradient")
    )
    return Configurations(names, x, x_prime, unit_x, unit_x_prime, gradient, frame)


def incumbents(study: Study) -> pd.DataFrame:
    """The trial of each cell that is best on validation so far (the first report of equals); columns cell, trial."""
    reports, cells = study.results.reports, study.results.cells
    if reports.empty:
        return pd.DataFrame({"cell": pd.Series(dtype=str), "trial": pd.Series(dtype=int)})
    best = cells.set_index("cell")["best_validation_score"].astype(float)
    of_cell = best.reindex(reports["cell"].cat.categories).to_numpy()[reports["cell"].cat.codes.to_numpy()]
    there = reports.loc[reports["validation_score"].to_numpy() == of_cell, ["cell", "trial"]]
    return there.drop_duplicates("cell").astype({"cell": str})


# ---- the parts of one condition


def _part(study: Study, condition: Condition, incumbents: pd.DataFrame) -> Section:
    part, trials = Section("", ""), configurations_of(study, condition)
    if not trials.trials:
        part.notes.append("no configuration was started.")
        return part
    final = trials.chosen(incumbents)
    if frame := _shift_rows(condition, trials, final):
        part.tables.append(_shift_table(condition, pd.DataFrame(frame)))
    else:
        part.notes.append("there is no variant besides off, so there is no table of shifts.")
    if OFF not in condition.variants:
        part.notes.append("without off cells there is no divergence from off; ohgw=off adds them.")
    if discrete := [name for name in trials.names if not isinstance(condition.space[name], Float)]:
        part.notes.append(f"{', '.join(discrete)} (integer or categorical) never move.")
    part.figures.append(_distribution_figure(study, condition, trials, final))
    if trajectories := _trajectory_figure(study, condition, trials):
        part.figures.append(trajectories)
    else:
        few = len(condition.space.continuous) < 2
        why = "there are fewer than two continuous hyperparameters" if few else "no warm start moved anything"
        part.notes.append(f"there is no figure of trajectories, for {why}.")
    return part


def _shift_rows(condition: Condition, trials: Configurations, final: NDArray[np.bool_]) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(trials.names):
        domain = condition.space[name]
        places, categories = _places(domain, trials.x_prime[i], trials.unit_x_prime[i])
        known = ~np.isnan(places)  # a configuration can lack a hyperparameter
        for variant in condition.variants:
            if variant == OFF:
                continue
            own, off = trials.variant == variant, trials.variant == OFF
            row: dict[str, Any] = {"coordinate": name, "variant": variant}
            row |= _shift(condition, trials, i, own & known & trials.warm_started, variant)
            for what, among in (("all", np.ones_like(final)), ("incumbents", final)):
                p, q = places[own & among & known], places[off & among & known]
                noise = rng(0, "divergence", *condition.words, name, variant, what)
                row |= {
                    f"KL {what}": kl_divergence(p, q, BINS, categories),
                    f"KL {what}, null 95 %": kl_null(p, q, noise, PERMUTATIONS, BINS, categories),
                }
            row["incumbents"] = int((own & final).sum())
            rows.append(row)
    return rows


def _shift(
    condition: Condition, trials: Configurations, i: int, own: NDArray[np.bool_], variant: str
) -> dict[str, Any]:
    """How the warm starts of one variant moved hyperparameter i."""
    domain, n = condition.space[trials.names[i]], int(own.sum())
    row: dict[str, Any] = {"warm starts": n, "cells": len(np.unique(trials.seed[own]))}
    columns = ("mean shift", "CI low", "CI high", "mean |shift|", "up", "down", "not moved", "clipped")
    if not isinstance(domain, Float) or not n:
        return row | dict.fromkeys(columns, math.nan)
    x, x_prime = trials.x[i, own], trials.x_prime[i, own]
    shift = trials.unit_x_prime[i, own] - trials.unit_x[i, own]
    mean = cluster_mean(shift, trials.seed[own], rng(0, "shift", *condition.words, trials.names[i], variant))
    at_bound = (x_prime != x) & ((x_prime == domain.lower) | (x_prime == domain.upper))
    values = (mean.value, *mean.ci, np.abs(shift).mean(), (x_prime > x).mean(), (x_prime < x).mean(),
              (x_prime == x).mean(), at_bound.mean())  # fmt: skip
    return row | dict(zip(columns, map(float, values), strict=True))


def cluster_mean(values: Array, clusters: NDArray[Any], gen: np.random.Generator) -> Estimate:
    """Mean of ``values`` (n,), with a bootstrap interval that resamples whole ``clusters`` (n,).

    Trials of one cell depend on each other (one search made them), so the interval is over cells: ``paired_bootstrap``
    of the cells' sums and counts. ``n`` counts the clusters.
    """
    _, place = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(place, weights=values), np.bincount(place)

    def mean(total: Array, number: Array) -> Array:
        return np.asarray(total.sum(axis=-1) / number.sum(axis=-1))

    return paired_bootstrap(mean, sums, counts, gen, RESAMPLES)


def _places(domain: Domain, values: Array, unit: Array) -> tuple[Array, Sequence[float] | None]:
    """Values in [0, 1] for the bins of a divergence, or as they are with their categories (few discrete values)."""
    if isinstance(domain, Float):
        return np.clip(unit, 0.0, 1.0), None  # rounding can leave the unit interval by 1e-16
    if isinstance(domain, Categorical):
        return values, range(len(domain.choices))
    if domain.upper - domain.lower < BINS:
        return values, range(domain.lower, domain.upper + 1)
    return _unit_integer(domain, values), None


def _unit_integer(domain: Integer, values: Array) -> Array:
    low, high = float(domain.lower), float(domain.upper)
    if domain.log:
        return np.log(values / low) / math.log(high / low)
    return (values - low) / (high - low)


def _shift_table(condition: Condition, frame: pd.DataFrame) -> Table:
    caption = (
        f"{condition.label}: how warm starts moved each hyperparameter, in unit coordinates. Mean shift: mean of "
        "x' - x over warm-started trials, with its 95 % bootstrap interval over cells (whole cells are resampled); "
        "mean |shift|: of its absolute value; up, down, not moved: shares of warm-started trials; clipped: share that "
        f"was moved onto a bound. KL: divergence of the variant from off, {KL_ESTIMATOR}, of all started "
        "configurations and of the incumbents (best on validation when the cell ended, or so far); null 95 %: its 95 % "
        "quantile when the labels variant and off are permuted, so what sampling noise alone gives. A dash: integers "
        "and categoricals, which never move, or nothing to compare."
    )
    shares = dict.fromkeys(("up", "down", "not moved", "clipped"), percent)
    return Table(file_name("hyperparameters", *condition.words), caption, frame, shares)


# ---- distributions


def _distribution_figure(
    study: Study, condition: Condition, trials: Configurations, final: NDArray[np.bool_]
) -> Figure:
    panels = []
    for i, name in enumerate(trials.names):
        domain = condition.space[name]
        curves = []
        for variant in condition.variants:
            own = trials.variant == variant
            groups = (("x", trials.x, trials.unit_x, own), ("x'", trials.x_prime, trials.unit_x_prime, own),
                      ("final x", trials.x, trials.unit_x, own & final),
                      ("final", trials.x_prime, trials.unit_x_prime, own & final))  # fmt: skip
            for kind, values, unit, chosen in groups:
                shown = _distribution(domain, (unit if isinstance(domain, Float) else values)[i, chosen])
                curves.append({"variant": variant, "kind": kind, "at": shown[0], "share": shown[1]})
        panels.append({"name": name, **_axis(domain), "curves": curves})
    counts = []
    for variant in condition.variants:
        own = trials.variant == variant
        counts.append(f"{variant}: {own.sum()} configurations, {(own & final).sum()} incumbents")
    caption = (
        f"{condition.label}: distribution of each hyperparameter. Continuous ones: share of configurations below a "
        "unit coordinate (bounds of the value in brackets); integers and categoricals: share of each value. Top: all "
        "started configurations, x as sampled (dotted) and x' as trained (solid; equal to x without a warm start). "
        f"Bottom: the same of the incumbents at the end, one a cell. {'; '.join(counts)}."
    )
    data = {"panels": panels, "colors": {name: study.colors[name] for name in condition.variants}}
    return Figure(file_name("hyperparameters", *condition.words), caption, draw_distributions, data)


def _distribution(domain: Domain, values: Array) -> tuple[Array, Array]:
    """Points (at, share) of a distribution function, at most QUANTILES; of few discrete values the share of each."""
    values = values[~np.isnan(values)]
    if not len(values):
        return np.empty(0), np.empty(0)
    if _few_values(domain):
        at = np.arange(len(domain.choices)) if isinstance(domain, Categorical) else _integers(domain)
        return at.astype(float), np.array([(values == value).mean() for value in at])
    ordered, n = np.sort(values), len(values)
    if n <= QUANTILES:
        return ordered, np.arange(1, n + 1) / n
    places = np.linspace(0, n - 1, QUANTILES).round().astype(int)
    return ordered[places], (places + 1) / n


def _few_values(domain: Domain) -> bool:
    return isinstance(domain, Categorical) or (isinstance(domain, Integer) and domain.upper - domain.lower < 2 * BINS)


def _integers(domain: Domain) -> NDArray[np.int64]:
    assert isinstance(domain, Integer)
    return np.arange(domain.lower, domain.upper + 1)


def _axis(domain: Domain) -> dict[str, Any]:
    """What a panel needs to know of the domain: title's addition, limits, tick labels of categories."""
    if isinstance(domain, Categorical):
        return {"bounds": "categorical", "limits": (-0.5, len(domain.choices) - 0.5), "step": False,
                "ticks": [str(choice) for choice in domain.choices]}  # fmt: skip
    words = f"[{domain.lower:g}, {domain.upper:g}]{' log' if domain.log else ''}"
    limits = (0.0, 1.0) if isinstance(domain, Float) else (domain.lower - 0.5, domain.upper + 0.5)
    return {"bounds": words, "limits": limits, "step": not _few_values(domain), "ticks": None}


def draw_distributions(panels: Sequence[dict[str, Any]], colors: dict[str, Any]) -> Any:
    """A column a hyperparameter: all configurations above, incumbents below; a line a variant."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    columns = min(5, len(panels))
    blocks = -(-len(panels) // columns)
    canvas = Canvas(figsize=(0.8 + 1.75 * columns, 0.6 + 3.2 * blocks), layout="constrained")
    grid = canvas.subplots(2 * blocks, columns, squeeze=False)
    for j in range(blocks * columns):
        top, bottom = grid[2 * (j // columns), j % columns], grid[2 * (j // columns) + 1, j % columns]
        if j >= len(panels):
            top.remove(), bottom.remove()
            continue
        panel = panels[j]
        _draw_panel(top, panel, ("x", "x'"), colors)
        _draw_panel(bottom, panel, ("final x", "final"), colors)
        top.set_title(f"{panel['name']}\n{panel['bounds']}", fontsize=8)
        top.tick_params(labelbottom=False)
        if j % columns == 0:
            top.set_ylabel("share, all", fontsize=8)
            bottom.set_ylabel("share, incumbents", fontsize=8)
        else:
            top.tick_params(labelleft=False), bottom.tick_params(labelleft=False)
    canvas.supxlabel("unit coordinate (integers, categoricals: value)", fontsize=8)
    handles = [Line2D([], [], color=color, label=variant) for variant, color in colors.items()]
    handles += [Line2D([], [], color="black", linestyle=":", label="x"), Line2D([], [], color="black", label="x'")]
    canvas.legend(handles=handles, loc="outside upper center", ncols=min(7, len(handles)), fontsize=8)
    return canvas


def _draw_panel(axis: Any, panel: dict[str, Any], kinds: Sequence[str], colors: dict[str, Any]) -> None:
    for curve in panel["curves"]:
        if curve["kind"] not in kinds or not len(curve["at"]):
            continue
        style: dict[str, Any] = {"color": colors[curve["variant"]], "linewidth": 1.1}
        style |= {"linestyle": ":", "linewidth": 1.6} if curve["kind"] in ("x", "final x") else {}
        if panel["step"]:
            ends = panel["limits"]
            at = np.concatenate([[ends[0]], curve["at"], [ends[1]]])
            axis.step(at, np.concatenate([[0.0], curve["share"], [1.0]]), where="post", **style)
        else:
            axis.plot(curve["at"], curve["share"], marker="o", markersize=3, **style)
    axis.set(xlim=panel["limits"], ylim=(-0.02, 1.02))
    axis.tick_params(labelsize=7)
    if panel["ticks"]:
        axis.set_xticks(range(len(panel["ticks"])), panel["ticks"], fontsize=7)
    elif panel["step"] and panel["limits"] == (0.0, 1.0):
        axis.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axis.set_yticks([0, 0.5, 1], ["0", ".5", "1"])


# ---- trajectories


def _trajectory_figure(study: Study, condition: Condition, trials: Configurations) -> Figure | None:
    """x -> x' in the two coordinates that move most; None without two of them or where nothing moves."""
    continuous = [i for i, name in enumerate(trials.names) if isinstance(condition.space[name], Float)]
    shift = np.abs(trials.unit_x_prime - trials.unit_x)[continuous]
    moves = trials.warm_started & (shift > 0).any(axis=0)
    variants = [name for name in condition.variants if (moves & (trials.variant == name)).any()]
    if len(continuous) < 2 or not variants:
        return None
    most = np.argsort(-shift[:, moves].mean(axis=1), kind="stable")[:2]
    places = sorted(continuous[i] for i in most)
    names = [trials.names[i] for i in places]
    still = [name for name in condition.variants if name not in variants]
    caption = (
        f"{condition.label}: warm starts as arrows from x to x' in {names[0]} and {names[1]}, the two coordinates that "
        "moved most (mean |shift| over all warm starts), in unit coordinates. One panel a variant, with its number of "
        "warm starts and the mean length |x' - x| over all coordinates. Drawn: all of them, or where there are more "
        f"than {ARROWS} a random sample of {ARROWS} with a fixed seed. A dot is x; where no arrow shows, x' is closer "
        "to it than the dot is wide."
    )
    caption += f" Nothing moved with {', '.join(still)}." if still else ""
    panels = [_trajectories(condition, trials, variant, places) for variant in variants]
    data = {"panels": panels, "names": names, "colors": {name: study.colors[name] for name in variants}}
    return Figure(file_name("trajectories", *condition.words), caption, draw_trajectories, data)


def _trajectories(condition: Condition, trials: Configurations, variant: str, places: list[int]) -> dict[str, Any]:
    own = np.flatnonzero(trials.warm_started & (trials.variant == variant))
    drawn = own
    if len(own) > ARROWS:
        drawn = np.sort(rng(0, "trajectories", *condition.words, variant).choice(own, ARROWS, replace=False))
    lengths = trials.frame["length"].to_numpy(dtype=float)[own]
    known = lengths[~np.isnan(lengths)]
    return {
        "variant": variant, "n": len(own), "length": float(known.mean()) if len(known) else math.nan,
        "x": trials.unit_x[places][:, drawn], "x_prime": trials.unit_x_prime[places][:, drawn],
    }  # fmt: skip


def draw_trajectories(panels: Sequence[dict[str, Any]], names: Sequence[str], colors: dict[str, Any]) -> Any:
    """Arrows in the unit square, a panel a variant."""
    from matplotlib.figure import Figure as Canvas

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Canvas(figsize=(0.5 + 2.1 * columns, 0.4 + 2.3 * rows), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        (x, y), (u, v) = panel["x"], panel["x_prime"] - panel["x"]
        color = colors[panel["variant"]]
        axis.scatter(x, y, s=3, color="black", alpha=0.5, linewidths=0)
        axis.quiver(x, y, u, v, angles="xy", scale_units="xy", scale=1, color=color, width=0.006, headwidth=4)
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axis.set_title(f"{panel['variant']}\nn = {panel['n']}, mean length {panel['length']:.2g}", fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(panels) :]:
        axis.remove()
    canvas.supxlabel(f"{names[0]} (unit coordinate)", fontsize=8)
    canvas.supylabel(f"{names[1]} (unit coordinate)", fontsize=8)
    return canvas
