"""A Gaussian process over configuration and resource, for Hyperband-BO. Importing this module imports torch."""

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes  # GPyTorch's first kernel would import it, in the middle of a decision
from scipy.optimize import minimize
from torch import Tensor

with warnings.catch_warnings():  # linear_operator uses torch.jit, which torch has deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from gpytorch.constraints import GreaterThan
    from gpytorch.distributions import MultivariateNormal
    from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
    from gpytorch.likelihoods import GaussianLikelihood
    from gpytorch.means import Mean
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.models import ExactGP
    from gpytorch.priors import GammaPrior, LogNormalPrior, NormalPrior
    from linear_operator.utils.errors import NanError, NotPSDError

DTYPE = torch.float64
NOISE_FLOOR = 1e-4  # of the targets' variance: keeps factors of near duplicates stable
FIRST, WARM = 50, 5  # L-BFGS iterations from the initial hyperparameters, and from those of the fit before


class NoFit(ValueError):
    """The hyperparameters or the posterior are not finite, or a covariance matrix is singular; says which."""


FAILURES = (NoFit, NanError, NotPSDError, torch.linalg.LinAlgError, ArithmeticError)


class DecayKernel(Kernel):
    """Resource part of learning curves f(x, r) = h(x) + e^(-lambda r) g(x), lambda ~ Gamma(alpha, beta), where the
    covariance of g is ``spread`` times that of h:

    k(r, r') = 1 + spread * kappa(r + r'),  kappa(r) = (beta / (r + beta))^alpha.

    Swersky, Snoek, Adams, "Freeze-Thaw Bayesian Optimization" (2014), section 3.1, for kappa, but there g is
    independent between configurations. In Tiao et al., "Model-based Asynchronous Hyperparameter and Neural Architecture
    Search" (2020), g(x) = gamma - delta h(x). On recorded curves this one had the higher marginal likelihood and
    ranked unseen configurations better.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        initial = torch.tensor([1.0, 0.2, 0.5], dtype=DTYPE).log()
        self.register_parameter("log_alpha_beta_spread", torch.nn.Parameter(initial.clone()))
        # A factor of e either way is one standard deviation.
        self.register_prior("decay_prior", NormalPrior(initial, torch.ones_like(initial)), "log_alpha_beta_spread")

    def kappa(self, r: Tensor) -> Tensor:
        """E[e^(-lambda r)], of the shape of ``r``."""
        alpha, beta, _ = self.log_alpha_beta_spread.exp()
        return torch.exp(-alpha * torch.log1p(r / beta))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Shape (n1, n2) for (n1, 1) and (n2, 1), computed once for each pair of levels; shape (n,) if ``diag``."""
        r1, r2 = x1[:, 0], x2[:, 0]
        spread = self.log_alpha_beta_spread[2].exp()
        if diag:
            return 1 + spread * self.kappa(r1 + r2)
        levels, index = torch.unique(torch.cat([r1, r2]), return_inverse=True)
        table = 1 + spread * self.kappa(levels[:, None] + levels[None, :])
        return table[index[: len(r1)]][:, index[len(r1) :]]


class DecayMean(Mean):
    """E[f(x, r)] = level + drop * kappa(r), with the kernel's kappa."""

    def __init__(self, kernel: DecayKernel):
        super().__init__()
        self._kappa = kernel.kappa
        self.register_parameter("level_drop", torch.nn.Parameter(torch.zeros(2, dtype=DTYPE)))
        self.register_prior("mean_prior", NormalPrior(torch.zeros(2, dtype=DTYPE), 1.0), "level_drop")

    def forward(self, x: Tensor) -> Tensor:
        level, drop = self.level_drop
        return level + drop * self._kappa(x[:, -1])


class CurveGP(ExactGP):
    """GPyTorch's model: Matern-5/2 with a length scale per coordinate of x, times ``DecayKernel``; homoscedastic noise.

    Inputs: shape (n, dims + 1), the resource last. The priors are weak and keep hyperparameters that the data do not
    determine at values usual for z-scored targets on the unit cube.
    """

    def __init__(self, inputs: Tensor, targets: Tensor):
        noise = GreaterThan(NOISE_FLOOR, initial_value=0.01)
        super().__init__(inputs, targets, GaussianLikelihood(LogNormalPrior(-4.0, 1.0), noise_constraint=noise))
        dims = inputs.shape[1] - 1
        # Distances in the cube grow like sqrt(dims), and length scales with them.
        scale = LogNormalPrior(math.log(0.5) + 0.25 * math.log(dims), 1.0)
        matern = MaternKernel(2.5, ard_num_dims=dims, active_dims=tuple(range(dims)), lengthscale_prior=scale)
        matern.lengthscale = scale.loc.exp()
        self.decay = DecayKernel(active_dims=(dims,))
        self.covar_module = ScaleKernel(matern * self.decay, outputscale_prior=GammaPrior(2.0, 2.0))
        self.mean_module = DecayMean(self.decay)
        self.to(DTYPE)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def hyperparameters(self) -> np.ndarray:
        """All of them, as GPyTorch stores them (unconstrained), shape (number,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters()]).numpy()

    @torch.no_grad()
    def load(self, hyperparameters: np.ndarray) -> "CurveGP":
        start = 0
        for p in self.parameters():
            part = hyperparameters[start : start + p.numel()]
            p.copy_(torch.as_tensor(part, dtype=DTYPE).reshape(p.shape))
            start += p.numel()
        return self


def fit(inputs: np.ndarray, targets: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Hyperparameters that maximise the exact marginal likelihood with its priors, by L-BFGS-B on GPyTorch's
    gradients, shape (number of hyperparameters,). ``inputs``: shape (n, dims + 1); ``targets``: shape (n,), z-scored;
    ``start``: those of an earlier fit. Raises NoFit and what GPyTorch raises for singular matrices."""
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise NoFit("inputs or targets are not finite")
    x, y = torch.as_tensor(inputs, dtype=DTYPE), torch.as_tensor(targets, dtype=DTYPE)
    model = CurveGP(x, y).train()
    if start is not None:
        model.load(start)
    likelihood, parameters = ExactMarginalLogLikelihood(model.likelihood, model), list(model.parameters())

    def loss(vector: np.ndarray) -> tuple[float, np.ndarray]:
        model.load(vector)
        value = -likelihood(model(x), y)
        gradient = torch.autograd.grad(value, parameters)
        return value.item(), torch.cat([g.reshape(-1) for g in gradient]).numpy()

    iterations = FIRST if start is None else WARM
    # Only the best of the values that were computed counts, convergence does not.
    found = minimize(loss, model.hyperparameters(), jac=True, method="L-BFGS-B", options={"maxiter": iterations}).x
    if not np.isfinite(found).all():
        raise NoFit("the fitted hyperparameters are not finite")
    return found


class Posterior:
    """The process given observations, as a Cholesky factor; also with fantasies of pending evaluations.

    With fantasies there are several means, one each, and one variance.
    """

    def __init__(self, model: CurveGP, inputs: Tensor, factor: Tensor, weights: Tensor):
        """``factor``: of the covariance of ``inputs`` and noise; ``weights``: factor^-1 (targets - mean), one column
        for each fantasy."""
        self._model, self._inputs, self._factor, self._weights = model, inputs, factor, weights

    @classmethod
    @torch.no_grad()
    def of(cls, inputs: np.ndarray, targets: np.ndarray, hyperparameters: np.ndarray) -> "Posterior":
        """Raises NoFit if the covariance is singular or anything is not finite."""
        x, y = torch.as_tensor(inputs, dtype=DTYPE), torch.as_tensor(targets, dtype=DTYPE)
        model = CurveGP(x, y).load(hyperparameters)
        factor = _cholesky(_covariance(model, x, x) + model.likelihood.noise * torch.eye(len(x), dtype=DTYPE))
        weights = torch.linalg.solve_triangular(factor, (y - model.mean_module(x))[:, None], upper=False)
        return cls(model, x, factor, _finite(weights))

    @torch.no_grad()
    def with_pending(self, inputs: np.ndarray, normals: np.ndarray) -> "Posterior":
        """Given also the values, drawn jointly, of noisy evaluations at ``inputs``, shape (p, dims + 1).
        ``normals``: the draws in standard coordinates, shape (p, fantasies)."""
        x = torch.as_tensor(inputs, dtype=DTYPE)
        cross = torch.linalg.solve_triangular(self._factor, _covariance(self._model, self._inputs, x), upper=False)
        noise = self._model.likelihood.noise * torch.eye(len(x), dtype=DTYPE)
        corner = _cholesky(_covariance(self._model, x, x) - cross.T @ cross + noise)
        factor = torch.cat(
            [torch.cat([self._factor, torch.zeros_like(cross)], dim=1), torch.cat([cross.T, corner], dim=1)]
        )
        # The value drawn is mean + corner @ normals, so that its weights are the normals themselves.
        observed = self._weights.expand(-1, normals.shape[1])
        weights = torch.cat([observed, torch.as_tensor(normals, dtype=DTYPE)])
        return Posterior(self._model, torch.cat([self._inputs, x]), factor, weights)

    @torch.no_grad()
    def predict(self, inputs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Means, shape (m, fantasies), and standard deviations, shape (m,), of the process without noise."""
        x = torch.as_tensor(inputs, dtype=DTYPE)
        half = torch.linalg.solve_triangular(self._factor, _covariance(self._model, self._inputs, x), upper=False)
        prior = self._model.covar_module(x, diag=True)
        means = self._model.mean_module(x)[:, None] + half.T @ self._weights
        variance = (prior - half.square().sum(dim=0)).clamp_min(1e-12)  # below rounding errors
        return _finite(means), _finite(variance.sqrt())


def expected_improvement(means: Tensor, deviations: Tensor, incumbents: Tensor) -> Tensor:
    """Of a minimised value below ``incumbents``, shape (fantasies,), averaged over them: shape (m,), for ``means``,
    shape (m, fantasies), and ``deviations``, shape (m,)."""
    u = (incumbents - means) / deviations[:, None]
    density = torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
    return (deviations[:, None] * (u * torch.special.ndtr(u) + density)).mean(dim=1)


def _covariance(model: CurveGP, x1: Tensor, x2: Tensor) -> Tensor:
    return model.covar_module(x1, x2).to_dense()


def _cholesky(matrix: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item() != 0:
        raise NoFit("a covariance matrix is not positive definite")
    return _finite(factor)


def _finite(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise NoFit("the posterior is not finite")
    return values
