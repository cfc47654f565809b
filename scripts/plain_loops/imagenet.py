"""torchvision's reference recipe in short: ImageFolder, RandomResizedCrop, flip, a DataLoader, torch's SGD, in fp32."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from harness.tasks import imagenet

UNIT = "images"


def units_per_step(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return int(config.get("batch_size", spec["batch_size"]))


def plain_loop(
    spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, loader_workers: int
) -> Callable[[Callable[[], bool]], None]:
    """Crop and flip as ours, but none of the augmentation that has a magnitude."""
    from torchvision import datasets, transforms

    recipe = transforms.Compose([
        transforms.RandomResizedCrop(spec["image_size"]), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(imagenet.MEAN, imagenet.STD),
    ])  # fmt: skip
    data = datasets.ImageFolder(str(Path(spec["data_dir"]) / "train"), recipe)
    loader: Any = torch.utils.data.DataLoader(
        data, units_per_step(spec, config), shuffle=True, drop_last=True, num_workers=loader_workers,
        persistent_workers=loader_workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip
    net = imagenet.build(spec["model"], spec["image_size"], len(data.classes)).to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=config["lr"], momentum=config.get("momentum", 0), weight_decay=config.get("wd", 0)
    )

    def epochs() -> Iterator[Any]:
        while True:
            yield from loader

    batches = epochs()

    def train(finished: Callable[[], bool]) -> None:
        net.train()
        while not finished():
            images, labels = next(batches)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(net(images), labels, label_smoothing=config.get("label_smoothing", 0.0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train
