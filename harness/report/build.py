"""Writes the whole report of a study: ``index.html``, ``verdict.json``, ``tables/`` and ``figures/``."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness.record import write_json
from harness.report import (
    ablations,
    anytime,
    description,
    hyperparameters,
    learning_curves,
    overhead,
    page,
    rungs,
    time_to_target,
    verdict,
)
from harness.report.document import Section, with_unique_names, write_figures, write_tables
from harness.report.study import Study

SECTIONS: dict[str, Callable[[Study], Section]] = {  # in the order of the page
    "The verdict": verdict.section,
    "The experiment": description.section,
    "Time to target": time_to_target.section,
    "Anytime performance": anytime.section,
    "Overhead": overhead.section,
    "Hyperparameters": hyperparameters.section,
    "Rungs": rungs.section,
    "Ablations": ablations.section,
    "Learning curves": learning_curves.section,
    "Where the results come from": description.provenance,
}


@dataclass
class Report:
    """What was written. broken: what our own errors kept out of it, each with its traceback."""

    folder: Path
    sections: list[Section]
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def page(self) -> Path:
        return self.folder / "index.html"


def write_report(study: Study, folder: str | Path) -> Report:
    """Write the report of ``study`` to ``folder``, in place of an earlier one there. Raises OSError.

    The new report is made beside the old one and takes its place when it is whole. An error in one section or figure
    leaves out that part only; it is named in the page and in ``Report.broken``. FileExistsError where ``folder`` holds
    tables or figures that are not an earlier report's.
    """
    folder = Path(folder)
    _check_own(folder)
    report = Report(folder, [])
    for title, make in SECTIONS.items():
        try:
            report.sections.append(make(study))
        except Exception as error:
            report.broken[title] = traceback.format_exc()
            note = f"This section is missing: the report failed at it ({type(error).__name__}: {error})."
            report.sections.append(Section(title.lower().replace(" ", "-"), title, notes=[note]))
    report.sections = with_unique_names(report.sections)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        _write(study, report, fresh)
        for part in ("verdict.json", "tables", "figures", "index.html"):  # the first marks the others as a report's
            _replace(fresh / part, folder / part)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report


def _check_own(folder: Path) -> None:
    """The folders of an earlier report are replaced; someone's own of these names must not be."""
    if (folder / "verdict.json").exists():
        return
    for part in ("tables", "figures"):
        if (folder / part).exists():
            raise FileExistsError(errno.EEXIST, "in the way, and not of an earlier report", str(folder / part))


def _write(study: Study, report: Report, fresh: Path) -> None:
    for section in report.sections:
        write_tables(section.tables, fresh / "tables")
    figures = [figure for section in report.sections for figure in section.figures]
    report.broken |= write_figures(figures, fresh / "figures")
    for section in report.sections:
        lost = [figure.name for figure in section.figures if figure.name in report.broken]
        section.notes += [f"The figure {name} is missing: the report failed at it." for name in lost]
    write_json(fresh / "verdict.json", verdict.judge(study).as_dict())
    page.write_page(fresh / "index.html", title(study), report.sections, fresh / "figures")


def title(study: Study) -> str:
    """The page's title: the name of the results."""
    return f"One-shot hyper-gradient warm starts: {study.results.path.resolve().name}"


def _replace(new: Path, old: Path) -> None:
    """Put ``new`` where ``old`` is; a folder cannot be replaced in one step, so the old one goes aside first."""
    if old.is_dir():
        aside = new.parent / f"old-{old.name}"
        old.rename(aside)
    os.replace(new, old)


def warn_broken(report: Report) -> None:
    """The tracebacks of what is missing, on stderr."""
    for what, trace in report.broken.items():
        with contextlib.suppress(OSError):
            print(f"error: {what} could not be made; the rest of the report is there.\n{trace}", file=sys.stderr)
