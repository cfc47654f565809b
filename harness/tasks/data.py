"""What the data of all tasks have in common: where they are, fixed splits, label noise."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends.context import UserError
from harness.seeds import rng

SPLIT_SEED = 0  # splits and label noise belong to the task, not to a trial


def find_data(data_dir: str | None, data_files: Sequence[str], fetch: str) -> Path | None:
    """The data folder; UserError that names the first missing one of ``data_files`` and the command ``fetch``."""
    folder = Path(os.path.expanduser(data_dir)) if data_dir else None
    for file in data_files:
        if folder is None or not (folder / file).is_file():
            place = f"task.data_dir={folder} has no {file}"
            if folder is None:
                place = f"this task needs task.data_dir, the folder with {file}"
            advice = f"; fetch it with: {fetch.replace('{data_dir}', str(folder or 'data'))}" if fetch else ""
            raise UserError(place + advice)
    return folder


def installed_file(package: str, path: str, install: str) -> Path:
    """A data file that ships inside an installed package, found without importing it (scikit-learn takes seconds).
    Errors: UserError that says how to ``install`` it."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    file = next((found for folder in folders if (found := Path(folder) / path).is_file()), None)
    if file is None:
        raise UserError(f"{Path(path).name} comes with {package}; install it with: uv pip install {install}")
    return file


def stratified_split(labels: Tensor, share: float, *name: str) -> tuple[Tensor, Tensor]:
    """Indices of a random ``share`` of every class, and of the rest, both shuffled; the same for every trial."""
    generator = rng(SPLIT_SEED, "split", *name)
    first, second = [], []
    for label in labels.unique():
        members = generator.permutation(np.flatnonzero(labels.numpy() == int(label)))
        cut = round(share * len(members))
        first.append(members[:cut])
        second.append(members[cut:])
    return tuple(torch.from_numpy(generator.permutation(np.concatenate(part))) for part in (first, second))  # type: ignore[return-value]


def with_label_noise(labels: Tensor, share: float, classes: int, name: str) -> Tensor:
    """``labels`` with a fixed random ``share`` of them replaced by another class, uniformly."""
    generator = rng(SPLIT_SEED, "label_noise", name)
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    shift = generator.integers(1, classes, len(labels))[: len(chosen)]
    noisy = labels.clone()
    noisy[chosen] = (noisy[chosen] + torch.from_numpy(shift)) % classes
    return noisy
