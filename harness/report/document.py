"""What the report consists of, and how it gets onto disk: sections of text, tables and figures.

A figure is described by the function that draws it and its data, so that figures can be drawn by several processes and
left out where nobody wants them. Every figure is written as PDF and PNG, every table as LaTeX (booktabs), CSV and
Markdown.
"""

import functools
import hashlib
import math
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from harness.record import write_atomic
from harness.report.processes import cores, map_in_processes

STYLE: Any = {
    "figure.dpi": 100, "savefig.dpi": 150, "pdf.fonttype": 42, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
    "svg.hashsalt": "report",
}  # fmt: skip
LONGEST_NAME = 200  # characters of a file name; file systems take 255 bytes, the ending and a temporary one included
LONG, LINE = 28, "0.13\\linewidth"  # letters from which a column of a LaTeX table is broken into lines, and its width
ORDER = ("off", "zero", "on", "direct", "normalized", "multistep", "random", "sign", "finite_difference", "masked")


@dataclass(frozen=True)
class Table:
    """Numbers with a caption. name: ``<topic>_<condition>``, the files'. frame: the numbers as they are, for CSV.
    formats: what turns the entries of a column into text for the other forms; the default is ``text_of``."""

    name: str
    caption: str
    frame: pd.DataFrame
    formats: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)

    def text(self) -> pd.DataFrame:
        """The table as text."""
        columns = {
            column: [self.formats.get(str(column), text_of)(value) for value in self.frame[column]]
            for column in self.frame.columns
        }
        return pd.DataFrame(columns, columns=self.frame.columns)


@dataclass(frozen=True)
class Figure:
    """A drawing: ``draw(**data)`` returns a matplotlib Figure. ``draw`` is a function of a module, ``data`` can be sent
    to another process. name: ``<topic>_<condition>``, the files'."""

    name: str
    caption: str
    draw: Callable[..., Any]
    data: Mapping[str, Any]


@dataclass
class Section:
    """A part of the report. key: the anchor in the page. text: paragraphs. notes: what is not there, and why."""

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def file_name(topic: str, *condition: object) -> str:
    """``<topic>_<condition>`` of letters, digits, dots and hyphens: ``file_name("survival", "digits", "asha")``.

    Longer ones than LONGEST_NAME end in a digest instead. Other words can give the same name: ``with_unique_names``.
    """
    words = (re.sub(r"[^A-Za-z0-9.]+", "-", str(word)).strip("-.") for word in condition)
    name = "_".join([topic, "-".join(word for word in words if word)]).rstrip("_")
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(repr((topic, *map(str, condition))).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def with_unique_names(sections: Sequence[Section]) -> list[Section]:
    """The sections with a number after every name that an earlier table (or figure) has: no file overwrites another.

    Names that differ in case only are the same to some file systems.
    """
    tables: set[str] = set()
    figures: set[str] = set()
    return [
        replace(section, tables=[replace(table, name=_unused(table.name, tables)) for table in section.tables],
                figures=[replace(figure, name=_unused(figure.name, figures)) for figure in section.figures])
        for section in sections
    ]  # fmt: skip


def _unused(name: str, taken: set[str]) -> str:
    """``name``, with a number where it is ``taken``, to which it is added."""
    number, free = 1, name
    while free.casefold() in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free.casefold())
    return free


def text_of(value: Any) -> str:
    """An entry of a table: 3 or 4 significant digits, a dash for what is not known."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        if hasattr(value, "item"):
            return text_of(value.item())
        return "-" if value is None else str(value)
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def colors(variants: Sequence[str]) -> dict[str, Any]:
    """A colour of each variant, the same in every figure of a report: off is grey, the others colour-blind safe."""
    import seaborn

    ordered = sorted(set(variants) - {"off"}, key=lambda name: (_place(name), name))
    palette = seaborn.color_palette("colorblind", 10) + seaborn.color_palette("husl", max(0, len(ordered) - 10))
    return {"off": (0.35, 0.35, 0.35), **dict(zip(ordered, palette, strict=False))}


def _place(variant: str) -> int:
    preset = variant.split("(")[0]
    return ORDER.index(preset) if preset in ORDER else len(ORDER)


def ordered(variants: Sequence[str]) -> list[str]:
    """Variants in the order of the presets: off first, then zero, on, ..., changed keys after their preset."""
    return sorted(set(variants), key=lambda name: (_place(name), name))


# ---- onto disk


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """``folder/<name>.csv``, ``.tex`` and ``.md`` of every table; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        write_atomic(folder / f"{table.name}.csv", table.frame.to_csv(index=False))
        write_atomic(folder / f"{table.name}.tex", latex(table))
        write_atomic(folder / f"{table.name}.md", markdown(table))


def latex(table: Table) -> str:
    """A booktabs table with caption and label; needs ``\\usepackage{booktabs}``."""
    text = table.text()
    body = [r" & ".join(map(_escaped, row)) + r" \\" for row in text.itertuples(index=False)]
    head = r" & ".join(_escaped(str(column)) for column in text.columns) + r" \\"
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escaped(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{''.join(_alignment(table, text, column) for column in table.frame.columns)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _alignment(table: Table, text: pd.DataFrame, column: str) -> str:
    """Numbers right, words left, sentences broken into lines."""
    if pd.api.types.is_numeric_dtype(table.frame[column]):
        return "r"
    return rf"p{{{LINE}}}" if text[column].astype(str).str.len().max() > LONG else "l"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def markdown(table: Table) -> str:
    """A pipe table with its caption above it."""
    text = table.text()
    rows = [list(map(str, text.columns)), ["---"] * len(text.columns), *text.itertuples(index=False)]
    lines = ["| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([table.caption, "", *lines]) + "\n"


def write_figures(figures: Sequence[Figure], folder: Path) -> dict[str, str]:
    """``folder/<name>.pdf`` and ``.png`` of every figure, drawn by one process a core where there are many.

    Returns the tracebacks of those that could not be drawn, by name; raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = min(cores(), len(figures) // 4)
    if processes < 2:
        failures = [_save(figure, folder) for figure in figures]
    else:
        failures = map_in_processes(functools.partial(_save, folder=folder), figures, processes)
    return {figure.name: trace for figure, trace in zip(figures, failures, strict=True) if trace}


def _save(figure: Figure, folder: Path) -> str | None:
    """Draw and write one figure; the traceback if it cannot be drawn."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    with pyplot.rc_context(STYLE):
        try:
            drawn = figure.draw(**figure.data)
            drawn.draw_without_rendering()  # lays it out, once for both files
            drawn.set_layout_engine("none")
            box = drawn.get_tightbbox().padded(0.05)  # inches
            for ending in ("pdf", "png"):
                metadata = {"CreationDate": None} if ending == "pdf" else {"Software": None}  # equal data, equal bytes
                target = folder / f"{figure.name}.{ending}"
                drawn.savefig(target, format=ending, bbox_inches=box, metadata=metadata)
        except OSError:
            raise
        except Exception:
            return traceback.format_exc()
        finally:
            pyplot.close("all")
    return None
