"""GPU-hours by our own clocks and by Slurm's, side by side, for cells that ran in Slurm jobs; nothing for others."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from harness.report.document import Section, Table, file_name
from harness.report.study import Study
from harness.report.tables import memory, percent
from harness.slurm.accounting import PARTS

WORDS = {"busy": "busy", "test": "test", "idle": "idle GPUs", "outside": "start and end of jobs",
         "lost": "lost attempts"}  # fmt: skip
JOULES = 3.6e6  # a kWh

TEXT = (
    "Slurm's accounting. Slurm charges a job's elapsed time times its GPUs, used or not; our clocks count the seconds "
    "for which a worker was held. The difference is explained by its parts: GPUs that were idle while an attempt at "
    "the cell ran (workers that start or wait for a decision, and work that a stop cut off or a killed worker had not "
    "reported), the start and end of jobs (before an attempt began and after it ended; of a job that served several "
    "cells each has an equal share), and attempts that were lost (what a job ran on after the last event of an attempt "
    "that was killed, and whole runs that left no event). Shares are of Slurm's GPU-hours and add up to 100 %; where "
    "several workers share a GPU, idle is negative. Variants are compared by our clocks only."
)


def add_to(section: Section, study: Study) -> None:
    """Add the text, the tables and what is missing, if any cell of the study ran in Slurm jobs."""
    accounts = study.results.slurm
    if not accounts:
        return
    section.text.append(TEXT)
    section.notes += _notes(accounts)
    if any("missing" not in found for found in accounts.values()):
        section.tables += [_variants_table(study), _cells_table(study)]


def _notes(accounts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for why, cells in Counter(found["missing"] for found in accounts.values() if "missing" in found).items():
        yield (
            f"{cells} cells ran in Slurm jobs, but are not in the table of Slurm's accounting: {why}. To ask again, "
            "where sacct is: python -m harness.slurm.accounting RESULTS"
        )


def _groups(study: Study) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Condition, variant and the rows of its cells that ran in Slurm jobs."""
    for condition in study.conditions:
        for variant in condition.variants:
            cells = condition.cells[condition.cells["variant"] == variant]
            if len(named := cells[cells["cell"].astype(str).isin(list(study.results.slurm))]):
                yield condition.label, variant, named


def _variants_table(study: Study) -> Table:
    rows = []
    for condition, variant, cells in _groups(study):
        accounts = [study.results.slurm[str(cell)] for cell in cells["cell"]]
        known = [found for found in accounts if "missing" not in found]
        rows.append(
            {"condition": condition, "variant": variant, "cells": len(known), "missing": len(accounts) - len(known)}
            | _numbers(known)
        )
    caption = (
        "Slurm's accounting by variant. Busy hours by our clocks (test evaluation included) and Slurm's GPU-hours: "
        "mean per cell; their ratio and the shares of Slurm's GPU-hours: from the sums over cells. Max RSS: largest of "
        "any step of any of their jobs; energy: per cell, as the site's sensors have it, of whole jobs (a dash where "
        "there are none, or where cells shared jobs)."
    )
    return Table(file_name("slurm-accounting", "all"), caption, pd.DataFrame(rows), _FORMATS)


def _cells_table(study: Study) -> Table:
    rows = []
    for condition, variant, cells in _groups(study):
        for cell, seed in zip(cells["cell"].astype(str), cells["seed"], strict=True):
            found = study.results.slurm[cell]
            if "missing" in found:
                continue
            runs = found["runs"]
            rows.append(
                {"cell": cell, "condition": condition, "variant": variant, "seed": int(seed),
                 "jobs": " ".join(found["jobs"]), "runs": len(runs), "attempts": found["attempts"],
                 "states": " ".join(f"{n} {state}" for state, n in Counter(run["state"] for run in runs).items())}
                | _numbers([found]) | {"cgroup peak": (found.get("cgroup") or {}).get("memory_peak", math.nan)}
            )  # fmt: skip
    caption = (
        "Slurm's accounting by cell, from slurm.json in its folder. Runs: how often its jobs were started; states: "
        "what became of them. Cgroup peak: memory of a driver's whole job as the kernel counted it, where jobs are in "
        "cgroups."
    )
    return Table(file_name("slurm-cells", "all"), caption, pd.DataFrame(rows), _FORMATS)


_FORMATS = dict.fromkeys(WORDS.values(), percent) | {"max RSS": memory, "cgroup peak": memory}


def _numbers(accounts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of these cells together; NaN where there is none."""
    n = len(accounts) or math.nan
    ours, charged = (sum(found[key] for found in accounts) for key in ("busy_hours", "gpu_hours"))
    runs = [run for found in accounts for run in found["runs"]]
    energy = [run["energy"] for run in runs if run["elapsed"]]
    measured = bool(energy) and None not in energy and all(run["cells"] == 1 for run in runs)
    return {
        "busy hours": ours / n,
        "Slurm's GPU-hours": charged / n,
        "ratio": charged / ours if ours else math.nan,
        **{WORDS[part]: _share(accounts, part, charged) for part in PARTS},
        "max RSS": max((run["max_rss"] for run in runs if run["max_rss"]), default=math.nan),
        "energy (kWh)": sum(energy) / JOULES / n if measured else math.nan,
    }


def _share(accounts: Sequence[Mapping[str, Any]], part: str, hours: float) -> float:
    return sum(found["gpu_seconds"][part] for found in accounts) / 3600 / hours if hours else math.nan
