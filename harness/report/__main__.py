"""python -m harness.report RESULTS [--json] [--tau TAU]"""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from harness.report import Results, ResultsError, load_results, print_summary, summary_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary of a results folder; 0, or 2 with one sentence if there is nothing to summarise."""
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Summarise a results folder.")
    parser.add_argument("results", help="results/NAME, or one cell's folder in it")
    parser.add_argument("--json", action="store_true", help="machine output of the same numbers")
    parser.add_argument("--tau", type=float, help="target score instead of the recorded one")
    options = parser.parse_args(arguments)
    try:
        results = load_results(options.results)
        if options.json:
            print(json.dumps(summary_json(results, options.tau), indent=1))
        else:
            print_summary(results, Console(), options.tau)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        sys.stderr.close()
        return 0
    _warn(results)
    if results.cells.empty:
        print(f"none of the {len(results.corrupt)} cells in {results.path} can be used", file=sys.stderr)
        return 2
    return 0


def _warn(results: Results) -> None:
    for cell, reason in results.corrupt.items():
        print(f"warning: cell {cell} is corrupt and left out: {reason}", file=sys.stderr)
    for warning in dict.fromkeys(results.warnings):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
