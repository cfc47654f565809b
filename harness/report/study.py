"""A loaded study as the report's sections see it: results, comparisons, and the words for its conditions."""

import functools
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.compare import Comparison, Tau, summary_tables
from harness.report.document import colors, ordered
from harness.report.load import Results
from harness.space import Float, Space


@dataclass(frozen=True)
class Condition:
    """The cells that may be compared with each other: one setting (task, scheduler and what else tells it apart).

    label: its words, as in headings; words: the same as parts of file names. cells: ``Comparison.cells``; variants: in
    the report's order; config: the resolved configuration of one of the cells; variant_configs: of one of each variant.
    """

    label: str
    words: tuple[str, ...]
    task: str
    scheduler: str
    mode: str
    metric: str
    tau: float
    comparison: Comparison
    cells: pd.DataFrame
    variants: list[str]
    config: dict[str, Any]
    variant_configs: dict[str, dict[str, Any]]

    def ohgw(self, variant: str) -> dict[str, Any]:
        """The ``ohgw`` configuration of a variant."""
        return dict(self.variant_configs[variant].get("ohgw", {}))

    @property
    def space(self) -> Space:
        task = self.config["task"]
        return Space.from_spec(task["spaces"][task["space"]])

    @property
    def discrete_share(self) -> float:
        """Share of the hyperparameters that are integers or categoricals, which OHGW never moves."""
        domains = self.space.domains.values()
        return sum(not isinstance(domain, Float) for domain in domains) / len(domains) if domains else 0.0

    @property
    def family(self) -> str:
        """Task family: the module of the task (``harness.tasks.vision`` -> vision)."""
        return str(self.config["task"].get("_target_", "")).split(".")[-2:][0] or self.task


class Study:
    """``results`` compared, one Condition a setting. ``tau`` replaces the recorded targets."""

    def __init__(self, results: Results, tau: Tau = None):
        self.results, self.tau = results, tau
        comparisons = summary_tables(results, tau)
        self.conditions = [_condition(results, comparison) for comparison in comparisons]

    @functools.cached_property
    def colors(self) -> dict[str, Any]:
        """A colour of each variant, for all figures."""
        return colors(list(self.results.cells["variant"].unique()) if len(self.results.cells) else [])

    @functools.cached_property
    def _reports(self) -> dict[str, pd.DataFrame]:
        return {str(cell): part for cell, part in self.results.reports.groupby("cell", observed=True)}

    def reports(self, cell: str) -> pd.DataFrame:
        """The reports of one cell, in order; no row if it has none."""
        return self._reports.get(cell, self.results.reports.iloc[:0])

    @functools.cached_property
    def trials(self) -> pd.DataFrame:
        """``Results.trials`` with the columns setting, task, scheduler, variant and seed of their cells."""
        return self._with_labels(self.results.trials)

    @functools.cached_property
    def coordinates(self) -> pd.DataFrame:
        """``Results.coordinates`` with the columns setting, task, scheduler, variant and seed of their cells."""
        return self._with_labels(self.results.coordinates)

    def _with_labels(self, frame: pd.DataFrame) -> pd.DataFrame:
        if frame.empty:
            return frame
        cells = self.results.cells.set_index("cell")
        codes, names = frame["cell"].cat.codes.to_numpy(), frame["cell"].cat.categories
        labels = {}
        for column in ("setting", "task", "scheduler", "variant"):
            labels[column] = pd.Categorical(cells.loc[names, column]).take(codes)
        return frame.assign(**labels, seed=cells.loc[names, "seed"].to_numpy(dtype=int)[codes])


def _condition(results: Results, comparison: Comparison) -> Condition:
    cells = comparison.cells
    first, by_variant = cells.iloc[0], cells.drop_duplicates("variant")
    differs = tuple(f"{key}={value}" for key, value in comparison.setting.items())
    words = (comparison.task, comparison.scheduler, *differs)
    return Condition(
        label=" / ".join(words[:2]) + "".join(f", {word}" for word in differs),
        words=words,
        task=comparison.task,
        scheduler=comparison.scheduler,
        mode=str(first["mode"]),
        metric=comparison.metric,
        tau=comparison.tau,
        comparison=comparison,
        cells=cells,
        variants=ordered(list(cells["variant"].unique())),
        config=results.configs[first["cell"]],
        variant_configs={str(row["variant"]): results.configs[row["cell"]] for _, row in by_variant.iterrows()},
    )
