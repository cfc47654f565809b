"""DyHPO (Wistuba, Kadra, Grabocka, NeurIPS 2022): each free worker trains, for one epoch more, the configuration whose
next value is expected to improve most on the best one at its budget."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import qmc, rankdata
from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialSuggestion

from harness.schedulers.base import BaseScheduler, Job, Mode, Origin
from harness.schedulers.bo.encoding import Encoder
from harness.schedulers.bo.supply import TableSupply
from harness.schedulers.bo.threads import one_thread
from harness.schedulers.sampler import RandomSampler
from harness.seeds import rng, torch_seed
from harness.space import Space

if TYPE_CHECKING:
    from harness.schedulers.bo.deep_kernel_gp import DeepKernelGP, Rows

POOL_SIZE = 1024  # about the size of the tables DyHPO was made for; a power of 2 keeps the Sobol set balanced
FIRST_STEPS, WARM_STEPS = 200, 8  # published: 1000 for each of the first 10 fits, then 50; 8 keep a decision short
MAX_ROWS = 500  # observations in a fit, whose time grows with their cube


Key = tuple[str, ...]  # identity of a configuration: its hyperparameters, written out


class Pool(Protocol):
    """New configurations to choose from. ``chosen`` is what ``suggest`` gives next; None: a random one."""

    chosen: int | None
    points: np.ndarray  # shape (n, dims)

    def suggest(self) -> dict[str, Any] | None: ...

    def unused(self, used: set[Key]) -> np.ndarray:
        """Indices of the points that may be chosen. ``used``: configurations that trials have, or had before their
        warm start."""
        ...


class TablePool:
    """The rows of a table, each once; random ones in the order of ``CandidateSampler``."""

    def __init__(self, config_space: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], seed: int):
        self.chosen: int | None = None
        self._supply = TableSupply(config_space, candidates, seed)
        self.points = self._supply.points

    def suggest(self) -> dict[str, Any] | None:
        row, self.chosen = self.chosen, None
        return self._supply.random() if row is None else self._supply.give(row)

    def unused(self, used: set[Key]) -> np.ndarray:
        return np.array(self._supply.unused()[1], dtype=int)


class SobolPool:
    """A scrambled Sobol set over the space, in which used points make room for the sequence's next; random ones are
    ``RandomSampler``'s, never None."""

    def __init__(self, config_space: Mapping[str, Any], encoder: Encoder, seed: int):
        self.chosen: int | None = None
        self._encoder, self._sampler = encoder, RandomSampler(config_space, seed)
        self._sobol = qmc.Sobol(max(1, encoder.dims), rng=rng(seed, "sobol"))
        self._configs = [encoder.decode(point) for point in self._sobol.random(POOL_SIZE)]
        self._keys = [key(config, encoder.space) for config in self._configs]
        self.points = encoder.encode_all(self._configs)

    def suggest(self) -> dict[str, Any] | None:
        config = self._sampler.suggest() if self.chosen is None else dict(self._configs[self.chosen])
        self.chosen = None
        return config

    def unused(self, used: set[Key]) -> np.ndarray:
        for k in [k for k, name in enumerate(self._keys) if name in used]:
            config = self._encoder.decode(self._sobol.random(1)[0])
            self._configs[k], self._keys[k] = config, key(config, self._encoder.space)
            self.points[k] = self._encoder.encode(config)
        return np.array([k for k, name in enumerate(self._keys) if name not in used], dtype=int)


def key(config: Mapping[str, Any], space: Space) -> Key:
    """Configurations with equal hyperparameters have equal keys."""
    return tuple(repr(config[name]) for name in space)


class Data:
    """A scheduler's books as arrays, one line a trial; values maximised, whatever the mode."""

    def __init__(self, points: np.ndarray, values: np.ndarray, trials: Sequence[int]):
        """``points``: shape (trials, dims). ``values``: shape (trials, max_t), NaN where nothing was reported, -inf
        where it was not finite."""
        self.points, self.values = points, values
        self.line = {trial_id: k for k, trial_id in enumerate(trials)}
        seen = ~np.isnan(values)
        scores = normal_scores(values[seen])
        self.scores = np.full(values.shape, np.nan)
        self.scores[seen] = scores
        self.count = len(scores)
        self._curves = np.zeros(values.shape)
        self._curves[seen] = scores - scores.min(initial=np.inf)

    def rows(self, lines: np.ndarray, budgets: np.ndarray) -> "Rows":
        """Rows of the model for these lines at these budgets (resource levels), both shape (n,)."""
        from harness.schedulers.bo.deep_kernel_gp import Rows

        max_t = self.values.shape[1]
        below = np.arange(1, max_t + 1) < budgets[:, None]
        return Rows(self.points[lines], budgets / max_t, self._curves[lines] * below)

    def observed(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Lines and budgets of the observations; of more than ``limit``, the newest of each trial, then the ones before
        them, and so on, better ones first."""
        lines, budgets = np.nonzero(~np.isnan(self.scores))
        if len(lines) > limit:
            age = np.concatenate([np.arange(n)[::-1] for n in np.unique(lines, return_counts=True)[1]])
            kept = np.sort(np.lexsort((-self.scores[lines, budgets], age))[:limit])
            lines, budgets = lines[kept], budgets[kept]
        return lines, budgets + 1


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Quantiles of the standard normal distribution at the ranks of ``values``, shape (n,); equal values, equal
    scores."""
    return ndtri((rankdata(values) - 0.5) / max(1, len(values)))


def incumbents(budgets: np.ndarray, targets: np.ndarray, max_t: int) -> np.ndarray:
    """The best target at each budget 1..max_t, over all budgets where none was seen; shape (max_t,)."""
    best = np.full(max_t, -np.inf)
    np.maximum.at(best, budgets - 1, targets)
    return np.where(np.isneginf(best), targets.max(), best)


def expected_improvement(mean: np.ndarray, std: np.ndarray, incumbent: np.ndarray) -> np.ndarray:
    """E[max(0, N(mean, std^2) - incumbent)], std > 0."""
    u = (mean - incumbent) / std
    return std * (u * ndtr(u) + np.exp(-u * u / 2) / np.sqrt(2 * np.pi))


class DyHPO(BaseScheduler[Job]):
    """Every suggestion trains one trial for one epoch: a new one from the pool of configurations or a paused one.

    A deep-kernel Gaussian process (``bo/deep_kernel_gp.py``) predicts the next value of each candidate from its
    configuration, budget and curve so far; the largest expected improvement over the best value *at that budget* (over
    all if none was seen there) wins, the first of equals. Trials pause after their epoch and stop at ``max_t``.

    Differences from the authors' implementation, and why:

    - Observations are one row a (trial, epoch r): target y_r, curve y_1..y_(r-1). Theirs pairs the target with the
      budget r - 1 and leaves the newest value out of a candidate's curve.
    - Targets are normal scores of the ranks of all values, and curves the same above their smallest. On raw values the
      few configurations that learn at all decide the scale and hide every difference between the others.
    - A value that is not finite is the worst there is, at its epoch; so is the epoch in which a trial failed. Such
      trials never go on. Theirs drops the value and suggests the configuration for ever.
    - Trials in training are no candidates; their results are taken to be as predicted (also in the best value of their
      budget), so that workers spread out.
    - The fit: ``bo/deep_kernel_gp.py``. Each new observation moves it on by a few steps; there is no restart after a
      time without improvement. Beyond ``MAX_ROWS`` observations, the newest of every trial are kept.
    - A continuous space is searched on a Sobol set that is renewed as it is used.

    When a finite table has no candidate left, ``suggest`` returns None, which ends scheduling for good; trials that
    still run may then run on to ``max_t``, because nobody will resume them.
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
        candidates: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ):
        """``candidates``: the only configurations to be tried, each at most once (None: the whole space). The rest as
        in ``BaseScheduler``."""
        from harness.schedulers.bo import deep_kernel_gp  # noqa: F401  # seconds that no decision should take

        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, seed=seed,
        )  # fmt: skip
        self.encoder = Encoder(Space.from_config_space(config_space))
        self.pool: Pool = (
            SobolPool(config_space, self.encoder, seed)
            if candidates is None
            else TablePool(config_space, candidates, seed)
        )
        self.searcher = self.pool
        self._paused: set[int] = set()
        self._used: set[Key] = set()
        self._encoded: dict[Key, np.ndarray] = {}
        self._model: DeepKernelGP | None = None
        self._fitted = 0  # observations that the newest fit, or attempt, has seen
        self._attempts = 0
        self._failure: str | None = None

    def suggest(self) -> TrialSuggestion | None:
        """None only if a finite table has no candidate left."""
        from harness.schedulers.bo.deep_kernel_gp import FIT_ERRORS

        data = self._data()
        paused, free = sorted(self._paused), self.pool.unused(self._used | self._keys())
        if data.count < 2 or len(paused) + len(free) == 0:  # BatchNorm and ranks need two
            return self._random(Origin("random"))
        try:
            with one_thread():
                best = self._best(data, paused, free)
        except FIT_ERRORS as error:
            return self._random(Origin("random", self._failure or describe(error)))
        origin = Origin("model") if self._failure is None else Origin("last_model", self._failure)
        if best < len(paused):
            return self._continue(paused[best], origin)
        self.pool.chosen = int(free[best - len(paused)])
        return self._new(origin)

    def on_trial_add(self, trial: Trial) -> None:
        super().on_trial_add(trial)
        if self._known(trial.config):
            self._used.add(key(trial.config, self.encoder.space))

    def decide(self, trial_id: int, job: Job, resource: int, value: float) -> str:
        """PAUSE at the first report at or after the milestone; STOP at ``max_t``, or if a value was not finite."""
        if resource >= self.max_t:
            return SchedulerDecision.STOP
        if resource < job.milestone:
            return SchedulerDecision.CONTINUE
        if not all(math.isfinite(v) for v in self.curves[trial_id].values()):
            return SchedulerDecision.STOP
        self._paused.add(trial_id)
        return SchedulerDecision.PAUSE

    def withdraw(self, trial_id: int) -> None:
        self._paused.discard(trial_id)

    def _best(self, data: Data, paused: list[int], free: np.ndarray) -> int:
        """Position of the best candidate in the paused trials followed by the free points of the pool. Raises one of
        ``FIT_ERRORS`` if there is no model at all."""
        lines, budgets = data.observed(MAX_ROWS)
        rows, targets = data.rows(lines, budgets), data.scores[lines, budgets - 1]
        model = self._fit(rows, targets, data.count)
        predict = model.posterior(rows, targets)
        pending = {k: job.milestone for k, job in self.running.items() if k in data.line}
        if pending:
            pending_budgets = np.array(list(pending.values()))
            pending_rows = data.rows(np.array([data.line[k] for k in pending]), pending_budgets)
            targets = np.concatenate([targets, predict(pending_rows)[0]])
            budgets = np.concatenate([budgets, pending_budgets])
            predict = model.posterior(rows + pending_rows, targets)
        candidates, levels = self._candidates(data, paused, free)
        best = incumbents(budgets, targets, self.max_t)
        return int(np.argmax(expected_improvement(*predict(candidates), best[levels - 1])))

    def _candidates(self, data: Data, paused: list[int], free: np.ndarray) -> tuple["Rows", np.ndarray]:
        """Rows of the model for all candidates, and the budget of each."""
        from harness.schedulers.bo.deep_kernel_gp import Rows

        lines, levels = np.array([data.line[k] for k in paused], dtype=int), np.array([self._next(k) for k in paused])
        new = Rows(self.pool.points[free], np.full(len(free), 1 / self.max_t), np.zeros((len(free), self.max_t)))
        levels = np.concatenate([levels, np.ones(len(free))]).astype(int)
        return data.rows(lines, levels[: len(lines)]) + new, levels

    def _fit(self, rows: "Rows", targets: np.ndarray, count: int) -> "DeepKernelGP":
        """The model after ``count`` observations; the last good one if its fit fails (``_failure`` says why), the error
        if there is none."""
        from harness.schedulers.bo.deep_kernel_gp import FIT_ERRORS, DeepKernelGP

        last = self._model
        if last is not None and count == self._fitted:
            return last
        fresh = last is None or self._failure is not None
        self._fitted, self._attempts = count, self._attempts + fresh
        try:
            seed = torch_seed(self.random_seed, "deep kernel", self._attempts)
            model = DeepKernelGP(self.encoder.dims, seed) if last is None or fresh else copy.deepcopy(last)
            model.fit(rows, targets, FIRST_STEPS if fresh else WARM_STEPS)
        except FIT_ERRORS as error:
            self._failure = describe(error)
            if last is None:
                raise
            return last
        self._model, self._failure = model, None
        return model

    def _data(self) -> Data:
        trials = [k for k in sorted(self.configs) if self._known(self.configs[k])]
        values = np.full((len(trials), self.max_t), np.nan)
        sign = 1.0 if self.mode == "max" else -1.0
        for line, trial_id in enumerate(trials):
            for resource, value in self._levels(trial_id).items():
                values[line, resource - 1] = sign * value
            if trial_id in self.failed and (level := self._next(trial_id)) <= self.max_t:
                values[line, level - 1] = -np.inf
        points = [self._encode(self.configs[k]) for k in trials]
        return Data(np.array(points).reshape(len(points), self.encoder.dims), values, trials)

    def _levels(self, trial_id: int) -> dict[int, float]:
        """What the trial has reported at the resource levels 1..max_t."""
        return {r: v for r, v in self.curves.get(trial_id, {}).items() if 1 <= r <= self.max_t}

    def _next(self, trial_id: int) -> int:
        return max(self._levels(trial_id), default=0) + 1

    def _keys(self) -> set[Key]:
        return {key(config, self.encoder.space) for config in self.configs.values() if self._known(config)}

    def _encode(self, config: Mapping[str, Any]) -> np.ndarray:
        name = key(config, self.encoder.space)
        if name not in self._encoded:
            self._encoded[name] = self.encoder.encode(config)
        return self._encoded[name]

    def _known(self, config: Mapping[str, Any]) -> bool:
        """False for the configuration of a trial that this scheduler has not asked for and that lacks something."""
        return self.encoder.knows(config)

    def _random(self, origin: Origin) -> TrialSuggestion | None:
        """A random new configuration; if the table has none left, the best paused trial goes on."""
        suggestion = self._new(origin)
        if suggestion is not None:
            return suggestion
        if self._paused:
            pick = max if self.mode == "max" else min
            return self._continue(pick(sorted(self._paused), key=lambda k: pick(self.curves[k].values())), origin)
        for job in self.running.values():
            job.milestone = self.max_t
        return None

    def _new(self, origin: Origin) -> TrialSuggestion | None:
        suggestion = self.start(Job(1), train_to=1)
        self.origin = origin
        return suggestion

    def _continue(self, trial_id: int, origin: Origin) -> TrialSuggestion:
        self._paused.discard(trial_id)
        suggestion = self.resume(trial_id, Job(self._next(trial_id)))
        self.origin = origin
        return suggestion


def describe(error: Exception) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
