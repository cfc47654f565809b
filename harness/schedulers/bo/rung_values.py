"""What model-based variants of Hyperband learn from: the values of trials at rung levels."""

import math
from itertools import pairwise

from harness.schedulers.bo.encoding import Encoder
from harness.schedulers.hyperband import Hyperband


def rung_levels(scheduler: Hyperband) -> list[int]:
    """The levels of all brackets, ascending."""
    return sorted({level for rungs in scheduler.bracket_rungs for _, level in rungs})


def rung_values(scheduler: Hyperband, encoder: Encoder) -> dict[tuple[int, int], float]:
    """(trial, level) -> value, to be minimised in either mode, inf if it was not finite; by trial, then by level.

    The value at a level is that of the first report at or after it and before the next level. A trial counts at every
    level that it has passed, also at those below the first rung of its bracket. A trial that failed has inf at the
    first level that it did not reach. A trial whose configuration is none of the space's (somebody else started it)
    counts nowhere.
    """
    levels, curves, sign = rung_levels(scheduler), scheduler.curves, 1.0 if scheduler.mode == "min" else -1.0
    values = {}
    for trial_id in sorted(curves.keys() | scheduler.failed):
        if not encoder.knows(scheduler.configs.get(trial_id, {})):
            continue
        curve = curves.get(trial_id, {})
        for level, after in pairwise([*levels, math.inf]):
            reports = [resource for resource in curve if level <= resource < after]
            if reports:
                values[trial_id, int(level)] = sign * curve[min(reports)]
        missed = next((level for level in levels if level > max(curve, default=0)), None)
        if trial_id in scheduler.failed and missed is not None:
            values[trial_id, missed] = math.inf
    return values
