"""python -m harness.report RESULTS: the paper-ready report of a results folder, and its verdict."""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.report.load import Results, ResultsError, load_results

EXIT_BROKEN, EXIT_WRONG, EXIT_INTERRUPTED = 1, 2, 130

EPILOG = """\
examples:
  python -m harness.report results/default              # writes results/default/report/, prints the verdict
  python -m harness.report results/default --tau 0.95   # with another target
  python -m harness.report results/default --summary    # only prints the numbers
  python -m harness.report wandb:ENTITY/PROJECT         # fetches the cells from W&B first
exit codes: 0 done, 1 a part could not be made (the others are there), 2 there is nothing to report, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _main(options)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print("interrupted; an earlier report is as it was", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.report",
        description="Write the report of a results folder (page, figures, tables, verdict) and print the verdict.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", help="results/NAME, one cell's folder in it, or wandb:ENTITY/PROJECT")
    parser.add_argument("--tau", type=float, help="target score instead of the recorded one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default RESULTS/report")
    parser.add_argument("--summary", action="store_true", help="print the numbers of all variants, write nothing")
    parser.add_argument("--json", action="store_true", help="the numbers and the verdict for machines, write nothing")
    return parser


def _main(options: argparse.Namespace) -> int:
    path = options.results
    if path.startswith("wandb:"):
        from harness.report.fetch import fetch

        path = fetch(path, say=lambda line: print(line, file=sys.stderr))
    results = load_results(path)
    _ask_slurm(results)
    code = _print(results, options) if options.summary or options.json else _write(results, options)
    _warn(results)
    return code


def _ask_slurm(results: Results) -> None:
    """Have cells accounted for that ran in Slurm jobs and are not yet, if this is where one can ask."""
    if shutil.which("sacct") and any("missing" in found for found in results.slurm.values()):
        from harness.slurm.accounting import account

        folder = results.folder(next(iter(results.slurm))).resolve().parent
        with contextlib.suppress(OSError):  # somebody else's results: they stay without
            results.slurm |= {cell: found for cell, found in account(folder).items() if cell in results.slurm}


def _print(results: Results, options: argparse.Namespace) -> int:
    from harness.report.tables import print_summary, summary_json

    if options.json:
        print(json.dumps(summary_json(results, options.tau), indent=1))
    else:
        print_summary(results, Console(), options.tau)
    return _empty(results) if results.cells.empty else 0


def _write(results: Results, options: argparse.Namespace) -> int:
    if results.cells.empty:
        return _empty(results)
    from harness.report.build import warn_broken, write_report
    from harness.report.study import Study
    from harness.report.verdict import print_verdict

    study, console = Study(results, options.tau), Console()
    folder = options.out or Path(results.path) / "report"
    try:
        report = write_report(study, folder)
    except OSError as error:
        raise ResultsError(
            f"cannot write the report to {folder}: {error.strerror} ({error.filename}); --out DIR writes it elsewhere"
        ) from None
    print_verdict(study, console)
    tables, figures = (sum(len(getattr(s, kind)) for s in report.sections) for kind in ("tables", "figures"))
    beside = f"{_count(figures, 'figure')} as PDF and PNG, {_count(tables, 'table')} as LaTeX, CSV and Markdown"
    console.print(f"report: {report.page} (beside it {beside})", markup=False, highlight=False, soft_wrap=True)
    warn_broken(report)
    return EXIT_BROKEN if report.broken else 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _empty(results: Results) -> int:
    print(f"none of the {len(results.corrupt)} cells in {results.path} can be used", file=sys.stderr)
    return EXIT_WRONG


def _warn(results: Results) -> None:
    for cell, reason in results.corrupt.items():
        print(f"warning: cell {cell} is corrupt and left out: {reason}", file=sys.stderr)
    for warning in dict.fromkeys(results.warnings):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
