"""From the files of a results folder to what they say: ``python -m harness.report RESULTS``.

study = Study(load_results("results/default"))
judge(study)                          # the verdict
write_report(study, "report")         # everything, as files
time_to_target.section(study)         # one part: its text, tables (pandas) and figures (functions that draw)
"""

from typing import Any

from harness.report.compare import Comparison, summary_tables
from harness.report.load import Results, ResultsError, load_results
from harness.report.tables import print_summary, summary_json

__all__ = [
    "Comparison", "Results", "ResultsError", "Study", "judge", "load_results", "print_summary", "summary_json",
    "summary_tables", "write_report",
]  # fmt: skip

_LATER = {
    "Study": "study",
    "judge": "verdict",
    "write_report": "build",
}  # the harness needs none of these after a sweep


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LATER:
        return getattr(importlib.import_module(f"harness.report.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
