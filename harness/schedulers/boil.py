"""BOIL (Nguyen, Schulze, Osborne, "Bayesian Optimization for Iterative Learning", NeurIPS 2020)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialSuggestion

from harness.schedulers.base import BaseScheduler, Job, Mode, Origin
from harness.schedulers.bo.supply import SpaceSupply, TableSupply
from harness.schedulers.bo.threads import one_thread
from harness.seeds import rng

if TYPE_CHECKING:
    from torch import Tensor

    from harness.schedulers.bo.cost_acquisition import Acquisition, CostModel
    from harness.schedulers.bo.curve_gp import CurveGP, Hyperparameters, Observations

MIN_SHARE = 0.4  # of max_t: the shortest training; in the authors' experiments 200 of 500, 300 of 800, 60 of 130
INITIAL_TRIALS = 3  # random, to max_t
MAX_POINTS = 500  # real and virtual: a decision takes 0.3 s at 200, and 0.7 s at 500 (one thread, five dimensions)
BEST_SCANNED = 100  # of the uniform points, that may be chosen themselves: a small space has little to climb
CANDIDATE_LEVELS = 20  # numbers of epochs at which a table's candidates are scored
SPREAD = 3.0  # see ``unit_scale``; 1 and 20 were as good on the development tables


@dataclass(frozen=True)
class Model:
    """Fitted to the first ``trials`` trials that ended. ``incumbent``: the greatest posterior mean in the box."""

    trials: int
    gp: "CurveGP"
    cost: "CostModel"
    incumbent: "Tensor"


class BOIL(BaseScheduler[Job]):
    """Bayesian optimisation over configurations x *and* epochs t to train: each suggestion is a new trial (x, t), which
    is stopped at t and never goes on.

    The model is a GP of curve scores (``bo/curve_gp.py``), the choice that of the greatest expected improvement per
    predicted cost (``bo/cost_acquisition.py``); a cost is a number of epochs, the only one that reports are sure to
    tell. Three random trials to ``max_t`` come first; until three have ended with a score, others like them.

    t = 0 is ``MIN_SHARE`` of ``max_t``, as in all of the authors' experiments. With t = 0 at one epoch the method, to
    whose zero mean all of an unexplored region looks equally good, spends hundreds of trials there.

    The configuration that is trained is the rounded one, and that is what enters the model. One that is known is chosen
    again only to train for more epochs; with ``candidates`` never.

    *Scores.* Curves are turned so that more is better and scaled to [0, 1] (``unit_scale``) before the sigmoid weighs
    them: a score is a weighted mean, and with values below zero the least trained would look best. Scores are then
    standardised over all points.

    *Failures.* A trial that failed, reported a value that is not finite, or ended without a report scores 0, the least
    possible, at the epoch it was meant for, and gets no virtual points. One that ended by itself before its epoch
    counts up to where it came.

    *Workers.* An evaluation that is pending enters with the posterior mean as its value and its epochs as its cost.

    *Virtual points* are placed when the model is next needed after a trial ended, at the configuration in the books,
    which under a warm start is x'. Beyond ``MAX_POINTS`` those of the oldest trials go first, then the oldest trials.

    The authors' implementation differs: it computes scores of old trials with the old sigmoid (here all anew after each
    fit); its sigmoid has max_t in places, and the longest curve so far in others (here max_t); it fits the
    hyperparameters when the number of points happens to be a multiple of 2 (d + 1) (here when so many are new); it adds
    500 to curves below zero; the posterior mean is maximised from uniform points only (here also from the data).
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
        """Arguments as in ``BaseScheduler``; ``candidates``: the only configurations there are, each used once (the
        unused ones are all scored, at ``CANDIDATE_LEVELS`` numbers of epochs)."""
        from harness.schedulers.bo import cost_acquisition  # noqa: F401  # seconds that no decision should take

        super().__init__(
            config_space, metric, mode=mode, max_t=max_t, resource_attr=resource_attr,
            max_resource_attr=max_resource_attr, seed=seed,
        )  # fmt: skip
        self._box = SpaceSupply(config_space, seed)
        self.encoder = self._box.encoder
        self.min_t = max(1, math.ceil(MIN_SHARE * max_t))
        self._table = None if candidates is None else TableSupply(config_space, candidates, seed)
        self._suggested: list[tuple[dict[str, Any], int]] = []
        self._ended: dict[int, int] = {}  # trial -> epochs it was meant for, in the order of their ends
        self._virtual: dict[int, list[int]] = {}  # trial -> epochs
        self._hyperparameters: Hyperparameters | None = None
        self._fitted_points = 0
        self._model: Model | None = None

    def suggest(self) -> TrialSuggestion | None:
        """A new trial; None if the candidates are used up."""
        config, milestone, origin = self._choose()
        if config is None:
            return None
        self._suggested.append((config, milestone))
        self._pending, self.origin = Job(milestone), origin
        return TrialSuggestion.start_suggestion(self._with_milestone(config, milestone))

    def decide(self, trial_id: int, job: Job, resource: int, value: float) -> str:
        return SchedulerDecision.STOP if resource >= job.milestone else SchedulerDecision.CONTINUE

    def leave(self, trial_id: int, job: Job) -> None:
        self._ended[trial_id] = job.milestone

    def _choose(self) -> tuple[dict[str, Any] | None, int, Origin]:
        if sum(self._has_score(trial_id) for trial_id in self._ended) < INITIAL_TRIALS:
            return self._random(None)
        with one_thread():
            failure = self._update()
            if self._model is None:
                return self._random(failure)
            try:
                config, milestone = self._best(self._model)
            except (RuntimeError, ValueError) as error:  # torch's and GPyTorch's, and FitError
                return self._random(failure or _describe(error))
        return config, milestone, Origin("model" if failure is None else "last_model", failure)

    def _random(self, failure: str | None) -> tuple[dict[str, Any] | None, int, Origin]:
        config = self.searcher.suggest() if self._table is None else self._table.random()
        return config, self.max_t, Origin("random", failure)

    def _update(self) -> str | None:
        """Bring the model up to date; if that fails leave it as it is and say why."""
        if self._model is not None and self._model.trials == len(self._ended):
            return None
        try:
            self._model = self._fit()
        except (RuntimeError, ValueError) as error:  # torch's and GPyTorch's, FitError and SciPy's
            return _describe(error)
        return None

    def _fit(self) -> Model:
        from harness.schedulers.bo.cost_acquisition import CostModel
        from harness.schedulers.bo.curve_gp import CurveGP, Hyperparameters, fit

        hyperparameters = self._hyperparameters or Hyperparameters()
        self._augment(hyperparameters)
        observations = self._observations()
        points = len(self._ended) + sum(len(epochs) for epochs in self._virtual.values())
        due = points - self._fitted_points >= 2 * self._dims
        if due:
            hyperparameters = fit(observations, hyperparameters, self._rng("fit"))
        gp = CurveGP.of(observations, hyperparameters)
        cost = CostModel(observations.inputs, observations.epoch.double())
        model = Model(len(self._ended), gp, cost, self._incumbent(gp))
        if due:
            self._hyperparameters, self._fitted_points = hyperparameters, points
        return model

    def _augment(self, hyperparameters: "Hyperparameters") -> None:
        """Place the virtual points of the trials that ended since the last time, in the order of their ends."""
        import torch

        from harness.schedulers.bo.curve_gp import CurveGP, virtual_points

        trials = list(self._ended)
        for k, trial_id in enumerate(trials):
            if trial_id not in self._virtual and self._has_score(trial_id):
                inputs = self._inputs(self._points(trials[: k + 1]))
                gp = CurveGP(inputs, torch.zeros(len(inputs), dtype=torch.float64), hyperparameters)
                x = torch.from_numpy(self.encoder.encode(self.configs[trial_id]))
                epochs = self._epochs_in_range(trial_id)
                self._virtual[trial_id] = [epochs[k] for k in virtual_points(gp, x, self._unit_time(epochs))]

    def _points(self, trials: Sequence[int]) -> list[tuple[int, int]]:
        """(trial, epoch) of the points of some of the ended trials: the real ones, then the virtual ones, each from the
        last trial to the first, and at most ``MAX_POINTS``."""
        real = [(trial_id, self._last_epoch(trial_id)) for trial_id in reversed(trials)]
        virtual = [(trial_id, epoch) for trial_id in reversed(trials) for epoch in self._virtual.get(trial_id, [])]
        return (real + virtual)[:MAX_POINTS]

    def _observations(self) -> "Observations":
        import torch

        from harness.schedulers.bo.curve_gp import Observations

        points = self._points(list(self._ended))
        rows = {trial_id: row for row, trial_id in enumerate(dict(points))}
        curves, reported = self._scaled_curves(list(rows))
        return Observations(
            inputs=self._inputs(points),
            curves=torch.from_numpy(curves),
            reported=torch.from_numpy(reported),
            trial=torch.tensor([rows[trial_id] for trial_id, _ in points]),
            epoch=torch.tensor([epoch for _, epoch in points]),
        )

    def _scaled_curves(self, trials: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Values in [0, 1] and what was reported, shape (trials, max_t); trials without a score are 0 throughout."""
        values = np.full((len(trials), self.max_t), np.nan)
        for row, trial_id in enumerate(trials):
            if self._has_score(trial_id):
                for epoch, value in self._curve(trial_id).items():
                    values[row, epoch - 1] = value if self.mode == "max" else -value
        low, high = unit_scale(values)
        scaled = np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else np.ones_like(values)
        reported = np.isfinite(values)
        scored = reported.any(axis=1, keepdims=True)
        return np.where(reported, scaled, 0.0), reported | ~scored

    def _has_score(self, trial_id: int) -> bool:
        values = self._curve(trial_id).values()
        return len(values) > 0 and trial_id not in self.failed and all(math.isfinite(value) for value in values)

    def _curve(self, trial_id: int) -> dict[int, float]:
        """Value by epoch; what lies beyond ``max_t`` (a trial may report in steps) is left out."""
        return {epoch: value for epoch, value in self.curves.get(trial_id, {}).items() if 1 <= epoch <= self.max_t}

    def _last_epoch(self, trial_id: int) -> int:
        return max(self._curve(trial_id)) if self._has_score(trial_id) else self._ended[trial_id]

    def _epochs_in_range(self, trial_id: int) -> list[int]:
        """The last report of a trial with a score, and those before it that are not earlier than t = 0."""
        curve = self._curve(trial_id)
        return sorted(epoch for epoch in curve if epoch >= self.min_t or epoch == max(curve))

    def _inputs(self, points: Sequence[tuple[int, int]]) -> "Tensor":
        """Points of the unit cube of (x, t), shape (points, dims + 1), of configurations in the books."""
        x = self.encoder.encode_all(self.configs[trial_id] for trial_id, _ in points)
        return self._joined(x, [epoch for _, epoch in points])

    def _joined(self, x: np.ndarray, epochs: Sequence[int]) -> "Tensor":
        import torch

        return torch.cat([torch.from_numpy(x), self._unit_time(epochs)[:, None]], dim=1)

    def _unit_time(self, epochs: Sequence[int]) -> "Tensor":
        """Epochs as t: min_t is 0 and max_t is 1. A trial that ended before min_t has t < 0."""
        import torch

        share = (torch.tensor(epochs, dtype=torch.float64) - self.min_t) / max(self.max_t - self.min_t, 1)
        return share if self.max_t > self.min_t else share + 1

    def _incumbent(self, gp: "CurveGP") -> "Tensor":
        """The greatest posterior mean: of the candidates (and the data), or of the box, climbed to from its best points
        among the data and uniform ones."""
        import torch

        from harness.schedulers.bo.cost_acquisition import ascend, evaluate

        if self._table is not None:
            return evaluate(gp.mean, torch.cat([gp.inputs, self._candidate_points(self._table)[0]])).max()
        points = torch.cat([gp.inputs, self._uniform("incumbent").flatten(0, 1)])
        means = evaluate(gp.mean, points)
        tops = points[means.topk(self._dims).indices]
        means = torch.cat([means, evaluate(gp.mean, ascend(gp.mean, tops))])
        return means.max()

    def _best(self, model: Model) -> tuple[dict[str, Any] | None, int]:
        """The configuration and the epochs that maximise the acquisition function."""
        from harness.schedulers.bo.cost_acquisition import Acquisition

        gp = model.gp.with_pending(self._inputs([(trial_id, job.milestone) for trial_id, job in self.running.items()]))
        acquisition = Acquisition(gp, model.cost, model.incumbent)
        return self._best_in_box(acquisition) if self._table is None else self._best_candidate(acquisition, self._table)

    def _best_in_box(self, acquisition: "Acquisition") -> tuple[dict[str, Any], int]:
        """As published: 3 d starts, each the best of 100 d uniform points, climb by L-BFGS-B. What they arrive at, and
        the best uniform points, are rounded to configurations and whole epochs; the best of these that is new (the same
        configuration for more epochs is) is taken."""
        import torch

        from harness.schedulers.bo.cost_acquisition import ascend, evaluate

        scan = self._uniform("acquisition")
        values = finite(evaluate(acquisition, scan.flatten(0, 1)))
        starts = scan[torch.arange(len(scan)), values.view(scan.shape[:2]).argmax(dim=1)]
        best = scan.flatten(0, 1)[values.topk(BEST_SCANNED).indices]
        ends = torch.cat([ascend(acquisition, starts), best]).numpy()
        x = self._snapped(ends[:, :-1])
        epochs = [round(self.min_t + t * (self.max_t - self.min_t)) for t in ends[:, -1].tolist()]
        order = finite(evaluate(acquisition, self._joined(x, epochs))).argsort(descending=True, stable=True).tolist()
        known = self._known()
        new = (k for k in order if known.get(_key(x[k]), 0) < epochs[k])
        k = next(new, order[0])  # a small space may have nothing new
        return self.encoder.decode(x[k]), epochs[k]

    def _snapped(self, x: np.ndarray) -> np.ndarray:
        """Points of the cube, shape (n, dims), moved to those of the nearest configurations."""
        return self._box.near(x, np.zeros((0, self.encoder.dims)))[0]

    def _best_candidate(self, acquisition: "Acquisition", table: TableSupply) -> tuple[dict[str, Any] | None, int]:
        """Of the unused candidates; no configuration if there are none."""
        from harness.schedulers.bo.cost_acquisition import evaluate

        points, tickets, epochs = self._candidate_points(table)
        if not tickets:
            return None, self.max_t
        k = int(finite(evaluate(acquisition, points)).argmax())
        return table.give(tickets[k // len(epochs)]), epochs[k % len(epochs)]

    def _candidate_points(self, table: TableSupply) -> tuple["Tensor", list[int], list[int]]:
        """Unused candidates at ``CANDIDATE_LEVELS`` epochs: points (candidates * levels, dims + 1), tickets and levels.
        No more than the box would have uniform points: of more candidates a random share."""
        levels = sorted({round(r) for r in np.linspace(self.min_t, self.max_t, CANDIDATE_LEVELS)})
        x, tickets = table.unused()
        most = max(1, 300 * self._dims**2 // len(levels))
        if len(tickets) > most:
            share = self._rng("candidates").permutation(len(tickets))[:most]
            x, tickets = x[share], [tickets[k] for k in share]
        return self._joined(x.repeat(len(levels), axis=0), levels * len(tickets)), tickets, levels

    def _uniform(self, purpose: str) -> "Tensor":
        """Uniform points of the unit cube of (x, t), with x that of a configuration: shape (3 d, 100 d, dims + 1) for d
        hyperparameters and t."""
        import torch

        shape = (3 * self._dims, 100 * self._dims, self.encoder.dims + 1)
        points = self._rng(purpose).random((shape[0] * shape[1], shape[2]))
        points[:, :-1] = self._snapped(points[:, :-1])
        return torch.from_numpy(points.reshape(shape))

    def _known(self) -> dict[bytes, int]:
        """Encoded configuration -> most epochs that it was trained for, or is being: as suggested (x), and as in the
        books (x')."""
        booked = [*self._ended.items(), *((trial_id, job.milestone) for trial_id, job in self.running.items())]
        asked = [*self._suggested, *((self.configs[trial_id], epochs) for trial_id, epochs in booked)]
        known: dict[bytes, int] = {}
        for x, (_, epochs) in zip(self.encoder.encode_all(config for config, _ in asked), asked, strict=True):
            known[_key(x)] = max(epochs, known.get(_key(x), 0))
        return known

    @property
    def observations(self) -> int:
        """Points of the model, real and virtual; those of the newest trials are placed by the next ``suggest``."""
        return len(self._points(list(self._ended)))

    @property
    def _dims(self) -> int:
        """The method's d: hyperparameters and t."""
        return len(self.encoder.space) + 1

    def _rng(self, purpose: str) -> np.random.Generator:
        return rng(self.random_seed, "boil", purpose, len(self._suggested))


def unit_scale(values: np.ndarray) -> tuple[float, float]:
    """The values that become 0 and 1, of curves (trials, max_t) where more is better and NaN is no report.

    1 is the best value seen; 0 lies ``SPREAD`` times as far below the upper quartile of the trials' best values as 1
    lies above it, or at the worst value seen if that is nearer: one loss of 1e6 must not make all others equal.
    """
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return 0.0, 0.0
    best = np.nanmax(values[np.isfinite(values).any(axis=1)], axis=1)
    low, high = float(finite.min()), float(finite.max())
    quartile = float(np.quantile(best, 0.75))
    return (max(low, quartile - SPREAD * (high - quartile)) if quartile < high else low), high


def finite(values: "Tensor") -> "Tensor":
    """``values``; FitError if one is not finite."""
    from harness.schedulers.bo.curve_gp import FitError

    if not values.isfinite().all():
        raise FitError("the acquisition function is not finite")
    return values


def _key(x: np.ndarray) -> bytes:
    """Of a point of the cube; equal for points that are equal up to rounding errors of the encoding."""
    return np.round(x, 9).tobytes()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
