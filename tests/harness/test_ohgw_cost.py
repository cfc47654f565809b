"""Peak memory and FLOPs of warm starts of a ResNet-20, relative to a training step of the same batch size."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.ohgw import Problem, Settings, UpdateRule, count_flops, peak_memory, warm_start
from harness.space import Space
from harness.tasks import models
from tests.harness.ohgw_problem import SPACE, probe_loss, train_loss

N = 32
CONFIG = {"lr": 0.1, "wd": 5e-4, "momentum": 0.9, "augmentation": 0.5, "label_smoothing": 0.1}
CPU = torch.device("cpu")


def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,)), 2 * torch.rand(n, 4) - 1


@cache
def network() -> nn.Module:
    return models.build("resnet20", 3, 32, 10).to(memory_format=torch.channels_last)


def problem(n: int) -> Problem:
    return Problem(
        model=network(),
        train_loss=train_loss,
        probe_loss=probe_loss,
        draw=lambda step: (batch(n), batch(n)),
        update=UpdateRule(nesterov=True),
        differentiable=("augmentation", "label_smoothing"),
        linear=("label_smoothing",),
    )


def training_step() -> None:
    z = {name: torch.tensor(CONFIG[name]) for name in ("augmentation", "label_smoothing")}
    optimizer = torch.optim.SGD(network().parameters(), lr=0.0, momentum=0.9)
    train_loss(network(), batch(N), z).backward()
    optimizer.step()
    optimizer.zero_grad()


@cache
def of_a_step() -> tuple[int, int]:
    training_step()
    resident = sum(t.nbytes for t in [*network().parameters(), *network().buffers()])
    return peak_memory(training_step, CPU) + resident, count_flops(training_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "mask", "n", "memory", "flops"),
    [
        ("direct", (), N, 1.1, 1.0),
        ("lookahead", ("augmentation",), N, 1.1, 3.1),
        ("lookahead", (), N, 2.1, 6.0),
        ("lookahead", (), N // 2, 1.1, 3.0),
    ],
)
def test_memory_and_flops_stay_within_their_limits(estimator: Any, mask: Any, n: int, memory: float, flops: float):
    settings = Settings(estimator=estimator, mask=mask, batch_size=n)
    step_memory, step_flops = of_a_step()

    def start() -> None:
        assert warm_start(CONFIG, Space(SPACE), problem(n), settings).fallback is None

    start()
    resident = sum(t.nbytes for t in [*network().parameters(), *network().buffers()])
    assert (peak_memory(start, CPU) + resident) / step_memory <= memory
    assert count_flops(start) / step_flops <= flops


@pytest.mark.parametrize("bias", [True, False])
def test_recomputed_convolutions_change_no_number(bias: bool):
    """All z together (convolutions without bias are computed again) against label smoothing alone (they are not)."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3, 2, 1, bias=bias),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16 * 16, 10),
    )
    first, second = ([t.double() if t.is_floating_point() else t for t in batch(4)] for _ in range(2))
    p = dataclasses.replace(problem(4), model=nn.Sequential(*layers).double(), draw=lambda step: (first, second))
    together, alone = (
        warm_start(CONFIG, Space(SPACE), p, Settings(mask=mask)).gradient for mask in ((), ("augmentation",))
    )
    assert {name: together[name] for name in alone} == {name: pytest.approx(v, rel=1e-10) for name, v in alone.items()}
