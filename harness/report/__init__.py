"""From the files of a results folder to what they say: ``python -m harness.report RESULTS``."""

from harness.report.compare import Comparison, summary_tables
from harness.report.load import Results, ResultsError, load_results
from harness.report.tables import print_summary, summary_json

__all__ = ["Comparison", "Results", "ResultsError", "load_results", "print_summary", "summary_json", "summary_tables"]
