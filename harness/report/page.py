"""``report/index.html``: the whole report as one self-contained page, readable on a phone and in print."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from harness.record import write_atomic
from harness.report.document import Section, Table

_TEMPLATE = Path(__file__).with_name("page.html.j2")
LONG = 12  # rows from which a table gets a filter


def write_page(path: Path, title: str, sections: Sequence[Section], figures: Path) -> None:
    """Write the page to ``path`` with the PNGs of the folder ``figures`` in it. A figure without a file is left out."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    shown = [_shown(section, figures) for section in sections]
    write_atomic(path, template.render(title=title, sections=shown))


def _shown(section: Section, figures: Path) -> dict[str, Any]:
    pictures = [(figure, figures / f"{figure.name}.png") for figure in section.figures]
    return {
        "key": section.key,
        "title": section.title,
        "text": section.text,
        "notes": section.notes,
        "tables": [_table(table) for table in section.tables],
        "figures": [
            {"name": figure.name, "caption": figure.caption, "png": base64.b64encode(file.read_bytes()).decode("ascii")}
            for figure, file in pictures
            if file.exists()
        ],
    }


def _table(table: Table) -> dict[str, Any]:
    """Header and rows of (text, sort key); numbers sort as numbers, what is not known last."""
    text = table.text()
    numeric = [pd.api.types.is_numeric_dtype(table.frame[column]) for column in table.frame.columns]
    rows = [
        [(str(shown), _key(value)) for shown, value in zip(words, values, strict=True)]
        for words, values in zip(
            text.itertuples(index=False, name=None), table.frame.itertuples(index=False, name=None), strict=True
        )
    ]
    header = [(str(column), number) for column, number in zip(table.frame.columns, numeric, strict=True)]
    return {"name": table.name, "caption": table.caption, "header": header, "rows": rows, "filter": len(rows) >= LONG}


def _key(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int | float):
        return "" if math.isnan(value) else repr(float(value)).replace("inf", "Infinity")
    return "" if value is None else str(value)
