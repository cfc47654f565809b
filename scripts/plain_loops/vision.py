"""The loop of most repositories: torchvision's data set and transforms, a DataLoader, torch's SGD, in fp32."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from harness.tasks import models, vision

UNIT = "images"


def units_per_step(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return int(config.get("batch_size", spec["batch_size"]))


def plain_loop(
    spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, loader_workers: int
) -> Callable[[Callable[[], bool]], None]:
    """Crop and flip as ours, but none of the augmentation that has a magnitude."""
    data = dataset(spec)
    images, classes = data[0][0], spec_classes(spec)
    kept: Any = {"persistent_workers": loader_workers > 0, "pin_memory": device.type == "cuda"}
    loader: Any = DataLoader(
        data, units_per_step(spec, config), shuffle=True, drop_last=True, num_workers=loader_workers, **kept
    )
    net = models.build(spec["model"], images.shape[0], images.shape[-1], classes).to(device)
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
            x, y = next(batches)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            loss = F.cross_entropy(net(x), y, label_smoothing=config.get("label_smoothing", 0.0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def spec_classes(spec: Mapping[str, Any]) -> int:
    return int(getattr(vision, spec["_target_"].rpartition(".")[2]).classes)


def dataset(spec: Mapping[str, Any]) -> Dataset:
    """torchvision's data set of the task with the usual transforms."""
    from torchvision import datasets, transforms

    name = spec["_target_"].rpartition(".")[2]
    task = getattr(vision, name)
    steps: list[Any] = [transforms.RandomCrop(size(name), padding=task.crop)] if task.crop else []
    steps += [transforms.RandomHorizontalFlip()] if task.flip else []
    recipe = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(0.5, 0.25)])
    if name == "Digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return Pictures((images.reshape(-1, 8, 8) * 15).astype(np.uint8)[:898], labels[:898], recipe)
    if name == "FashionMnist":  # torchvision's own wants the files unpacked
        raw = Path(spec["data_dir"]) / "FashionMNIST" / "raw"
        part = vision.read_idx_pair(raw, "train")
        return Pictures(part.images[:, 0].numpy(), part.labels.numpy(), recipe)
    kinds = {"Cifar10": datasets.CIFAR10, "Cifar100": datasets.CIFAR100}
    return kinds[name](spec["data_dir"], train=True, transform=recipe)


def size(name: str) -> int:
    return 28 if name == "FashionMnist" else 32


class Pictures(Dataset):
    """Grey images (n, size, size), uint8, handed out as torchvision's MNIST does."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Any], torch.Tensor]):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])
