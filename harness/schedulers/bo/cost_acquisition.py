"""BOIL's acquisition function: expected improvement per predicted cost, and its maximisation over a box.

Nguyen, Schulze, Osborne, "Bayesian Optimization for Iterative Learning", NeurIPS 2020, section 3.1 and equation 4, as
the authors' implementation (github.com/ntienvu/BOIL) has it. Imports torch: import this module where it is used.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from harness.schedulers.bo.curve_gp import CurveGP

COST_FLOOR = 0.1  # on the scale where costs seen are in [0, 1]: the longest training counts 11 times the shortest
CHUNK = 8192  # points scored together: bounds memory


class CostModel:
    """Linear regression of the cost, scaled to [0, 1] by the least and the greatest, on (x, t)."""

    def __init__(self, inputs: Tensor, costs: Tensor):
        """``inputs``: (points, dims + 1); ``costs``: (points,), in any unit. Of several regressions that fit equally
        well the one with the least coefficients."""
        low, high = costs.min(), costs.max()
        scaled = (costs - low) / (high - low) if high > low else torch.zeros_like(costs)
        centre = inputs.mean(dim=0)
        self._slope = torch.linalg.lstsq(inputs - centre, (scaled - scaled.mean())[:, None], driver="gelsd").solution
        self._intercept = scaled.mean() - centre @ self._slope[:, 0]

    def predict(self, points: Tensor) -> Tensor:
        """Scaled cost at ``points`` (any number, dims + 1); may lie outside [0, 1]."""
        return (points @ self._slope)[:, 0] + self._intercept


class Acquisition:
    """log EI(x, t) - log(max(0, cost(x, t)) + 0.1), EI over ``incumbent``, the greatest posterior mean of the box."""

    def __init__(self, gp: CurveGP, cost: CostModel, incumbent: Tensor):
        self._gp, self._cost, self._incumbent = gp, cost, incumbent

    def __call__(self, points: Tensor) -> Tensor:
        """Shape (points,) for ``points`` (any number, dims + 1)."""
        mean, std = self._gp.predict(points)
        cost = self._cost.predict(points).clamp_min(0) + COST_FLOOR
        return log_expected_improvement(mean, std, self._incumbent) - cost.log()


def log_expected_improvement(mean: Tensor, std: Tensor, incumbent: Tensor) -> Tensor:
    """log E[max(0, N(mean, std) - incumbent)], elementwise; finite with finite gradients also where EI underflows.

    With z = (mean - incumbent) / std EI is std * (phi(z) + z Phi(z)), for z < -1 written as std * phi(z) * (1 - R) with
    R = |z| Phi(z) / phi(z) by the scaled complementary error function (Ament et al., NeurIPS 2023, equation 9).
    """
    z = (mean - incumbent) / std
    near, far = z.clamp_min(-1.0), z.clamp(-1e4, -1.0)  # beyond 1e4, which no score reaches, 1 - R loses its digits
    phi = torch.exp(-0.5 * near.square()) / math.sqrt(2 * math.pi)
    log_near = torch.log(phi + near * torch.special.ndtr(near))
    ratio = torch.special.erfcx(-far / math.sqrt(2)) * math.sqrt(math.pi / 2) * -far
    log_far = torch.log1p(-ratio) - 0.5 * far.square() - 0.5 * math.log(2 * math.pi)
    return std.log() + torch.where(z > -1, log_near, log_far)


def evaluate(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """``function`` at many points, a chunk at a time."""
    with torch.no_grad():
        return torch.cat([function(chunk) for chunk in points.split(CHUNK)])


def ascend(function: Callable[[Tensor], Tensor], starts: Tensor) -> Tensor:
    """Local maxima of ``function`` in the unit cube, shape as ``starts`` (starts, dims).

    One L-BFGS-B for the sum over all starts, whose gradient is a single batch, in place of one for each; iterations as
    published for one start, 10 for each dimension.
    """

    def negative_sum(flat: np.ndarray) -> tuple[float, np.ndarray]:
        points = torch.from_numpy(flat.reshape(starts.shape)).requires_grad_(True)
        total = -function(points).sum()
        return total.item(), torch.autograd.grad(total, points)[0].numpy().ravel()

    bounds = [(0.0, 1.0)] * starts.numel()
    dims = starts.shape[1]
    flat, _, _ = fmin_l_bfgs_b(negative_sum, starts.numpy().ravel(), bounds=bounds, maxiter=10 * dims, maxfun=20 * dims)
    return torch.from_numpy(flat.reshape(starts.shape)).clamp(0.0, 1.0)
