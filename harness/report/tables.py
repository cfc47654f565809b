"""The summary as text: a block a (task, scheduler), on a terminal with rich, elsewhere as plain lines of any width."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from harness.record import BUSY_KINDS, plain
from harness.report.compare import (
    ENOUGH_PAIRS,
    UNITS,
    Against,
    Comparison,
    Tau,
    TimeToTarget,
    Variant,
    ranges,
)
from harness.report.load import Results

_UNIT = {"wallclock": ("wall-clock", "s"), "gpu_hours": ("GPU-hours", "h")}
_KINDS = {"startup": "start-up", "warm_start": "warm start"}

RULES = (
    "T@tau: first report at which the incumbent (best on validation so far) has test score tau; median [quartiles] by "
    "Kaplan-Meier, where a cell without it is censored at its own end or, if shorter, at the budget configured in that "
    "unit (an unfinished cell: where it stands now).",
    "effect: median over pairs (finished cells of one seed) of 1 - T/T_off, positive = sooner than off. Neither "
    "reached tau: 0. Only one did: the ratio is bounded by T > B of the other; where that leaves the median open, its "
    "bounds are shown (>, <, to) and the interval covers all of it. 95 % interval: from order statistics "
    "(Hettmansperger and Sheather), without the pairs where neither reached tau; none if fewer than six are left.",
    "B: the end of the longest cell of these pairs (no other variant, no unfinished cell) or, if shorter, the budget "
    "configured in that unit. Under a budget in another unit only (epochs, trials) cells end at different times: one "
    "that ended before B without reaching tau is still read as T > B.",
    "p: two-sided Wilcoxon signed-rank, exact up to 200 pairs. Neither reached tau: tie (Pratt). Only one did: it "
    "wins, ranked by B - T with the same B, also where the other ended before B.",
    "scores: medians over cells (validation best, and the test score of that incumbent). busy hours: mean per cell. "
    "warm / busy: warm starts' share of busy time without test evaluation; warm / FLOPs: of all FLOPs. memory: median "
    "over cells of the peak. fallbacks: share of warm-started trials.",
    "Unfinished cells count in every column as they stand now (censored there), but form no pairs.",
)


@dataclass(frozen=True)
class Table:
    """Text cells under a header; the first column is left-aligned, the others right-aligned."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(comparison: Comparison) -> list[Table]:
    """The comparison's numbers, a row a variant: time to target by unit, scores and overhead, busy hours by kind."""
    return [*(_time_table(comparison, unit) for unit in UNITS), _score_table(comparison), _busy_table(comparison)]


def _time_table(comparison: Comparison, unit: str) -> Table:
    name, symbol = _UNIT[unit]
    header = ("variant", "n", f"median T [IQR], {symbol}", "censored", "effect vs off", "95 % CI", "p", "pairs")
    return Table(f"time to target, {name}", header, [
        (v.variant, count(v), *_time(v.time[unit]), *_effect(v.effect.get(unit))) for v in comparison.variants
    ])  # fmt: skip


def _score_table(comparison: Comparison) -> Table:
    header = ("variant", "best val", "its test", "warm / busy", "warm / FLOPs", "memory train", "memory warm",
              "fallbacks", "failed trials")  # fmt: skip
    rows = [
        (
            v.variant,
            number(v.best_validation_score, 4),
            number(v.incumbent_test_score, 4),
            percent(v.warm_start_share["busy"], 2),
            percent(v.warm_start_share["flops"], 2),
            memory(v.peak_memory["train"]),
            memory(v.peak_memory["warm_start"]),
            percent(v.fallback_share),
            str(v.failures),
        )
        for v in comparison.variants
    ]
    return Table("scores and overhead", header, rows)


def _busy_table(comparison: Comparison) -> Table:
    header = ("variant", *(_KINDS.get(kind, kind) for kind in BUSY_KINDS), "without test")
    rows = []
    for v in comparison.variants:
        charged = sum(v.busy_hours.values()) - v.busy_hours["test"]
        hours = [*(v.busy_hours[kind] for kind in BUSY_KINDS), charged]
        rows.append((v.variant, *(number(value, 3) for value in hours)))
    return Table("busy hours per cell", header, rows)


def pairing_notes(comparison: Comparison) -> list[str]:
    """What is missing for a comparison: off cells (with the commands that add them), and seeds without a pair."""
    lines = []
    if comparison.add_off:
        this = "this command adds them" if len(comparison.add_off) == 1 else "these commands add them"
        lines.append(f"There are no off cells, hence no effect; {this}: {'; '.join(comparison.add_off)}")
    if comparison.no_command:
        cells = "; ".join(f"{variant} seeds {ranges(seeds)}" for variant, seeds in comparison.no_command.items())
        lines.append(f"There are no off cells for these cells, and the command that ran them is not recorded: {cells}")
    return [*lines, *(line for variant in comparison.variants for line in _missing(variant))]


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the comparison must know besides its tables."""
    lines = pairing_notes(comparison)
    ends = [_ends(variant) for variant in comparison.variants if any(e.pairs for e in variant.effect.values())]
    if ends:
        lines.append(f"B: {'; '.join(ends)}")
    few = [f"{v.variant} ({v.effect[UNITS[0]].pairs})" for v in comparison.variants
           if v.effect and v.effect[UNITS[0]].preliminary]  # fmt: skip
    if few:
        lines.append(f"* preliminary: fewer than {ENOUGH_PAIRS} pairs: {', '.join(few)}")
    return lines


def print_summary(results: Results, console: Console, tau: Tau = None) -> None:
    """Print the numbers of ``results`` (``tau`` as in ``summary_tables``). Warnings are the caller's to print after."""
    from harness.report.description import description
    from harness.report.study import Study

    study = Study(results, tau)
    comparisons = [condition.comparison for condition in study.conditions]
    for line in [counted(results), *description(study)]:
        say(console, line)
    for comparison in comparisons:
        say(console, "")
        say(console, heading(comparison))
        for table in tables(comparison):
            say(console, "")
            _print(table, console)
        for line in notes(comparison):
            say(console, line)
    if comparisons:
        say(console, "")
        for line in RULES:
            say(console, line)


def summary_json(results: Results, tau: Tau = None) -> dict[str, Any]:
    """The same numbers for machines, and the verdict; NaN and infinities (not known, not reached) are null."""
    from harness.report.description import description
    from harness.report.study import Study
    from harness.report.verdict import judge

    study = Study(results, tau)
    status = results.cells["status"].value_counts().to_dict() if len(results.cells) else {}
    return plain({
        "path": results.path,
        "cells": {**status, "corrupt": len(results.corrupt)},
        "corrupt": results.corrupt,
        "warnings": list(dict.fromkeys(results.warnings)),
        "description": description(study),
        "verdict": judge(study).as_dict(),
        "comparisons": [condition.comparison.as_dict() for condition in study.conditions],
        "rules": RULES,
    })  # fmt: skip


def counted(results: Results) -> str:
    """One line: how many cells there are of which kind."""
    status: Any = results.cells["status"].value_counts() if len(results.cells) else {}
    parts = [f"{status.get('finished', 0)} finished"]
    parts += [f"{n} {kind}" for kind, n in status.items() if kind != "finished"]
    if results.corrupt:
        parts.append(f"{len(results.corrupt)} corrupt and left out")
    return f"{results.path}: cells: {', '.join(parts)}"


def count(variant: Variant) -> str:
    return f"{variant.n} ({variant.unfinished} unfinished)" if variant.unfinished else str(variant.n)


def number(value: float, digits: int) -> str:
    """``digits`` significant digits; NaN as a dash."""
    if math.isnan(value):
        return "-"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def percent(value: float, decimals: int = 1) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.{decimals}f}%" if math.isfinite(value) else ("-inf" if value < 0 else "inf")


def memory(size: float) -> str:
    """Bytes as MB (10^6); a dash where nothing was recorded."""
    return f"{number(size / 1e6, 3)} MB" if size > 0 else "-"


def p_value(p: float) -> str:
    if math.isnan(p):
        return "-"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _time(time: TimeToTarget) -> tuple[str, str]:
    def reached(value: float) -> str:
        return number(value, 3) if math.isfinite(value) else "not reached"

    pending = f" (+{time.pending} pending)" if time.pending else ""
    return f"{reached(time.median)} [{reached(time.q25)}, {reached(time.q75)}]", f"{time.censored}{pending}"


def _effect(effect: Against | None) -> tuple[str, str, str, str]:
    if effect is None:
        return "", "", "", ""
    mark = "*" if effect.preliminary else ""
    interval = "-" if math.isnan(effect.ci_low) else f"[{percent(effect.ci_low)}, {percent(effect.ci_high)}]"
    return bound(effect.low, effect.high), interval, p_value(effect.p), f"{effect.pairs}{mark}"


def bound(low: float, high: float) -> str:
    """The median reduction: itself, or what is known of it (at most 1: no time is negative)."""
    if low == high or math.isnan(low):
        return percent(low)
    if math.isinf(low):
        return "not identified" if high >= 1 else f"< {percent(high)}"
    return f"> {percent(low)}" if high >= 1 else f"{percent(low)} to {percent(high)}"


def _ends(variant: Variant) -> str:
    ends = (f"{number(variant.effect[unit].budget, 3)} {symbol}" for unit, (_, symbol) in _UNIT.items())
    return f"{variant.variant} {', '.join(ends)}"


def _missing(variant: Variant) -> Iterator[str]:
    why = {"only_here": "no off cell", "only_off": f"no {variant.variant} cell", "unfinished": "not both finished"}
    parts = [f"seeds {ranges(seeds)} ({why[kind]})" for kind, seeds in variant.missing.items() if seeds]
    if parts:
        yield f"{variant.variant}: without a pair: {'; '.join(parts)}"


def heading(comparison: Comparison) -> str:
    differs = "".join(f", {key}={value}" for key, value in comparison.setting.items())
    target = f"tau = {comparison.tau:g}" if not math.isnan(comparison.tau) else "no tau set"
    return f"{comparison.task} / {comparison.scheduler}{differs}: {comparison.metric}, {target}"


def _print(table: Table, console: Console) -> None:
    """With rich where it fits the terminal, else turned, else as plain lines: no number is ever split or cut."""
    fitting = next((t for t in (table, _turned(table)) if _width(t) <= console.width), None)
    if not console.is_terminal or fitting is None:
        for line in plain_lines(table if not console.is_terminal else _turned(table)):
            say(console, line)
        return
    rich_table = RichTable(
        title=fitting.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for i, name in enumerate(fitting.header):
        rich_table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in fitting.rows:
        rich_table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(rich_table)


def _width(table: Table) -> int:
    """Columns that rich needs: the plain lines', and what its box puts in between."""
    return max(map(len, plain_lines(table))) + len(table.header)


def _turned(table: Table) -> Table:
    """Rows for columns."""
    header = (table.header[0], *(row[0] for row in table.rows))
    names = list(enumerate(table.header))[1:]
    return Table(table.title, header, [(name, *(row[i] for row in table.rows)) for i, name in names])


def plain_lines(table: Table) -> list[str]:
    """The table in columns of spaces, as wide as it needs to be."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]

    def text(line: tuple[str, ...]) -> str:
        first, *rest = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line))
        return "  ".join([first, *rest]).rstrip()

    return [table.title, *map(text, lines)]


def say(console: Console, line: str) -> None:
    """Print a line as it is: neither markup nor, off a terminal, wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)
