"""A small problem for tests of OHGW: MLP and ResNet with BatchNorm, label smoothing, a differentiable augmentation."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from harness.ohgw import Problem, UpdateRule
from harness.ohgw.coordinates import Coordinate
from harness.space import Float

SPACE = {
    "lr": Float(1e-3, 1.0, log=True),
    "wd": Float(1e-6, 1e-2, log=True),
    "momentum": Float(0.0, 0.99),
    "augmentation": Float(0.0, 1.0),
    "label_smoothing": Float(0.0, 0.3),
}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, act: type[nn.Module]):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.act(self.norm1(self.first(x)))))
        return self.act(y + self.shortcut(x))


def mlp(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), act(), nn.Linear(24, 24), act(), nn.Linear(24, 4))


def resnet(act: type[nn.Module]) -> nn.Module:
    stem = (nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), act())
    return nn.Sequential(
        *stem, Block(4, 4, 1, act), Block(4, 8, 2, act), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 4)
    )


def augmented(x: Tensor, draws: Tensor, magnitude: Tensor) -> Tensor:
    """Rotation, shift and contrast by ``magnitude`` times the batch's own ``draws`` in [-1, 1], shape (n, 4)."""
    angle, dx, dy, contrast = (0.4 * magnitude * draws.T).unbind()
    rows = (torch.stack([angle.cos(), -angle.sin(), dx], -1), torch.stack([angle.sin(), angle.cos(), dy], -1))
    grid = nnf.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    moved = nnf.grid_sample(x, grid, align_corners=False)
    mean = moved.mean((1, 2, 3), keepdim=True)
    return mean + (1 + contrast)[:, None, None, None] * (moved - mean)


def smoothed(logits: Tensor, y: Tensor, smoothing: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return ((1 - smoothing) * -log_p.gather(1, y[:, None]).squeeze(1) - smoothing * log_p.mean(-1)).mean()


def train_loss(net: Callable[..., Tensor], batch: Any, z: Mapping[str, Tensor]) -> Tensor:
    x, y, draws = batch
    return smoothed(net(augmented(x, draws, z["augmentation"])), y, z["label_smoothing"])


def probe_loss(net: Callable[..., Tensor], batch: Any) -> Tensor:
    return nnf.cross_entropy(net(batch[0]), batch[1])


def draw(step: int, *, n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1000 + step)

    def one() -> Any:
        x = torch.randn(n, 1, 8, 8, generator=generator, dtype=dtype)
        y = torch.randint(4, (n,), generator=generator)
        return x, y, 2 * torch.rand(n, 4, generator=generator, dtype=dtype) - 1

    return one(), one()


def problem(model: nn.Module, **changes: Any) -> Problem:
    values: dict[str, Any] = {
        "model": model,
        "train_loss": train_loss,
        "probe_loss": probe_loss,
        "draw": draw,
        "update": UpdateRule(nesterov=True),
        "decayed": lambda name: name.endswith("weight") and "norm" not in name,
        "differentiable": ("augmentation", "label_smoothing"),
        "linear": ("label_smoothing",),
    }
    return Problem(**{**values, **changes})


def build(make: Callable[[type[nn.Module]], nn.Module], act: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make(act).double()


def sampled(seed: int) -> dict[str, float]:
    """A configuration with lr >= .03: where the gradient is tiny, F in fp64 has not enough digits to check it by."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.rand(len(SPACE), generator=generator, dtype=torch.float64).tolist()
    config = {name: domain.from_unit(0.05 + 0.9 * u) for u, (name, domain) in zip(units, SPACE.items(), strict=True)}
    return {**config, "lr": 0.03 * 10 ** units[0]}


def coordinates(*, log1m: bool = False, names: tuple[str, ...] = tuple(SPACE)) -> dict[str, Coordinate]:
    return {name: Coordinate(SPACE[name], log1m=log1m and name == "momentum") for name in names}
