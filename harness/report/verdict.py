"""The verdict: each (task, scheduler, variant) against the study's five success criteria.

A criterion passes when its estimate meets it (the first one also needs p < 0.05 in favour of the variant). It fails
when the estimate misses it and not for want of seeds: the 95 % interval lies beyond the threshold, or the test sees
nothing with as many seeds as it needs to see a reduction of just the threshold. In between it is undecided, and says
how many seeds would decide it, or that censoring is the reason. Costs are measured, and decided at any number of pairs;
of the others fewer than ``FEWEST_PAIRS`` decide nothing.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from harness.record import BUSY_KINDS, plain
from harness.report.compare import ENOUGH_PAIRS, OFF, common_end, pair
from harness.report.document import Section, Table
from harness.report.stats import (
    Effect,
    holm,
    paired_effect,
    pairs_needed,
    rank_biserial,
    relative_drop,
    sd_ratio,
    signed_differences,
    wilcoxon_signed_rank,
)
from harness.report.study import Condition, Study
from harness.report.tables import bound, counted, number, p_value, pairing_notes, percent, say
from harness.seeds import rng

REDUCTION, LEVEL = 0.15, 0.05  # of T@tau, median over pairs; of the signed-rank test
SCORE_DROP, GPU_HOURS, MEMORY, SD = 0.002, 0.05, 0.10, 1.10
SHARE = 0.75  # of the tuples must pass
FEWEST_PAIRS = 6  # with five, no two-sided signed-rank test can reach p < 0.05
MOST_SEEDS = 2000  # beyond this, "more than" is all that is said

CRITERIA = {
    "sooner": f"T@tau reduced by >= {REDUCTION:.0%} (median over pairs), p < {LEVEL}",
    "score": f"best score at most {SCORE_DROP:.1%} worse",
    "gpu_hours": f"<= {GPU_HOURS:.0%} extra GPU-hours",
    "memory": f"<= {MEMORY:.0%} extra peak memory",
    "spread": f"SD of T@tau at most {SD - 1:.0%} larger",
}
TITLES = {"sooner": "sooner", "score": "score", "gpu_hours": "GPU-hours", "memory": "memory", "spread": "spread"}
PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True)
class Criterion:
    """One criterion of one tuple. value: the estimate, low and high its 95 % interval (NaN: none). seeds: how many
    would decide it where it is undecided (inf: more than ``MOST_SEEDS``, NaN: it cannot be told from these pairs).
    why: in words what is known."""

    name: str
    status: str
    value: float
    low: float
    high: float
    seeds: float
    why: str


@dataclass(frozen=True)
class Judged:
    """One tuple. control: ``zero`` and ``random`` are judged as well, but are no attempts to be sooner: they do not
    count. p: of the signed-rank test; holm_p: adjusted for all tuples of the report, controls included."""

    task: str
    scheduler: str
    variant: str
    condition: str
    family: str
    discrete_share: float
    control: bool
    pairs: int
    p: float
    holm_p: float
    criteria: dict[str, Criterion]

    @property
    def status(self) -> str:
        """pass if all criteria pass, fail if one fails, else undecided."""
        found = {criterion.status for criterion in self.criteria.values()}
        return FAIL if FAIL in found else PASS if found == {PASS} else UNDECIDED

    @property
    def seeds(self) -> float:
        """Seeds that would decide it: of its undecided criteria the one that wants most. NaN: decided, or not known."""
        if self.status != UNDECIDED:
            return math.nan
        wanted = [c.seeds for c in self.criteria.values() if c.status == UNDECIDED]
        return math.nan if any(map(math.isnan, wanted)) else max(wanted)


@dataclass(frozen=True)
class Verdict:
    """All tuples. answer: yes, no or undecided; sentence: the same with its numbers."""

    tuples: list[Judged]
    answer: str
    sentence: str

    @property
    def counted(self) -> list[Judged]:
        return [entry for entry in self.tuples if not entry.control]

    def as_dict(self) -> dict[str, Any]:
        """The content of verdict.json."""
        tuples = [{**asdict(entry), "status": entry.status, "seeds_needed": entry.seeds} for entry in self.tuples]
        share = _share(self.counted)
        return {"answer": self.answer, "sentence": self.sentence, "share_passed": share, "criteria": CRITERIA,
                "share_needed": SHARE, "tuples": plain(tuples)}  # fmt: skip


@functools.lru_cache(maxsize=2)  # the page, the file and the terminal ask for the same one
def judge(study: Study) -> Verdict:
    """The verdict of a study; a tuple without off cells is undecided, for want of pairs."""
    tuples = [_judge(c, variant) for c in study.conditions for variant in c.variants if variant != OFF]
    adjusted = holm([entry.p for entry in tuples])
    tuples = [replace(entry, holm_p=float(p)) for entry, p in zip(tuples, adjusted, strict=True)]
    answer, sentence = _answer([entry for entry in tuples if not entry.control])
    return Verdict(tuples, answer, sentence)


def _judge(condition: Condition, variant: str) -> Judged:
    cells = condition.cells
    own = cells[cells["variant"] == variant]
    pairs, _ = pair(own, cells[cells["variant"] == OFF])
    ohgw = condition.ohgw(variant)
    control = ohgw.get("estimator") == "random" or ohgw.get("eta") == 0
    sooner, off = (pairs[f"time_wallclock_{side}"].to_numpy(dtype=float) for side in ("on", "off"))
    budget = common_end(pairs, "wallclock")
    if math.isnan(condition.tau):
        sooner = off = np.empty(0)
    p = wilcoxon_signed_rank(signed_differences(sooner, off, budget))
    names = (*condition.words, variant)
    criteria = [
        _sooner(sooner, off, budget, p, names),
        _score(pairs, condition.mode),
        _gpu_hours(pairs),
        _memory(pairs),
        _spread(sooner, off, budget, names),
    ]
    if math.isnan(condition.tau):
        criteria = [replace(c, why="no target is set") if c.name in ("sooner", "spread") else c for c in criteria]
    return Judged(
        condition.task, condition.scheduler, variant, condition.label, condition.family, condition.discrete_share,
        control, len(pairs), p, math.nan, {criterion.name: criterion for criterion in criteria},
    )  # fmt: skip


def _sooner(variant: Any, off: Any, budget: float, p: float, names: Sequence[str]) -> Criterion:
    """The reduction; with p < LEVEL the test must also favour the variant: a few much longer times can outweigh in
    ranks what most pairs gain."""
    effect = paired_effect(variant, off, budget)
    low, high = effect.ci
    known = bound(effect.low, effect.high)
    why = f"{known}, {_interval(low, high)}, p = {p_value(p)}"
    if len(variant) < FEWEST_PAIRS:
        return _few("sooner", len(variant), effect.low, low, high, known)
    favoured = rank_biserial(signed_differences(variant, off, budget)) > 0
    if p < LEVEL and not favoured:
        why += " in favour of off"
    if effect.low >= REDUCTION and p < LEVEL and favoured:
        return Criterion("sooner", PASS, effect.low, low, high, math.nan, why)
    if p < LEVEL and favoured and effect.low < REDUCTION <= effect.high:
        why += ", open by censoring: a longer budget would tell, more seeds may not"
        return Criterion("sooner", UNDECIDED, effect.low, low, high, math.nan, why)
    if high < REDUCTION:
        return Criterion("sooner", FAIL, effect.low, low, high, math.nan, why)
    if p < LEVEL and favoured:  # sooner, but by 15 %?
        return Criterion("sooner", UNDECIDED, effect.low, low, high, _seeds_until(effect, high), why)
    if max(np.isfinite(variant).mean(), np.isfinite(off).mean()) < 0.5:
        why += ", more than half of both sides never reached the target: a longer budget or another target would tell"
        return Criterion("sooner", UNDECIDED, effect.low, low, high, math.nan, why)
    needed = pairs_needed(variant, off, budget, rng(0, "power", *names), REDUCTION, alpha=LEVEL)
    if needed <= len(variant):
        return Criterion("sooner", FAIL, effect.low, low, high, math.nan, why)
    return Criterion("sooner", UNDECIDED, effect.low, low, high, needed, why)


def _seeds_until(effect: Effect, high: float) -> float:
    """Pairs at which an interval that shrinks with the square root of their number would end below REDUCTION, if the
    estimate stayed."""
    seeds = math.ceil(effect.n * ((high - effect.high) / (REDUCTION - effect.high)) ** 2)
    return float(seeds) if seeds <= MOST_SEEDS else math.inf


def _score(pairs: pd.DataFrame, mode: str) -> Criterion:
    """Pairs in which only off has a score count as an infinite drop: left out, diverged cells would look harmless."""
    on, off = (pairs[f"incumbent_test_score_{side}"].to_numpy(dtype=float) for side in ("on", "off"))
    lost = np.isnan(on) & ~np.isnan(off)
    drop = relative_drop(np.where(lost, -math.inf if mode == "max" else math.inf, on), off, mode)
    shown = percent(drop.value, 2) + (f" ({lost.sum()} without a score)" if lost.any() else "")
    return _against("score", drop.n, drop.value, *drop.ci, SCORE_DROP, shown)


def _gpu_hours(pairs: pd.DataFrame) -> Criterion:
    """Warm starts' busy seconds over all others of the same cell, median over pairs: measured, not estimated. Cells
    that did nothing are left out."""
    warm = pairs["busy_warm_start_on"].to_numpy(dtype=float)
    rest = [f"busy_{kind}_on" for kind in BUSY_KINDS if kind not in ("warm_start", "test")]
    other = pairs[rest].to_numpy(dtype=float).sum(axis=1)
    there = warm + other > 0
    with np.errstate(divide="ignore"):
        share = warm[there] / other[there]
    value = float(np.median(share)) if there.any() else math.nan
    return _measured("gpu_hours", len(pairs), value, GPU_HOURS, percent(value, 2))


def _memory(pairs: pd.DataFrame) -> Criterion:
    """Peak of the whole trial, warm start included, against off's; median over pairs."""
    peak = np.fmax(*(pairs[f"peak_memory_{kind}_on"].to_numpy(dtype=float) for kind in ("train", "warm_start")))
    off = pairs["peak_memory_train_off"].to_numpy(dtype=float)
    there = (peak > 0) & (off > 0)
    value = float(np.median(peak[there] / off[there])) - 1 if there.any() else math.nan
    return _measured("memory", len(pairs), value, MEMORY, percent(value, 2))


def _spread(variant: Any, off: Any, budget: float, names: Sequence[str]) -> Criterion:
    """Where a side never reached the target, all of its times are the budget: an SD of 0 that says nothing of it."""
    ratio = sd_ratio(variant, off, budget, rng(0, "spread", *names))
    never = [side for side, times in (("the variant", variant), ("off", off)) if np.isinf(times).all()]
    if ratio.n >= FEWEST_PAIRS and never:
        why = f"{' and '.join(never)} never reached the target"
        return Criterion("spread", UNDECIDED, math.nan, math.nan, math.nan, math.nan, why)
    return _against("spread", ratio.n, ratio.value, *ratio.ci, SD, f"x {number(ratio.value, 3)}")


def _measured(name: str, n: int, value: float, limit: float, shown: str) -> Criterion:
    """A cost: it is what it is, whatever the number of seeds."""
    if math.isnan(value):
        return Criterion(name, UNDECIDED, value, math.nan, math.nan, math.nan, "not recorded" if n else "no pairs")
    return Criterion(name, PASS if value <= limit else FAIL, value, math.nan, math.nan, math.nan, shown)


def _against(name: str, n: int, value: float, low: float, high: float, limit: float, shown: str) -> Criterion:
    """An estimate that must not be above ``limit``; missed, but not surely, it is undecided.

    The seeds that would decide it: an interval shrinks with the square root of their number, so it would end at
    ``limit`` with n (width / distance)^2 pairs, if the estimate stayed.
    """
    why = f"{shown}, {_interval(low, high, ratio=name == 'spread')}"
    if n < FEWEST_PAIRS:
        return _few(name, n, value, low, high, shown)
    if math.isnan(value):
        return Criterion(name, UNDECIDED, value, low, high, math.nan, "no pair varies")
    if value <= limit or low > limit:
        return Criterion(name, PASS if value <= limit else FAIL, value, low, high, math.nan, why)
    seeds = math.ceil(n * ((value - low) / (value - limit)) ** 2) if math.isfinite(value - low) else math.inf
    return Criterion(name, UNDECIDED, value, low, high, seeds if seeds <= MOST_SEEDS else math.inf, why)


def _few(name: str, n: int, value: float, low: float, high: float, shown: str) -> Criterion:
    why = f"{shown} from {n} pairs" if n else "no pairs"
    return Criterion(name, UNDECIDED, value, low, high, FEWEST_PAIRS if n else math.nan, why)


def _interval(low: float, high: float, ratio: bool = False) -> str:
    if math.isnan(low):
        return "no interval"
    return f"[{number(low, 3)}, {number(high, 3)}]" if ratio else f"[{percent(low, 1)}, {percent(high, 1)}]"


def _share(counted: Sequence[Judged]) -> float:
    return sum(entry.status == PASS for entry in counted) / len(counted) if counted else math.nan


def _answer(counted: Sequence[Judged]) -> tuple[str, str]:
    """The overall answer: yes once enough tuples pass, no once enough cannot, else undecided."""
    total = len(counted)
    if not total:
        return UNDECIDED, "Undecided: there is no variant to judge besides off and the controls."
    passed, failed = (sum(entry.status == status for entry in counted) for status in (PASS, FAIL))
    answer = "yes" if passed >= SHARE * total else "no" if total - failed < SHARE * total else UNDECIDED
    sentence = (
        f"{answer.capitalize()}: {passed} of {total} (task, scheduler, variant) tuples pass all five criteria "
        f"({passed / total:.0%}; {SHARE:.0%} are needed), {failed} fail, {total - passed - failed} are undecided."
    )
    wanted = [entry.seeds for entry in counted if not math.isnan(entry.seeds)]
    if answer == UNDECIDED and wanted:
        least, most = _seeds(min(wanted)), _seeds(max(wanted))
        sentence += f" Seeds that would decide them: {least if least == most else f'{least} to {most}'} a variant."
    few = sum(entry.pairs < ENOUGH_PAIRS for entry in counted)
    return answer, sentence + (f" {few} have fewer than {ENOUGH_PAIRS} pairs: preliminary." if few else "")


def _seeds(count: float) -> str:
    if math.isnan(count):
        return "-"
    if math.isinf(count):
        return f"more than {MOST_SEEDS}"
    return f"at least {count:.0f}" if count <= FEWEST_PAIRS else f"{count:.0f}"  # the fewest is no estimate


# ---- as a section, and on the terminal


def section(study: Study) -> Section:
    """The answer, the table of tuples, and how they split."""
    verdict = judge(study)
    text = [
        verdict.sentence,
        "A pass rests on the estimate; its 95 % interval stands beside it. Criteria: "
        + "; ".join(f"{TITLES[name]}: {CRITERIA[name]}" for name in CRITERIA)
        + ".",
    ]
    how = (
        "T@tau is in wall-clock seconds; the best score is the incumbent's on the test set, and a cell without one is "
        "worse than any; extra GPU-hours are warm starts' busy seconds over the other busy seconds of the same cell, "
        "median over pairs; extra peak memory is that of the whole trial, warm start included, over off's, median over "
        "pairs (on a CPU it is the whole process's). A criterion passes when its estimate meets it (the first one with "
        "p < 0.05 in favour of the variant, by Wilcoxon's signed-rank test), fails when the estimate misses it and its "
        "95 % interval lies beyond the threshold, or the test sees nothing with as many seeds as it needs, with 80 % "
        f"power at the observed paired spread, for a reduction of {REDUCTION:.0%}; in between it is undecided. So is a "
        "significant reduction that censoring leaves open on both sides of the threshold, and a spread where a side "
        f"never reached the target. Fewer than {FEWEST_PAIRS} pairs decide nothing. Holm p: adjusted for all tuples of "
        "this report. Controls (zero, random) are judged and not counted."
    )
    if not verdict.tuples:
        return Section("verdict", "The verdict", [*text, how], notes=missing(study))
    formats = {"p": p_value, "Holm p": p_value, "seeds needed": _seeds}
    tables = [Table("verdict_all", "The verdict: one row a (task, scheduler, variant).", _frame(verdict), formats)]
    splits = _splits(verdict)
    if not splits.empty:
        by = "Tuples that pass, by scheduler, variant, task family and share of discrete hyperparameters; no controls."
        tables.append(Table("verdict_splits", by, splits, {"share passed": percent}))
    return Section("verdict", "The verdict", text, tables, notes=[how, *missing(study)])


def _frame(verdict: Verdict) -> pd.DataFrame:
    rows = []
    for entry in verdict.tuples:
        criteria = {TITLES[name]: f"{c.status} {c.why}" for name, c in entry.criteria.items()}
        rows.append({
            "condition": entry.condition, "variant": entry.variant + (" (control)" if entry.control else ""),
            "verdict": entry.status, "pairs": entry.pairs, **criteria, "p": entry.p, "Holm p": entry.holm_p,
            "seeds needed": entry.seeds,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _splits(verdict: Verdict) -> pd.DataFrame:
    """Counts of pass, fail and undecided by each of the things a reader would split by."""
    rows = []
    kinds = {
        "scheduler": "scheduler",
        "variant": "variant",
        "task family": "family",
        "discrete share": "discrete_share",
    }
    for title, attribute in kinds.items():
        groups: dict[str, list[Judged]] = {}
        for entry in verdict.counted:
            value = getattr(entry, attribute)
            groups.setdefault(f"{value:.0%}" if isinstance(value, float) else str(value), []).append(entry)
        for value, entries in sorted(groups.items()):
            counts = {status: sum(e.status == status for e in entries) for status in (PASS, FAIL, UNDECIDED)}
            rows.append(
                {"by": title, "value": value, "tuples": len(entries), **counts, "share passed": _share(entries)}
            )
    return pd.DataFrame(rows)


def print_verdict(study: Study, console: Console) -> None:
    """The description, each tuple with what keeps it from passing, what has no pair, and the answer last."""
    from harness.report.description import description

    verdict = judge(study)
    for line in [counted(study.results), *description(study), ""]:
        say(console, line)
    for entry in verdict.tuples:
        words = [f"{TITLES[name]} {c.status} ({c.why})" for name, c in entry.criteria.items() if c.status != PASS]
        needed = "" if math.isnan(entry.seeds) else f"; seeds needed: {_seeds(entry.seeds)}"
        control = " (control)" if entry.control else ""
        detail = f": {'; '.join(words)}{needed}" if words else f": {entry.criteria['sooner'].why}"
        say(console, f"{entry.status:<9}  {entry.condition} / {entry.variant}{control}, {entry.pairs} pairs{detail}")
    for line in [*missing(study), "", verdict.sentence]:
        say(console, line)


def missing(study: Study) -> list[str]:
    """Seeds and cells that form no pair, and the commands that add off cells: nothing is left out without a word."""
    return [f"{c.label}: {line}" for c in study.conditions for line in pairing_notes(c.comparison)]
