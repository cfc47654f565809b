"""What one key changes: variants or settings found in the data that differ in nothing else."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.report.compare import OFF, pair
from harness.report.compare import Variant as Compared
from harness.report.document import Figure, Section, Table, file_name
from harness.report.stats import median_interval, median_of
from harness.report.study import Condition, Study
from harness.report.tables import p_value, percent
from harness.sweep import deciding

IMPLEMENTATION = ("task._target_", "scheduler._target_")  # other tasks and schedulers are no ablation of one
EXAMPLES = (
    "ohgw=off,normalized ohgw.eta=0.02,0.05,0.1,0.2 (ohgw.n_steps, ohgw.batch_size, ohgw.mask, ohgw.estimator and "
    "ohgw.step likewise), or task.label_noise=0,0.1,0.2 (task.batch_size, task.model and task.space likewise)"
)


@dataclass(frozen=True)
class Point:
    """One variant in one condition, at one value of the key. series: what it shares with the points that it is
    compared with."""

    value: Any
    series: str
    condition: Condition
    variant: str


@dataclass(frozen=True)
class Ablation:
    """Points that differ in ``key`` (and series): values in order, first to last. label, words: what they share."""

    key: str
    label: str
    words: tuple[str, ...]
    points: list[Point]

    @property
    def values(self) -> list[Any]:
        return _ordered([point.value for point in self.points])

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(point.series for point in self.points))


def section(study: Study) -> Section:
    """A table and a figure for each key that is the only difference between variants, or between settings."""
    out = Section("ablations", "Ablations")
    found = [ablation for condition in study.conditions for ablation in variant_ablations(condition)]
    found += setting_ablations(study.conditions)
    if not found:
        out.notes.append(
            "There is no ablation in these results: no two variants of a condition, and no two settings of a "
            f"scheduler, differ in exactly one key. A sweep such as {EXAMPLES} adds one."
        )
        return out
    out.text = [
        "An ablation here is a set of variants of one condition, or of settings of one scheduler, that differ in "
        f"exactly one key of their configuration. Found: {'; '.join(_headline(ablation) for ablation in found)}."
    ]
    for ablation in found:
        name = file_name(f"ablation-{ablation.key}", *ablation.words)
        frame = pd.DataFrame([_row(point) for point in ablation.points])
        out.tables.append(_table(name, ablation, frame))
        out.figures.append(_figure(study, name, ablation, frame))
    for condition in dict.fromkeys(point.condition.label for ablation in found for point in ablation.points):
        if any(c.label == condition and OFF not in c.variants for c in study.conditions):
            out.notes.append(f"{condition}: without off cells there are no effects; ohgw=off adds them.")
    return out


# ---- what differs in one key


def variant_ablations(condition: Condition) -> list[Ablation]:
    """The OHGW keys in which variants of one condition differ alone, each with all its groups of variants as series.

    Variants that do not move (eta 0) join a sweep of at least two other values; alone with one they are the A/A
    control.
    """
    configs = {name: condition.ohgw(name) for name in condition.variants if name != OFF}
    varied = [key for key in _keys(configs.values()) if len({_text(c.get(key)) for c in configs.values()}) > 1]
    found = []
    for key in varied:
        points: list[Point] = []
        for group in _alike(configs, key):
            moving = {_text(configs[name].get(key)) for name in group if configs[name].get("eta") != 0}
            if len(moving) > 1:
                series = _series(configs[group[0]], [other for other in varied if other != key], group)
                points += [Point(configs[name].get(key), series, condition, name) for name in group]
        if points:
            found.append(Ablation(key, condition.label, condition.words, _sorted(points)))
    return found


def setting_ablations(conditions: Sequence[Condition]) -> list[Ablation]:
    """The keys of task, scheduler, budget, workers or backend in which settings differ alone; a series a variant that
    more than one of these settings has."""
    settings = {i: _entries(condition.config) for i, condition in enumerate(conditions)}
    found = []
    for key in _keys(settings.values()):
        if key in IMPLEMENTATION:
            continue
        for group in _alike(settings, key):
            if len({_text(settings[i].get(key)) for i in group}) < 2:
                continue
            members = [conditions[i] for i in group]
            points = [
                Point(value, variant, condition, variant)
                for condition, value in zip(members, _setting_values(members, key), strict=True)
                for variant in condition.variants
            ]
            points = [p for p in points if len({_text(q.value) for q in points if q.series == p.series}) > 1]
            if not points:
                continue
            words = _common_words(members, key)
            label = " / ".join(words[:2]) + "".join(f", {word}" for word in words[2:])
            found.append(Ablation(key, label, words, _sorted(points)))
    return found


def _entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a setting, one entry a dotted key."""
    decides = {name: value for name, value in deciding(config).items() if name not in ("ohgw", "seed")}
    entries: dict[str, Any] = {}
    for name, value in decides.items():
        entries |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return entries


def _keys(entries: Any) -> list[str]:
    return list(dict.fromkeys(key for entry in entries for key in entry if not key.startswith("_")))


def _alike(entries: Mapping[Any, Mapping[str, Any]], key: str) -> Iterator[list[Any]]:
    """Groups of two or more that are equal in everything but ``key``."""
    groups: dict[str, list[Any]] = {}
    for name, entry in entries.items():
        rest = json.dumps({k: v for k, v in entry.items() if k != key}, sort_keys=True, default=str)
        groups.setdefault(rest, []).append(name)
    yield from (group for group in groups.values() if len(group) > 1)


def _series(config: Mapping[str, Any], varied: Sequence[str], group: Sequence[str]) -> str:
    """A name for a group of variants: their preset, else the values they share of what varies elsewhere."""
    presets = {name.split("(")[0] for name in group}
    if len(presets) == 1:
        return next(iter(presets))
    return ", ".join(f"{key}={_text(config.get(key))}" for key in varied) or "all else equal"


def _setting_values(members: Sequence[Condition], key: str) -> list[Any]:
    """The values of ``key``; of a space its name, where the names tell the spaces apart."""
    if key == "task.space":
        names = [condition.config["task"]["space"] for condition in members]
        if len(set(names)) == len(names):
            return names
    return [_entries(condition.config).get(key) for condition in members]


def _common_words(members: Sequence[Condition], key: str) -> tuple[str, ...]:
    """The words of the conditions without ``key``; those of the first if something else differs."""
    last = re.escape(key.rpartition(".")[2])

    def without(word: str) -> str:
        return re.sub(rf"(?<=[(,]){last}=[^,)]*,?", "", word).replace(",)", ")").replace("()", "")

    stripped = [tuple(without(word) for word in c.words if not word.startswith(f"{key}=")) for c in members]
    return stripped[0]


def _sorted(points: Sequence[Point]) -> list[Point]:
    order = {_text(value): i for i, value in enumerate(_ordered([point.value for point in points]))}
    series = {name: i for i, name in enumerate(dict.fromkeys(point.series for point in points))}
    return sorted(points, key=lambda point: (series[point.series], order[_text(point.value)]))


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Distinct values: numbers by size, others as texts; None first."""
    distinct = {_text(value): value for value in values}
    return sorted(distinct.values(), key=lambda value: _place(value))


def _place(value: Any) -> tuple[int, float, str]:
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 1, float(value), ""
    return 2, 0.0, _text(value)


def _text(value: Any) -> str:
    """A value as tables and axes show it: lists of names joined, an empty list as none."""
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return "+".join(value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _headline(ablation: Ablation) -> str:
    return f"{ablation.key} ({', '.join(map(_text, ablation.values))}) in {ablation.label}"


# ---- its numbers


def _row(point: Point) -> dict[str, Any]:
    condition, variant = point.condition, point.variant
    compared = next(entry for entry in condition.comparison.variants if entry.variant == variant)
    cells = condition.cells[condition.cells["variant"] == variant]
    off = condition.cells[condition.cells["variant"] == OFF]
    score = cells["incumbent_test_score"].to_numpy(dtype=float)
    known = score[~np.isnan(score)]
    q25, q75 = np.quantile(known, [0.25, 0.75]) if len(known) else (math.nan, math.nan)
    row: dict[str, Any] = {
        "series": point.series, "value": _text(point.value), "variant": variant, "condition": condition.label,
        "cells": len(cells), **_effect(condition, compared),
        "score": median_of(score), "score q25": float(q25), "score q75": float(q75),
    }  # fmt: skip
    paired, _ = pair(cells, off)
    difference = (paired["incumbent_test_score_on"] - paired["incumbent_test_score_off"]).to_numpy(dtype=float)
    difference = difference[~np.isnan(difference)] if variant != OFF else np.empty(0)
    low, high = median_interval(difference, difference)
    return row | {"score - off": median_of(difference), "score - off CI low": low, "score - off CI high": high}


def _effect(condition: Condition, compared: Compared) -> dict[str, Any]:
    """Effect on T@tau in wall-clock; unknown for off, without off, and without a target."""
    time = compared.time["wallclock"]
    effect = compared.effect.get("wallclock")
    median, censored = time.median, float(time.censored)
    if math.isnan(condition.tau):  # nothing is censored where there is nothing to reach
        effect, median, censored = None, math.nan, math.nan
    columns = ("effect", "effect, upper bound", "CI low", "CI high", "p")
    values = (math.nan,) * 5
    if effect is not None:
        values = (effect.low, effect.high, effect.ci_low, effect.ci_high, effect.p)
    return {"pairs": effect.pairs if effect else 0, "T median (s)": median, "censored": censored,
            **dict(zip(columns, values, strict=True))}  # fmt: skip


def _table(name: str, ablation: Ablation, frame: pd.DataFrame) -> Table:
    metric = ablation.points[0].condition.metric
    caption = (
        f"{ablation.label}: what {ablation.key} changes, all else being equal within a series. T: wall-clock seconds "
        "to the target, Kaplan-Meier median over cells (inf: not reached by half of them); censored: cells that ended "
        "without it. Effect: median over pairs (finished cells of one seed) of 1 - T/T_off, positive = sooner than off "
        "(between effect and its upper bound where censoring leaves it open; neither reached it: 0), with its 95 % "
        "interval (order statistics) and p of the two-sided Wilcoxon signed-rank test, not adjusted. Score: "
        f"incumbent's test {metric} at the end, median and quartiles over cells; score - off: median over pairs, with "
        "its 95 % interval (order statistics; none for fewer than six pairs)."
    )
    formats: dict[str, Any] = dict.fromkeys(("effect", "effect, upper bound", "CI low", "CI high"), percent)
    return Table(name, caption, frame, formats | {"p": p_value})


def _figure(study: Study, name: str, ablation: Ablation, frame: pd.DataFrame) -> Figure:
    values = [_text(value) for value in ablation.values]
    series = []
    for label in ablation.series:
        part = frame[frame["series"] == label]
        series.append({
            "label": label, "at": np.array([values.index(value) for value in part["value"]]),
            **{column: part[column].to_numpy(dtype=float) for column in (
                "effect", "effect, upper bound", "CI low", "CI high", "score", "score q25", "score q75")},
        })  # fmt: skip
    points = ablation.points
    one = all(point.condition is points[0].condition for point in points)
    colors = {label: study.colors[label] for label in ablation.series if label in study.colors}
    cells = (
        f"{frame['cells'].min()} to {frame['cells'].max()}" if frame["cells"].nunique() > 1 else frame["cells"].min()
    )
    caption = (
        f"{ablation.label}: what {ablation.key} changes, all else being equal within a series; its values are spaced "
        "evenly. Left: effect on the wall-clock time T to the target, median over pairs (finished cells of one seed) "
        "of 1 - T/T_off in percent, positive = sooner than off, with its 95 % interval (order statistics; none for "
        "fewer than six pairs that reached the target); a thick bar spans what censoring leaves open. Right: "
        f"incumbent's test {points[0].condition.metric} at the end, median and quartiles over cells"
        f"{', with off as the gray band' if one and OFF in points[0].condition.variants else ''}. {cells} cells a "
        "point."
    )
    data = {"key": ablation.key, "values": values, "series": series, "colors": colors,
            "metric": points[0].condition.metric, "off": _off_scores(points[0].condition) if one else None}  # fmt: skip
    return Figure(name, caption, draw_ablation, data)


def _off_scores(condition: Condition) -> tuple[float, float, float] | None:
    """Quartiles of the final test score of off."""
    scores = condition.cells.loc[condition.cells["variant"] == OFF, "incumbent_test_score"].to_numpy(dtype=float)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        return None
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def draw_ablation(
    key: str,
    values: Sequence[str],
    series: Sequence[dict[str, Any]],
    colors: Mapping[str, Any],
    metric: str,
    off: tuple[float, float, float] | None,
) -> Any:
    """Effect on the time to target on the left and final score on the right, against the key's values."""
    import seaborn
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.0, 2.8), layout="constrained")
    left, right = canvas.subplots(1, 2)
    palette = seaborn.color_palette("colorblind", max(10, len(series)))
    dodge = np.linspace(-0.15, 0.15, len(series)) if len(series) > 1 else [0.0]
    floor = _floor(series)
    for i, (line, shift) in enumerate(zip(series, dodge, strict=True)):
        color = colors.get(line["label"], palette[i % len(palette)])
        at = line["at"] + shift
        _draw_effects(left, at, line, color, floor)
        ends = np.stack([line["score"] - line["score q25"], line["score q75"] - line["score"]])
        right.errorbar(at, line["score"], np.nan_to_num(ends), color=color, marker="o", markersize=4, linewidth=1,
                       label=line["label"])  # fmt: skip
    left.axhline(0, color="black", linewidth=0.6)
    if off is not None:
        right.axhspan(off[0], off[2], color=(0.35, 0.35, 0.35), alpha=0.15, linewidth=0)
        right.axhline(off[1], color=(0.35, 0.35, 0.35), linewidth=1, label="off")
    for axis, label in ((left, "1 - T / T_off (%)"), (right, f"final test {metric}")):
        axis.set_xticks(range(len(values)), values)
        axis.set(xlim=(-0.5, len(values) - 0.5), xlabel=key, ylabel=label)
        axis.grid(axis="x", visible=False)
    handles, labels = right.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=8)
    return canvas


def _floor(series: Sequence[dict[str, Any]]) -> float:
    """Where bounds without a lower end are cut: a little below everything else, in percent."""
    columns = ("effect", "effect, upper bound", "CI low", "CI high")
    known = np.concatenate([line[column] for line in series for column in columns])
    return 110 * float(np.min(known[np.isfinite(known)], initial=-0.5))


def _draw_effects(axis: Any, at: Any, line: Mapping[str, Any], color: Any, floor: float) -> None:
    low, high, ci_low, ci_high = (
        np.maximum(100 * line[column], floor) for column in ("effect", "effect, upper bound", "CI low", "CI high")
    )
    axis.vlines(at, ci_low, ci_high, color=color, linewidth=1)
    open_ended = high > low
    axis.vlines(at[open_ended], low[open_ended], high[open_ended], color=color, linewidth=4, alpha=0.5)
    axis.plot(at, (low + high) / 2, color=color, marker="o", markersize=4, linewidth=1)
