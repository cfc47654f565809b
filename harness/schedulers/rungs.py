"""The arithmetic of successive halving: rung levels, brackets, and when a rung lets a trial pass.

Equal, decision for decision, to the rung systems of syne-tune 0.14.2 (the last release that ships them), which follow
Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020) but for the cutoff: an interpolated
quantile. A metric that is not finite must come in as the worst possible value (inf for "min", -inf for "max"): it
counts as an entry of its rung and never passes (the published code compared NaN, which stops or promotes by accident).
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from harness.schedulers.base import Mode, is_integer, require, worst


def check_halving(grace_period: int, eta: float, max_t: int, brackets: int | None) -> None:
    """Raise ValueError unless ``1 <= grace_period <= max_t``, ``eta >= 2`` (below, rounding makes levels coincide) and
    ``brackets`` is None (all) or >= 1."""
    require(is_integer(max_t) and max_t >= 1, f"max_t must be an integer >= 1, got {max_t!r}")
    require(
        is_integer(grace_period) and 1 <= grace_period <= max_t,
        f"grace_period must be an integer in [1, max_t = {max_t}], got {grace_period!r}",
    )
    number = isinstance(eta, float) or is_integer(eta)
    require(number and 2 <= eta < math.inf, f"eta (the reduction factor) must be a finite number >= 2, got {eta!r}")
    valid = brackets is None or (is_integer(brackets) and brackets >= 1)
    require(valid, f"brackets must be an integer >= 1, or null for all, got {brackets!r}")


def halvings(grace_period: int, eta: float, max_t: int) -> int:
    """The smallest k with ``grace_period * eta^k >= max_t``."""
    k = 0
    while grace_period * eta**k < max_t:
        k += 1
    return k


def rung_levels(grace_period: int, eta: float, max_t: int) -> list[int]:
    """Levels below ``max_t``, ascending: ``grace_period * eta^j``, rounded (half to even), without ``max_t`` itself."""
    levels = [round(grace_period * eta**j) for j in range(halvings(grace_period, eta, max_t))]
    return levels[:-1] if levels and levels[-1] == max_t else levels


def bracket_probabilities(levels: Sequence[int], max_t: int, brackets: int | None) -> list[float]:
    """Probability of each bracket s (first milestone ``levels[s]``, else ``max_t``), in proportion to the number of
    configurations that Hyperband gives it, ``(S + 1) / ((S + 1 - s) * R_s)`` with R = levels and ``max_t``, S + 1 =
    len(R). At most len(R) brackets; None: all. For 1..27 by 3 and three brackets 0.6, 0.267, 0.133."""
    resources = [*levels, max_t]
    total = len(resources)
    count = total if brackets is None else min(brackets, total)
    weights = [total / ((total - s) * resources[s]) for s in range(count)]
    return [weight / sum(weights) for weight in weights]


def cutoff(values: Sequence[float], quantile: float, mode: Mode) -> float | None:
    """The value that a trial must reach to pass; None if there are fewer than two ``values`` (best first).

    ``quantile`` is the fraction to pass. The order of operations is the published one and matters: ``np.quantile``
    rounds differently on ties and decides otherwise.
    """
    n = len(values)
    if n < 2:
        return None
    position = (n - 1) * (quantile if mode == "min" else 1 - quantile) + 1
    index = int(position)
    fraction = position - index
    left, weight = (index - 1, fraction) if mode == "min" else (n - index - 1, 1 - fraction)
    better, poorer = values[left], values[left + 1]
    if not math.isfinite(poorer):  # 0 * inf is nan
        return better if weight == 0 else poorer
    return weight * poorer + (1 - weight) * better


@dataclass
class Entry:
    """A trial's metric value at a rung."""

    trial_id: int
    value: float
    promoted: bool = False


class Rung:
    """The trials that reached a level, best first; a tie goes after its equals. Promoted entries stay and count."""

    def __init__(self, level: int, quantile: float, mode: Mode):
        self.level, self.quantile, self.mode = level, quantile, mode
        self.entries: list[Entry] = []
        self._sign = 1.0 if mode == "min" else -1.0

    def insert(self, entry: Entry) -> None:
        position = bisect_right(self.entries, self._sign * entry.value, key=lambda e: self._sign * e.value)
        self.entries.insert(position, entry)

    def passes(self, value: float) -> bool:
        """Is ``value`` finite and at or better than the cutoff? False while there is none."""
        limit = cutoff([entry.value for entry in self.entries], self.quantile, self.mode)
        return limit is not None and math.isfinite(value) and self._sign * value <= self._sign * limit

    def lets_continue(self, value: float) -> bool:
        """The stopping rule: as ``passes``, but a single finite value passes too."""
        return self.passes(value) or (len(self.entries) < 2 and value != worst(self.mode))

    def promotable(self) -> Entry | None:
        """The best entry not yet promoted, if it passes."""
        entry = next((e for e in self.entries if not e.promoted), None)
        return entry if entry is not None and self.passes(entry.value) else None

    def promote(self, entry: Entry) -> None:
        """Mark as promoted. The entry moves behind its ties: the published code takes it out and in again."""
        self.entries.remove(entry)
        entry.promoted = True
        self.insert(entry)

    def withdraw(self, trial_id: int) -> None:
        """Take out the entry of a trial that waits here but has failed."""
        self.entries = [e for e in self.entries if e.promoted or e.trial_id != trial_id]


class RungSystem:
    """Rungs at ascending ``levels`` below ``max_t``; rung j passes ``r_j / r_{j+1}`` of its trials, the last ``r_j /
    max_t``."""

    def __init__(self, levels: Sequence[int], max_t: int, mode: Mode):
        self.max_t = max_t
        self.rungs = [Rung(low, low / high, mode) for low, high in zip(levels, [*levels, max_t][1:], strict=True)]
        self._at = {rung.level: rung for rung in self.rungs}

    def __getitem__(self, level: int) -> Rung:
        return self._at[level]

    def next_level(self, resource: int) -> int:
        """The first level above ``resource``, else ``max_t``."""
        return next((rung.level for rung in self.rungs if rung.level > resource), self.max_t)

    def promote(self, below: int) -> tuple[int, int] | None:
        """Promote one entry, from the highest rung possible among those with ``level < below``.
        Returns the trial and its next milestone, or None if no rung has a promotable entry."""
        for rung in reversed(self.rungs):
            entry = rung.promotable() if rung.level < below else None
            if entry is not None:
                rung.promote(entry)
                return entry.trial_id, self.next_level(rung.level)
        return None

    def withdraw(self, trial_id: int) -> None:
        for rung in self.rungs:
            rung.withdraw(trial_id)
