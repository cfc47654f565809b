"""The loop of most small language models: windows from a DataLoader, torch's optimiser and gradient clip, in fp32."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset

from harness.tasks import language, load_task

UNIT = "tokens"


def batch_size(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return int(config.get("batch_size", spec["batch_size"]))


def units_per_step(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return batch_size(spec, config) * int(spec["context"])


def plain_loop(
    spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, loader_workers: int
) -> Callable[[Callable[[], bool]], None]:
    """The same network, windows, dropout, label smoothing and clip as ours; a constant learning rate."""
    task: Any = load_task(spec, "cpu")
    kept: Any = {"persistent_workers": loader_workers > 0, "pin_memory": device.type == "cuda"}
    loader: Any = DataLoader(
        Windows(task.streams["train"], spec["context"]), batch_size(spec, config), shuffle=True, drop_last=True,
        num_workers=loader_workers, **kept,
    )  # fmt: skip
    net = language.build(spec["model"], task.vocabulary, spec["context"]).to(device)
    optimizer = torch_optimizer(net, config)
    rates = tuple(config.get(name, 0.0) for name in language.RATES)

    def epochs() -> Iterator[Any]:
        while True:
            yield from loader

    batches = epochs()

    def train(finished: Callable[[], bool]) -> None:
        net.train()
        while not finished():
            x, y = next(batches)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = net(x, rates)
            smoothing = config.get("label_smoothing", 0.0)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            if "clip" in config:
                clip_grad_norm_(net.parameters(), config["clip"])
            optimizer.step()

    return train


def torch_optimizer(net: torch.nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    lr, wd, momentum = config["lr"], config.get("wd", 0.0), config.get("momentum", 0.0)
    if config.get("optimizer") == "adamw":
        betas = (momentum, config.get("beta2", 0.999))
        return torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=wd)
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=wd)


class Windows(Dataset):
    """``context`` tokens of a stream and the tokens that follow them, one window after another."""

    def __init__(self, stream: Tensor, context: int):
        self.stream, self.context = stream.long(), context

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.stream[start : start + self.context + 1]
        return window[:-1], window[1:]
