"""DyHPO's surrogate: a Gaussian process on features that a small network learns from configuration, budget and curve.

Network, kernel, mean and likelihood are those of Wistuba, Kadra, Grabocka (NeurIPS 2022, section 4) and of the authors'
implementation. The fit is ours and much shorter: it continues from the previous one with a few steps, and a step costs
one Cholesky factorisation and its inverse, because the gradient of the marginal likelihood with respect to the
covariance matrix is written down (Rasmussen and Williams 2006, eq. 5.9) instead of traced through them.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes  # GPyTorch's first kernel would import it, in the middle of a decision

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch.jit's, while gpytorch is imported
    import gpytorch

HIDDEN_UNITS, FEATURES, CHANNELS, WINDOW = 64, 128, 4, 3  # as published
NOISE_FLOOR = 1e-3  # on targets of variance 1: below, covariances of single precision stop being positive definite
NOISE_START = 0.1  # published: 0.69, where 1000 epochs have the time to bring it down
LEARNING_RATE = 1e-2  # published: 1e-3, with 10 times the steps

FIT_ERRORS = (torch.linalg.LinAlgError, RuntimeError, ValueError, FloatingPointError)


@dataclass(frozen=True)
class Rows:
    """Evaluations, made or possible.

    ``points``: shape (n, dims), in the unit cube. ``budgets``: shape (n,), in (0, 1]. ``curves``: shape (n, length),
    what was reported below the budget, then zeros.
    """

    points: np.ndarray
    budgets: np.ndarray
    curves: np.ndarray

    def __len__(self) -> int:
        return len(self.budgets)

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(
            np.concatenate([self.points, other.points]),
            np.concatenate([self.budgets, other.budgets]),
            np.concatenate([self.curves, other.curves]),
        )


class FeatureExtractor(torch.nn.Module):
    """Linear on [point, budget], BatchNorm, LeakyReLU; a convolution over the curve, maximum over time; both into a
    second Linear, LeakyReLU.

    The BatchNorm remembers the statistics of its last batch only, which is always all data: a running average would lag
    behind the few steps of a fit.
    """

    def __init__(self, dims: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # layers are made with weights from the global generator
            self.point = torch.nn.Linear(dims + 1, HIDDEN_UNITS)
            self.norm = torch.nn.BatchNorm1d(HIDDEN_UNITS, momentum=1.0)
            self.curve = torch.nn.Linear(WINDOW, CHANNELS)  # on sliding windows: a convolution
            self.joint = torch.nn.Linear(HIDDEN_UNITS + CHANNELS, FEATURES)
        self.activation = torch.nn.LeakyReLU(0.01)

    def forward(self, points: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """``points``: shape (n, dims + 1); ``windows``: shape (n, positions, 3). Returns shape (n, 128)."""
        hidden = self.activation(self.norm(self.point(points)))
        return self.activation(self.joint(torch.cat([hidden, self.curve(windows).amax(dim=1)], dim=1)))

    def initialise(self, generator: torch.Generator) -> None:
        """torch's usual weights for linear layers, from ``generator``."""
        with torch.no_grad():
            for layer in (self.point, self.curve, self.joint):
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)


class DeepKernelGP(torch.nn.Module):
    """Constant mean, scaled RBF kernel on the features, Gaussian noise; single precision, matrices of the marginal
    likelihood in double. Targets should have mean 0 and variance 1."""

    def __init__(self, dims: int, seed: int):
        """``dims``: length of a point; ``seed``: of the initial weights."""
        super().__init__()
        self.extractor = FeatureExtractor(dims)
        self.extractor.initialise(torch.Generator().manual_seed(seed))
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
        constraint = gpytorch.constraints.GreaterThan(NOISE_FLOOR)
        self.likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=constraint)
        self.likelihood.noise = NOISE_START
        self.moments: dict[str, Any] = {}  # Adam's state; an optimiser object would not go through dill

    def fit(self, rows: Rows, targets: np.ndarray, steps: int) -> None:
        """``steps`` of Adam, full batch, from where the previous fit ended. ``targets``: shape (n,), n >= 2.
        Raises one of ``FIT_ERRORS``; the model is of no use then."""
        inputs, y = self.inputs(rows), self.tensor(targets)
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        if self.moments:
            optimizer.load_state_dict(self.moments)
        self.train()
        for _ in range(steps):
            optimizer.zero_grad()
            self.backward(inputs, y)
            optimizer.step()
        self.moments = optimizer.state_dict()
        with torch.no_grad():
            self.extractor(*inputs)  # BatchNorm: statistics under the last step's weights
        self.eval()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters()):
            raise FloatingPointError("the fit of the deep kernel ended in weights that are not finite")

    def backward(self, inputs: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor) -> float:
        """Adds the gradient of the negative log marginal likelihood per observation to ``.grad``; returns its value.

        With C = K + noise I and a = C^-1 (y - mean), the derivative of the likelihood is (C^-1 - a a') / 2 with respect
        to C and -a with respect to the mean; torch carries these on to the weights.
        """
        features = self.extractor(*inputs)
        covariance, noise, mean = self.covariance(features, features), self.likelihood.noise, self.mean.constant
        with torch.no_grad():
            residual = (y - mean).double()
            factor, inverse = _factorise(covariance, noise)
            weights = inverse @ residual
            by_c = ((inverse - torch.outer(weights, weights)) / (2 * len(y))).to(y.dtype)
            by_mean = (-weights.sum() / len(y)).to(y.dtype)
            loss = (residual.dot(weights) / 2 + factor.diagonal().log().sum()) / len(y) + math.log(2 * math.pi) / 2
        ((by_c * covariance).sum() + by_c.trace() * noise.squeeze() + by_mean * mean).backward()
        return float(loss)

    def posterior(self, rows: Rows, targets: np.ndarray) -> Callable[[Rows], tuple[np.ndarray, np.ndarray]]:
        """Given these observations, a function from rows to predicted means and standard deviations, noise included as
        published; both shape (n,), float64. Raises one of ``FIT_ERRORS``."""
        with torch.no_grad():
            features = self.extractor(*self.inputs(rows))
            _, inverse = _factorise(self.covariance(features, features), self.likelihood.noise)
            weights = (inverse @ (self.tensor(targets) - self.mean.constant).double()).to(features.dtype)
            inverse = inverse.to(features.dtype)

        def predict(queries: Rows) -> tuple[np.ndarray, np.ndarray]:
            with torch.no_grad():
                cross = self.covariance(self.extractor(*self.inputs(queries)), features)
                mean = self.mean.constant + cross @ weights
                explained = ((cross @ inverse) * cross).sum(dim=1)
                variance = (self.kernel.outputscale - explained).clamp_min(0) + self.likelihood.noise
            if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
                raise FloatingPointError("the deep kernel predicted values that are not finite")
            return mean.double().numpy(), variance.sqrt().double().numpy()

        return predict

    def covariance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The kernel without gpytorch's lazy evaluation, which costs more than the matrix here."""
        return self.kernel.outputscale * self.kernel.base_kernel.forward(a, b)

    def inputs(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """What the extractor takes. Curves are cut where all have ended, one zero later: a longer run of zeros adds
        windows that the maximum has seen."""
        used = int(np.max(np.nonzero(rows.curves.any(axis=0))[0], initial=-1)) + 1
        curves = np.zeros((len(rows), used + WINDOW))
        curves[:, :used] = rows.curves[:, :used]
        points = np.concatenate([rows.points, rows.budgets[:, None]], axis=1)
        return self.tensor(points), self.tensor(curves).unfold(1, WINDOW, 1)

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values, dtype=self.mean.constant.dtype)


def _factorise(covariance: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factor and inverse of covariance + noise I, in double precision."""
    matrix = covariance.double()
    matrix = matrix + noise.double() * torch.eye(len(matrix), dtype=matrix.dtype)
    factor = torch.linalg.cholesky(matrix)
    return factor, torch.cholesky_inverse(factor)
