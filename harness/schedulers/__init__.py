"""Schedulers on Syne Tune 0.16's ``TrialScheduler``: ASHA, PASHA, synchronous Hyperband and random search.

Read ``base.py`` first (what all share), then ``rungs.py`` (successive-halving arithmetic), then one file per scheduler.
"""

from harness.schedulers.asha import ASHA
from harness.schedulers.base import BaseScheduler, Job, Origin, Searcher
from harness.schedulers.hyperband import Hyperband
from harness.schedulers.pasha import PASHA
from harness.schedulers.random import RandomSearch
from harness.schedulers.sampler import CandidateSampler, RandomSampler

__all__ = [
    "ASHA",
    "PASHA",
    "BaseScheduler",
    "CandidateSampler",
    "Hyperband",
    "Job",
    "Origin",
    "RandomSampler",
    "RandomSearch",
    "Searcher",
]
