"""PASHA, progressive ASHA (Bohdal et al., ICLR 2023): ASHA whose largest resource grows while the ranking is not
settled."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from syne_tune.backend.trial_status import Trial

from harness.schedulers.asha import ASHA
from harness.schedulers.base import Mode, Searcher
from harness.schedulers.rungs import Rung

Curve = dict[int, float]  # epoch -> metric value


class PASHA(ASHA):
    """Promotion ASHA, with promotions up to ``cap`` only; ``cap`` starts at the second level and grows by a level
    whenever, after a report, the two highest rungs in use rank their common trials differently, up to noise ``eps``.

    ``eps`` is the 90th percentile of the distances between learning curves that cross and cross back: such a pair is
    noise.

    Equal to syne-tune 0.14.2's PASHA with "noise_ranking", in decisions, caps and eps, where that is well defined.
    Differences: pairs of trials are taken by ascending id and once each (there: in the order of Python's string hashes,
    so that eps depended on PYTHONHASHSEED); with fewer than three rung levels this is ASHA (there: two levels never
    promote, one crashes); epochs that a trial did not report, or reported with a value that is not finite, are left out
    (there: crash).
    """

    def __init__(
        self,
        config_space: Mapping[str, Any],
        metric: str,
        *,
        mode: Mode = "min",
        max_t: int,
        resource_attr: str = "epoch",
        max_resource_attr: str | None = None,
        grace_period: int = 1,
        eta: float = 3,
        brackets: int | None = 1,
        searcher: Searcher | None = None,
        draw_bracket: Callable[[], int] | None = None,
        seed: int = 0,
    ):
        """Arguments as in ``ASHA``. With more than one bracket, a bracket's first milestone may lie above the cap."""
        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, grace_period=grace_period, eta=eta, brackets=brackets,
            searcher=searcher, draw_bracket=draw_bracket, seed=seed,
        )  # fmt: skip
        self.eps = 0.0
        self._progressive = len(self.levels) >= 3
        self._top = 1  # index of the highest rung in use
        self._cap = self.levels[self._top] if self._progressive else max_t
        self._crossings = Crossings()
        if self._progressive:
            self._crossings.set_range(*self._epochs_of_top())

    @property
    def cap(self) -> int:
        return self._cap

    def on_trial_result(self, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(trial, result)
        if self._progressive:
            epoch, value = self.read(trial, result)
            if math.isfinite(value):
                self._crossings.record(trial.trial_id, epoch, value)
            self.eps = self._crossings.percentile(90, default=self.eps)
            previous, top = self._systems[0].rungs[self._top - 1 : self._top + 1]
            if self._cap < self.max_t and not same_ranking(previous, top, self.eps):
                self._grow()
        return decision

    def oracle_state(self) -> dict[str, float]:
        """State after a report, as recorded in the decision traces of ``tests/oracle``."""
        return {"cap": self._cap, "eps": self.eps}

    def _grow(self) -> None:
        """One step: the next level, after the last level ``max_t``. The cap never shrinks."""
        if self._top == len(self.levels) - 1:
            self._cap = self.max_t
        else:
            self._top += 1
            self._cap = self.levels[self._top]
            self._crossings.set_range(*self._epochs_of_top())

    def _epochs_of_top(self) -> tuple[int, int]:
        return self.levels[self._top - 1], self.levels[self._top]


def same_ranking(previous: Rung, top: Rung, eps: float) -> bool:
    """Does ``top`` rank its trials as ``previous`` does, up to trials within ``eps`` of each other in ``previous``?

    The trial at position k of ``top`` must have a value in ``previous`` within ``eps`` of that of the trial at position
    k there. (Published: a group grown outward from position k while within eps, which is the same as values are
    sorted.) Trials that skipped ``previous`` (a higher bracket's) do not take part.
    """
    in_top = {entry.trial_id for entry in top.entries}
    common = [entry for entry in previous.entries if entry.trial_id in in_top]
    values = {entry.trial_id: entry.value for entry in common}
    ranked = [entry.trial_id for entry in top.entries if entry.trial_id in values]
    return all(
        entry.value - eps <= values[trial_id] <= entry.value + eps
        for entry, trial_id in zip(common, ranked, strict=True)
    )


class Crossings:
    """Distances of the pairs of learning curves that cross and cross back, kept up to date report by report.

    A pair counts at the largest epoch in ``low < epoch <= high`` that both curves have. A report changes only the pairs
    of its own trial, so that the cost of a report is linear in the number of trials that reached the range, and the
    result is the same as that of going over all pairs (a property test compares them).
    """

    def __init__(self) -> None:
        self.curves: dict[int, Curve] = {}
        self._low, self._high = 0, 0
        self._reached: set[int] = set()
        self._distances: dict[tuple[int, int], float] = {}
        self._percentile: float | None = None

    def set_range(self, low: int, high: int) -> None:
        """Change the range of epochs at which pairs count, and go over all pairs again."""
        self._low, self._high = low, high
        self._reached.clear()
        self._distances.clear()
        self._percentile = None
        for trial_id in self.curves:
            self._update_pairs(trial_id)

    def record(self, trial_id: int, epoch: int, value: float) -> None:
        """Add a value to a curve, or replace one (a trial that starts again repeats its epochs)."""
        curve = self.curves.setdefault(trial_id, {})
        if curve.get(epoch) != value:
            curve[epoch] = value
            if epoch <= self._high:
                self._update_pairs(trial_id)

    def percentile(self, q: float, default: float) -> float:
        """The ``q``-th percentile (0..100) of the distances; ``default`` if there is none."""
        if not self._distances:
            return default
        if self._percentile is None:
            self._percentile = float(np.percentile(list(self._distances.values()), q))
        return self._percentile

    def _update_pairs(self, trial_id: int) -> None:
        curve = self.curves[trial_id]
        if not any(self._low < epoch <= self._high for epoch in curve):
            return
        self._percentile = None
        for other in self._reached - {trial_id}:
            pair = (trial_id, other) if trial_id < other else (other, trial_id)
            distance = crossing_distance(self.curves[pair[0]], self.curves[pair[1]], self._low, self._high)
            if distance is None:
                self._distances.pop(pair, None)
            else:
                self._distances[pair] = distance
        self._reached.add(trial_id)


def crossing_distance(a: Curve, b: Curve, low: int, high: int) -> float | None:
    """``|a - b|`` at the largest common epoch in ``low < epoch <= high`` if, going down from there, their order changes
    and changes back; else None. Order is ``a > b``, so a tie counts as ``a <= b``; ``a`` must be the trial with the
    smaller id."""
    last = next((e for e in range(min(high, max(a), max(b)), low, -1) if e in a and e in b), None)
    if last is None:
        return None
    order, changed = a[last] > b[last], False
    for epoch in range(last - 1, 0, -1):
        if epoch in a and epoch in b:
            if (a[epoch] > b[epoch]) != order:
                changed = True
            elif changed:
                return abs(a[last] - b[last])
    return None
