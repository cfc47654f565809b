"""The usual loop of task=uci: TensorDataset, DataLoader, torch.optim, one augmentation after another on each batch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.tasks import load_task, models
from harness.tasks.tabular import TabularTask

UNIT = "rows"


def units_per_step(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Rows of a batch."""
    return config.get("batch_size", spec["batch_size"])


def plain_loop(
    spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, loader_workers: int
) -> Callable[[Callable[[], bool]], None]:
    """A function that trains until the function it is given says so before a step."""
    task = load_task(spec, str(device))
    assert isinstance(task, TabularTask)
    full, net = task.completed(config), task.network(0)
    data = torch.utils.data.TensorDataset(task.inputs["train"].cpu(), task.targets["train"].cpu())
    kept: Any = {"persistent_workers": loader_workers > 0, "pin_memory": device.type == "cuda"}
    loader: Any = torch.utils.data.DataLoader(data, full["batch_size"], shuffle=True, drop_last=True,
                                              num_workers=loader_workers, **kept)  # fmt: skip
    optimizer = usual_optimizer(net, full)

    def epochs() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    batches = epochs()

    def train(finished: Callable[[], bool]) -> None:
        net.train()
        while not finished():
            x, y = (tensor.to(device) for tensor in next(batches))
            x = augmented(x, task.numeric, full)
            partner = torch.randperm(len(x), device=device)
            share = full["mixup"] / 2 * torch.rand(len(x), device=device)
            mixed = (x[partner], share) if full["mixup"] else ()
            output = net(x, *mixed, dropout=full["dropout"])
            loss = criterion(output, y, full["label_smoothing"], bool(task.table.classes))
            if full["mixup"]:
                other = criterion(output, y[partner], full["label_smoothing"], bool(task.table.classes))
                loss = torch.lerp(loss, other, share)
            optimizer.zero_grad()
            loss.mean().backward()
            if "clip" in full:
                torch.nn.utils.clip_grad_norm_(net.parameters(), full["clip"])
            optimizer.step()

    return train


def augmented(x: Tensor, numeric: int, config: Mapping[str, Any]) -> Tensor:
    numbers, words = x[:, :numeric], x[:, numeric:]
    if config["scaling"]:
        numbers = numbers * (1 + config["scaling"] * torch.randn_like(numbers))
    if config["noise"]:
        numbers = numbers + config["noise"] * torch.randn_like(numbers)
    return torch.cat([numbers, words], dim=1) if config["scaling"] or config["noise"] else x


def criterion(output: Tensor, target: Tensor, smoothing: float, classification: bool) -> Tensor:
    """The loss of each row."""
    if classification:
        return F.cross_entropy(output, target, label_smoothing=smoothing, reduction="none")
    return F.mse_loss(output.squeeze(1), (1 - smoothing) * target, reduction="none")


def usual_optimizer(net: torch.nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    decayed, rest = models.parameters_by_decay(net)
    groups = [{"params": decayed, "weight_decay": config["wd"]}, {"params": rest, "weight_decay": 0.0}]
    if config["optimizer"] == "sgd":
        nesterov = bool(config["nesterov"]) and config["momentum"] > 0
        return torch.optim.SGD(groups, lr=config["lr"], momentum=config["momentum"], nesterov=nesterov)
    kind = torch.optim.AdamW if config["optimizer"] == "adamw" else torch.optim.Adam
    return kind(groups, lr=config["lr"], betas=(config["momentum"], config["beta2"]))
