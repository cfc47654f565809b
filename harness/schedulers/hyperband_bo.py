"""Hyperband-BO: Hyperband with configurations from a Gaussian process over configuration and resource."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from harness.schedulers.base import Mode, Origin
from harness.schedulers.bo.rung_values import rung_values
from harness.schedulers.bo.supply import TableSupply, supply
from harness.schedulers.bo.threads import one_thread
from harness.schedulers.hyperband import Hyperband
from harness.seeds import rng

if TYPE_CHECKING:
    from harness.schedulers.bo.resource_gp import Posterior

INITIAL = 6  # random configurations before the first from a model
LEAST = 3  # observations that the acquisition level needs
MOST = 500  # observations of a fit: its cost grows with their cube
FANTASIES = 20  # joint draws of the values of pending evaluations
CANDIDATES = 250  # at random, before the local search
STEPS = (0.1, 0.03, 0.01)  # standard deviations of the local search's moves, in the unit cube
MOVES = 40  # from the best so far, for each of the steps


class HyperbandBO(Hyperband):
    """Hyperband whose new configurations maximise the expected improvement under a Gaussian process over configuration
    and resource, as in MOBSTER (Tiao et al., "Model-based Asynchronous Hyperparameter and Neural Architecture Search",
    2020) and syne-tune 0.14.2's synchronous variant of it.

    *Data.* The values at rung levels (``rung_values``), in unit coordinates, with (r - 1/2) / max_t as the resource; of
    more than 500 those of the trials that went furthest. Targets are the normal scores of their ranks, not z-scored
    values: recorded losses reach 1e18, and clipping them first left a larger regret on two of three recorded tables.
    A diverged or failed trial ties for the worst rank at the level that it did not reach: the process must learn where
    training breaks, and a rank tells no more than that it does.

    *Model.* ``CurveGP``, fitted anew whenever the data have changed, from the hyperparameters before. If a fit fails,
    the last good hyperparameters are used with the new data, or a random configuration if there are none; the
    suggestion's ``Origin`` says so.

    *Acquisition.* At the largest level with at least 3 values, the expected improvement below the best posterior mean
    there, of the trials that have reached the level or are running to it; an average over 20 joint fantasies of the
    values that running trials will have at their milestones. (A trial that ends for whatever reason takes back its own
    fantasies only; in syne-tune 0.14.2 an error took back those of all.) It is maximised over 250 random configurations
    and by a local search from the best of them (there: L-BFGS, which integers and categoricals do not allow), or over
    all unused ``candidates``. The first 6 configurations, and those before any level has 3 values, are those of random
    search. What was suggested before, or is what a warm start made of it, is left out.
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
        brackets: int | None = None,
        candidates: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ):
        """``candidates``: new configurations come from this list only, each at most once. The rest as in
        ``Hyperband``."""
        from harness.schedulers.bo import resource_gp  # noqa: F401  # seconds that no decision should take

        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, grace_period=grace_period, eta=eta, brackets=brackets, seed=seed,
            searcher=ProcessSearcher(self, config_space, candidates, seed),
        )  # fmt: skip


class ProcessSearcher:
    """New configurations from the books of ``scheduler``."""

    def __init__(
        self,
        scheduler: Hyperband,
        config_space: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]] | None,
        seed: int,
    ):
        self._scheduler, self._seed = scheduler, seed
        self._supply = supply(config_space, candidates, seed)
        self._suggested = 0
        self._fit = Fit()
        self.origin = Origin("random")

    def suggest(self) -> dict[str, Any] | None:
        """None if all candidates were given."""
        index = self._suggested
        self._suggested += 1
        self.origin = Origin("random")
        values = rung_values(self._scheduler, self._supply.encoder)
        level = acquisition_level(values)
        if index < INITIAL or level is None:
            return self._supply.random()
        with one_thread():
            ticket = self._from_model(values, level, index)
        return self._supply.random() if ticket is None else self._supply.give(ticket)

    def _from_model(self, values: dict[tuple[int, int], float], level: int, index: int) -> Any:
        """The ticket of the best configuration found; None if no model is of use, or no configuration is unused."""
        from harness.schedulers.bo.resource_gp import FAILURES

        encoder, configs = self._supply.encoder, self._scheduler.configs
        points = {trial_id: encoder.encode(config) for trial_id, config in configs.items() if encoder.knows(config)}
        kept = furthest(values, MOST)
        inputs = self._inputs([(points[trial_id], at) for trial_id, at in kept])
        failure = self._fit.update(inputs, targets(kept.values()))
        if self._fit.posterior is None:
            self.origin = Origin("random", failure)
            return None
        try:
            score = self._acquisition(self._fit.posterior, points, values, level, index)
            ticket = self._maximise(score, np.array(list(points.values())), index)
        except FAILURES as error:
            self.origin = Origin("random", f"{type(error).__name__}: {error}")
            return None
        if ticket is not None:
            self.origin = Origin("model" if failure is None else "last_model", failure)
        return ticket

    def _inputs(self, pairs: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """Points with resource levels in [0, 1], shape (n, dims + 1)."""
        rows = [[*point, (level - 0.5) / self._scheduler.max_t] for point, level in pairs]
        return np.array(rows).reshape(len(rows), self._supply.encoder.dims + 1)

    def _acquisition(
        self,
        posterior: "Posterior",
        points: dict[int, np.ndarray],
        values: dict[tuple[int, int], float],
        level: int,
        index: int,
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Expected improvement at ``level``, shape (m,), of points, shape (m, dims)."""
        from harness.schedulers.bo.resource_gp import expected_improvement

        running = {trial_id: job.milestone for trial_id, job in self._scheduler.running.items()}
        pending = [(t, m) for t, m in sorted(running.items()) if (t, m) not in values and t in points]
        if pending:
            normals = rng(self._seed, "fantasies", index).standard_normal((len(pending), FANTASIES))
            posterior = posterior.with_pending(self._inputs([(points[t], m) for t, m in pending]), normals)
        there = sorted({t for t, at in [*values, *pending] if at >= level})
        incumbents = posterior.predict(self._inputs([(points[t], level) for t in there]))[0].amin(dim=0)

        def score(candidates: np.ndarray) -> np.ndarray:
            predicted = posterior.predict(self._inputs([(point, level) for point in candidates]))
            return expected_improvement(*predicted, incumbents).numpy()

        return score

    def _maximise(self, score: Callable[[np.ndarray], np.ndarray], used: np.ndarray, index: int) -> Any:
        """The ticket of the unused configuration with the best score among all of a table, else among random ones and
        those of a local search from the best of them; None if there is none."""
        points: np.ndarray
        tickets: list[Any]
        if isinstance(self._supply, TableSupply):
            points, tickets = self._supply.unused()
            return tickets[int(np.argmax(score(points)))] if tickets else None
        stream, dims = rng(self._seed, "candidates", index), self._supply.encoder.dims
        points, tickets = self._supply.near(stream.random((CANDIDATES, dims)), used)
        for step in STEPS:
            if not tickets:
                return None
            best = int(np.argmax(score(points)))
            moved, more = self._supply.near(self._moves(points[best], step, stream), used)
            points, tickets = np.concatenate([points[[best]], moved]), [tickets[best], *more]
        return tickets[int(np.argmax(score(points)))]

    def _moves(self, point: np.ndarray, step: float, stream: np.random.Generator) -> np.ndarray:
        """Neighbours, shape (MOVES, dims): normal steps; in every other one a hyperparameter is drawn anew as well."""
        widths = self._supply.encoder.widths
        moved = np.clip(point + step * stream.standard_normal((MOVES, len(point))), 0.0, 1.0)
        anew = np.repeat(stream.integers(len(widths), size=MOVES)[:, None] == np.arange(len(widths)), widths, axis=1)
        anew[1::2] = False
        return np.where(anew, stream.random(moved.shape), moved)


class Fit:
    """The process fitted to the newest data, and what became of the newest fit."""

    def __init__(self) -> None:
        self.posterior: Posterior | None = None
        self._data: tuple[np.ndarray, np.ndarray] | None = None
        self._hyperparameters: np.ndarray | None = None
        self._failure: str | None = None

    def update(self, inputs: np.ndarray, values: np.ndarray) -> str | None:
        """Fit anew if the data have changed, starting from the fit before. Returns why the newest fit failed, or None.

        After a failure ``posterior`` has the last good hyperparameters and the newest data, or the last good data if
        that fails, too; it is None if no fit was good."""
        if self._data is not None and all(map(np.array_equal, self._data, (inputs, values))):
            return self._failure
        from harness.schedulers.bo import resource_gp as gp

        self._data, self._failure = (inputs, values), None
        try:
            hyperparameters = gp.fit(inputs, values, self._hyperparameters)
            self.posterior, self._hyperparameters = gp.Posterior.of(inputs, values, hyperparameters), hyperparameters
        except gp.FAILURES as error:
            self._failure = f"{type(error).__name__}: {error}"
            if self._hyperparameters is not None:
                with contextlib.suppress(*gp.FAILURES):
                    self.posterior = gp.Posterior.of(inputs, values, self._hyperparameters)
        return self._failure


def acquisition_level(values: Mapping[tuple[int, int], float]) -> int | None:
    """The largest level with at least ``LEAST`` finite values."""
    counts = Counter(level for (_, level), value in values.items() if math.isfinite(value))
    return max((level for level, count in counts.items() if count >= LEAST), default=None)


def furthest(values: dict[tuple[int, int], float], most: int) -> dict[tuple[int, int], float]:
    """At most so many of the values: those of the trials that reached the highest levels, the first trials in a tie."""
    reached: dict[int, int] = {}
    for trial_id, level in values:
        reached[trial_id] = max(level, reached.get(trial_id, 0))
    order = sorted(values, key=lambda key: (-reached[key[0]], key[0], -key[1]))[:most]
    return {key: values[key] for key in sorted(order)}


def targets(values: Iterable[float]) -> np.ndarray:
    """Normal scores, shape (n,): the quantile of the standard normal at each value's rank, the middle one for ties."""
    _, where, counts = np.unique(np.array(list(values)), return_inverse=True, return_counts=True)
    return ndtri((np.cumsum(counts) - counts / 2) / counts.sum())[where]
