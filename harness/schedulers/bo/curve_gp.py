"""BOIL's model: a Gaussian process over (configuration, epochs trained) of learning curves compressed into scores.

Nguyen, Schulze, Osborne, "Bayesian Optimization for Iterative Learning", NeurIPS 2020, sections 3.1 to 3.3, with the
constants of the authors' implementation (github.com/ntienvu/BOIL). Imports torch and GPyTorch: import this module where
it is used. All tensors are float64; call everything inside ``one_thread``.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes  # GPyTorch's first kernel would import it, in the middle of a decision
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # GPyTorch 1.15 still uses torch.jit
    import gpytorch
    from gpytorch.constraints import Interval
    from gpytorch.kernels import Kernel, RBFKernel

NOISE = 5e-4  # variance, of standardised scores; fixed
VIRTUAL_POINTS = 10  # of a trial that trained to max_t; of a shorter one in proportion
MAX_LOG_CONDITION = 15.0
MIN_STD = 1.5e-3
GRID = 100  # reports that may become virtual points: of a curve with more, so many, evenly spread
FIT_TRIES = 20  # random starting points for the hyperparameters
FIT_EVALUATIONS = 40  # of likelihood and gradient; four parameters settle in 10 to 25


@dataclass(frozen=True)
class Hyperparameters:
    """Of the kernel exp(-|x - x'|^2 / l_x - (t - t')^2 / l_t) and of the curve score's sigmoid, in the order of
    ``BOUNDS``. The defaults serve until the first fit: near the middles of the bounds."""

    l_x: float = 0.1
    l_t: float = 0.4
    midpoint: float = 0.0
    growth: float = 1.0


BOUNDS = ((0.03, 0.3), (0.3, 0.6), (-2.0, 3.0), (0.5, 2.0))


class FitError(ValueError):
    """The model cannot be fitted to the observations."""


@dataclass(frozen=True)
class Observations:
    """Points of learning curves; a point, real or virtual, is a trial's curve up to an epoch.

    ``inputs``: (points, dims + 1), in the unit cube of (x, t). ``curves``: (trials, max_t), values in [0, 1] with 1 the
    best, and 0 where ``reported`` (bool, the same shape) is false. ``trial`` and ``epoch``: (points,), the row in
    ``curves`` and the last epoch, from 1.
    """

    inputs: Tensor
    curves: Tensor
    reported: Tensor
    trial: Tensor
    epoch: Tensor


def curve_scores(observations: Observations, midpoint: Tensor, growth: Tensor) -> Tensor:
    """The score of each point, shape (points,): the mean of curve times sigmoid over the curve's last part.

    Weight of epoch r: sigmoid(growth * (u_r - midpoint)) with u = linspace(-6, 6, max_t); of a curve of n epochs those
    after int((midpoint + 4) * n / 12) count (equation 6, and ``apply_one_transform_logistic`` of the authors). An epoch
    without a report is left out of the mean. Differentiable in midpoint and growth, but for the steps of int().
    """
    u = torch.linspace(-6, 6, observations.curves.shape[1], dtype=torch.float64)
    weighted = _running_sum(observations.curves * torch.sigmoid(growth * (u - midpoint)))
    count = _running_sum(observations.reported.double())
    trial, last = observations.trial, observations.epoch
    first = ((midpoint.detach() + 4) * last / 12).long()
    return (weighted[trial, last] - weighted[trial, first]) / (count[trial, last] - count[trial, first])


def _running_sum(rows: Tensor) -> Tensor:
    """Column k holds the sum of the first k columns."""
    return torch.nn.functional.pad(torch.cumsum(rows, dim=1), (1, 0))


def standardised(scores: Tensor) -> Tensor:
    """To mean 0 and variance 1; equal scores to zeros, with a finite gradient."""
    centred = scores - scores.mean()
    return centred / centred.square().mean().clamp_min(1e-24).sqrt()


def product_kernel(dims: int, hyperparameters: Hyperparameters) -> Kernel:
    """The paper's kernel: a product of RBF kernels of x and of t, whose lengthscales squared are half of l_x and l_t.

    The raw parameters are the lengthscales themselves: L-BFGS-B keeps them in their bounds.
    """
    factors = []
    for scale, (low, high), columns in (
        (hyperparameters.l_x, BOUNDS[0], tuple(range(dims))),
        (hyperparameters.l_t, BOUNDS[1], (dims,)),
    ):
        bounds = Interval(math.sqrt(low / 2), math.sqrt(high / 2), transform=None, initial_value=math.sqrt(scale / 2))
        factors.append(RBFKernel(active_dims=columns, lengthscale_constraint=bounds))
    return (factors[0] * factors[1]).double()


class ScoreGP(gpytorch.models.ExactGP):
    """Zero mean and unit variance, for standardised scores; inputs of shape (points, dims + 1)."""

    def __init__(self, inputs: Tensor, targets: Tensor | None, hyperparameters: Hyperparameters):
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = NOISE
        likelihood.requires_grad_(False)
        super().__init__(inputs, targets, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = product_kernel(inputs.shape[1] - 1, hyperparameters)

    def forward(self, inputs: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(inputs), self.covar_module(inputs))


class NegativeLogLikelihood:
    """The marginal likelihood (per point, as GPyTorch has it) of all four hyperparameters together: each sigmoid has
    its own scores, which are standardised anew."""

    def __init__(self, observations: Observations):
        self._observations, self._inputs = observations, observations.inputs
        self._gp = ScoreGP(self._inputs, None, Hyperparameters())
        self._gp.train()
        self._mll = gpytorch.mlls.ExactMarginalLogLikelihood(self._gp.likelihood, self._gp)

    def value(self, hyperparameters: Sequence[float] | np.ndarray) -> Tensor:
        """A scalar; ``hyperparameters`` in the order of ``BOUNDS``."""
        return self._loss(hyperparameters)[0]

    def gradient(self, hyperparameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient, shape (4,), for SciPy, whose steps they must not lead out of the numbers: FitError if one
        is not finite."""
        loss, leaves = self._loss(hyperparameters)
        by_x, by_t, by_midpoint, by_growth = (g.sum() for g in torch.autograd.grad(loss, leaves))
        # lengthscale = sqrt(l / 2), so its derivative by l is 1 / (4 lengthscale)
        by_x, by_t = by_x / (4 * leaves[0].detach().sum()), by_t / (4 * leaves[1].detach().sum())
        gradient = torch.stack([by_x, by_t, by_midpoint, by_growth])
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise FitError("the marginal likelihood or its gradient is not finite")
        return loss.item(), gradient.numpy()

    def _loss(self, hyperparameters: Sequence[float] | np.ndarray) -> tuple[Tensor, list[Tensor]]:
        l_x, l_t, midpoint, growth = (float(h) for h in hyperparameters)
        lengthscales = [kernel.raw_lengthscale for kernel in self._gp.covar_module.kernels]
        with torch.no_grad():
            for lengthscale, scale in zip(lengthscales, (l_x, l_t), strict=True):
                lengthscale.fill_(math.sqrt(scale / 2))
        sigmoid = [torch.tensor(h, dtype=torch.float64, requires_grad=True) for h in (midpoint, growth)]
        targets = standardised(curve_scores(self._observations, *sigmoid))
        self._gp.set_train_data(self._inputs, targets, strict=False)
        return -self._mll(self._gp(self._inputs), targets), [*lengthscales, *sigmoid]


def fit(observations: Observations, start: Hyperparameters, rng: np.random.Generator) -> Hyperparameters:
    """Maximise the marginal likelihood within ``BOUNDS``: by L-BFGS-B from the best of ``start`` and ``FIT_TRIES``
    uniform points (the authors': without ``start``, and with finite differences). Raises FitError if it has none."""
    loss = NegativeLogLikelihood(observations)
    low, high = np.array(BOUNDS).T
    tries = [np.array(astuple(start)), *rng.uniform(low, high, size=(FIT_TRIES, len(BOUNDS)))]
    with torch.no_grad():
        losses = [loss.value(hyperparameters).item() for hyperparameters in tries]
    if not np.isfinite(losses).any():
        raise FitError("the marginal likelihood is nowhere finite")
    best = tries[int(np.nanargmin(losses))]
    best, _, _ = fmin_l_bfgs_b(loss.gradient, best, bounds=BOUNDS, maxfun=FIT_EVALUATIONS)
    return Hyperparameters(*np.clip(best, low, high).tolist())


class CurveGP:
    """The posterior given points: ``inputs`` (points, dims + 1) and standardised ``targets`` (points,)."""

    def __init__(self, inputs: Tensor, targets: Tensor, hyperparameters: Hyperparameters):
        """Raises FitError if the covariance or a target is not finite or not positive definite."""
        self.inputs, self.targets, self.hyperparameters = inputs, targets, hyperparameters
        with torch.no_grad():
            self._kernel = product_kernel(inputs.shape[1] - 1, hyperparameters).requires_grad_(False)
            covariance = self._kernel(inputs).to_dense() + NOISE * torch.eye(len(inputs), dtype=torch.float64)
            self._factor, failed = torch.linalg.cholesky_ex(covariance)
            self._weights = torch.cholesky_solve(targets[:, None], self._factor)
        if failed or not torch.isfinite(self._weights).all():
            raise FitError("the covariance matrix has no finite Cholesky factor")

    @classmethod
    def of(cls, observations: Observations, hyperparameters: Hyperparameters) -> "CurveGP":
        midpoint, growth = torch.tensor([hyperparameters.midpoint, hyperparameters.growth], dtype=torch.float64)
        return cls(observations.inputs, standardised(curve_scores(observations, midpoint, growth)), hyperparameters)

    def with_pending(self, points: Tensor) -> "CurveGP":
        """Also given that evaluations at ``points`` (any number, dims + 1) return their present posterior means: the
        mean stays what it is, the variance shrinks (the constant liar known as "kriging believer")."""
        if len(points) == 0:
            return self
        inputs, targets = torch.cat([self.inputs, points]), torch.cat([self.targets, self.predict(points)[0]])
        return CurveGP(inputs, targets, self.hyperparameters)

    def predict(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, noise included as in the authors' code, at ``points`` (any number, dims + 1)."""
        cross = self._kernel(points, self.inputs).to_dense()
        explained = torch.linalg.solve_triangular(self._factor, cross.T, upper=False).square().sum(dim=0)
        return (cross @ self._weights)[:, 0], (1 + NOISE - explained).clamp_min(1e-10).sqrt()

    def mean(self, points: Tensor) -> Tensor:
        """The mean alone, for less."""
        return (self._kernel(points, self.inputs).to_dense() @ self._weights)[:, 0]

    def covariance(self, points: Tensor) -> Tensor:
        """Posterior covariance of the scores without noise, shape (points, points)."""
        cross = torch.linalg.solve_triangular(self._factor, self._kernel(self.inputs, points).to_dense(), upper=False)
        return self._kernel(points).to_dense() - cross.T @ cross

    def log_condition(self) -> float:
        """Natural logarithm of the condition number of the points' covariance matrix, noise included."""
        eigenvalues = torch.linalg.svdvals(self._factor)
        return 2 * math.log(eigenvalues[0] / eigenvalues[-1])


def virtual_points(gp: CurveGP, x: Tensor, times: Tensor) -> list[int]:
    """Where a trial's curve gets virtual points: those of its reports at which the model is least certain.

    ``times``: ascending (reports,), when ``x`` (dims,) has reported, as t in [0, 1]; ``gp``: given all points so far,
    among them (x, times[-1]). Returns indices of ``times``, ascending: at most int(10 times[-1]) of the greatest
    posterior standard deviation, none more once the logarithm of the condition number exceeds ``MAX_LOG_CONDITION``,
    that deviation is below ``MIN_STD`` (without noise; with it, as in the authors' code, it never is) or a time repeats
    (section 3.3 and algorithm 1).

    The authors maximise over real numbers t and cut the curve at the next lower epoch. Their code also stops at once if
    the first t is that of any point of any trial, which t = 0 mostly is: so only the first trial gets virtual points.
    """
    grid = np.linspace(0, len(times) - 1, min(len(times), GRID)).round().astype(int).tolist()
    covariance = gp.covariance(_at(x, times[grid]))
    chosen: list[int] = []
    for _ in range(int(VIRTUAL_POINTS * times[-1].item())):
        variances = covariance.diagonal()
        k = int(variances.argmax())
        if variances[k] < MIN_STD**2 or grid[k] in (grid[-1], *chosen):
            break
        if log_condition(gp, _at(x, times[chosen])) > MAX_LOG_CONDITION:
            break
        chosen.append(grid[k])
        covariance = covariance - torch.outer(covariance[:, k], covariance[:, k]) / (variances[k] + NOISE)
    return sorted(chosen)


def _at(x: Tensor, times: Tensor) -> Tensor:
    return torch.cat([x.expand(len(times), -1), times[:, None]], dim=1)


def log_condition(gp: CurveGP, points: Tensor) -> float:
    """Natural logarithm of the condition number of the covariance matrix, noise included, of ``gp`` given ``points``
    too. The eigenvalues lie between the noise and the noise plus the number of points: while these bounds are close
    enough (up to some 1600 points), they are the answer."""
    size = len(gp.inputs) + len(points)
    bound = math.log1p(size / NOISE)
    return bound if bound <= MAX_LOG_CONDITION else gp.with_pending(points).log_condition()
