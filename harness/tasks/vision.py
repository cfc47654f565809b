"""Image classification on small images, all on the device: the UCI digits, CIFAR-10 and -100, Fashion-MNIST.

    task = Digits("cpu", model="cnn", batch_size=32, max_epochs=27, space="study5", spaces={"study5": {...}})
    run = task.start({"lr": 0.1, "momentum": 0.9}, seed=0)
    run.train_epoch(lambda: False)      # {"train_loss": ..., "train_score": ..., "flops": ...}
    run.evaluate("validation")          # {"loss": ..., "score": ...}

All images are one uint8 tensor on the device. Crop, flip and the augmentation whose magnitudes are hyperparameters are
one resampling of many images at once, the same function in training and in the warm start. No model here draws random
numbers in training.

Hyperparameters besides those of every supervised task: augmentation, the magnitude in [0, 1] of all five changes;
rotation, scaling, translation, contrast, brightness, each in the place of augmentation for itself. Defaults: 0.
"""

import gzip
import math
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import UserError
from harness.seeds import torch_seed
from harness.tasks import models
from harness.tasks.data import find_data, installed_file, stratified_split, with_label_noise
from harness.tasks.supervised import SupervisedTask

if TYPE_CHECKING:
    from harness.ohgw import Settings

MAGNITUDES = ("rotation", "scaling", "translation", "contrast", "brightness")
MAX_ROTATION = math.radians(45)  # magnitude 1 is meant to be too much, so that the best magnitude lies inside [0, 1]
MAX_SCALING = 0.3
MAX_TRANSLATION = 0.25  # of the image's size
MAX_CONTRAST = 0.5
MAX_BRIGHTNESS = 0.5  # in standard deviations of the pixels
SCALED = 6  # draws in [-1, 1] that the magnitudes scale: rotation, scaling, translation x and y, contrast, brightness
N_DRAWS = SCALED + 3  # and those they do not: crop x and y in pixels, flip as -1 or 1
CHUNK = 1 << 22  # numbers augmented at once: large enough to hide launches, small enough to stay in memory
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Batch:
    """``images`` (n, channels, size, size), normalised; ``labels`` (n,); ``draws`` (n, N_DRAWS) or, plain, None."""

    images: Tensor
    labels: Tensor
    draws: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Train, validation or test: uint8 ``images`` (n, channels, size, size) and int64 ``labels`` (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def draw(n: int, generator: torch.Generator, crop: int, flip: bool) -> Tensor:
    """Augmentation draws (n, N_DRAWS), float32, on the CPU; crops by up to ``crop`` pixels either way."""
    scaled = torch.rand(n, SCALED, generator=generator) * 2 - 1
    shift = torch.randint(-crop, crop + 1, (n, 2), generator=generator)
    mirror = 1 - 2 * torch.randint(0, 1 + flip, (n, 1), generator=generator)
    return torch.cat([scaled, shift, mirror], dim=1)


def augment(images: Tensor, draws: Tensor, magnitude: float | Tensor) -> Tensor:
    """Crop, flip, rotate, scale and translate in one bilinear resampling, then change contrast and brightness.

    images: (n, channels, size, size), normalised, so that the zeros drawn in from outside are the mean colour (as He et
    al. pad). draws: (n, N_DRAWS). magnitude: in [0, 1]; a 0-d tensor if its gradient is wanted. Without
    crop and flip, magnitude 0 is the identity up to rounding.
    """
    theta, contrast, brightness = transforms(draws, magnitude, images.shape[-1])
    return retouched(images, F.affine_grid(theta, list(images.shape), align_corners=False), contrast, brightness)


def transforms(draws: Tensor, magnitude: float | Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``augment`` at one magnitude or one per image, (n, 1): affine maps (n, 2, 3) and the draws of contrast and
    brightness times the magnitude, (n,). ``size``: of the images, in pixels."""
    rotation, scaling, x, y, contrast, brightness = (magnitude * draws[:, :SCALED]).unbind(1)
    crop_x, crop_y, mirror = draws[:, SCALED:].unbind(1)
    angle, scale = MAX_ROTATION * rotation, 1 + MAX_SCALING * scaling
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x = 2 * (MAX_TRANSLATION * x + crop_x / size)  # grid_sample's image is 2 wide
    y = 2 * (MAX_TRANSLATION * y + crop_y / size)
    theta = torch.stack([mirror * cos, -sin, x, mirror * sin, cos, y], dim=1).view(-1, 2, 3)
    return theta, contrast, brightness


def retouched(images: Tensor, grid: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Of ``augment``: the images at the points of ``grid`` (n, size, size, 2), with other contrast and brightness."""
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved * (1 + MAX_CONTRAST * contrast).view(-1, 1, 1, 1) + (MAX_BRIGHTNESS * brightness).view(-1, 1, 1, 1)


def magnitudes(config: Mapping[str, Any]) -> float | Tensor:
    """What ``augment`` takes for ``config``: the common magnitude, or if one of the five has its own, (SCALED,)."""
    common = config["augmentation"]
    if not any(name in config for name in MAGNITUDES):
        return common
    values = {name: config.get(name, common) for name in MAGNITUDES}
    like = next((v for v in values.values() if isinstance(v, Tensor)), torch.zeros(()))
    names = ("rotation", "scaling", "translation", "translation", "contrast", "brightness")
    return torch.stack([torch.as_tensor(values[name], dtype=like.dtype, device=like.device) for name in names])


class ImageTask(SupervisedTask):
    """Small images, all on the device."""

    classes: ClassVar[int] = 10
    crop: ClassVar[int]  # pixels, either way
    flip: ClassVar[bool]
    defaults: ClassVar[Mapping[str, Any]] = {"augmentation": 0.0}
    differentiable = ("label_smoothing", "augmentation", *MAGNITUDES)

    def __init__(
        self,
        device: str,
        *,
        data_dir: str | None = None,
        data_files: Sequence[str] = (),
        fetch: str = "",
        label_noise: float = 0.0,
        **options: Any,
    ):
        super().__init__(device, **options)
        parts = self.read(find_data(data_dir, data_files, fetch))
        train = parts["train"]
        if self.batch_size > len(train):
            raise UserError(f"task.batch_size={self.batch_size} is more than the {len(train)} training examples")
        noisy = Part(train.images, with_label_noise(train.labels, label_noise, self.classes, type(self).__name__))
        self.parts = {"train": noisy, "validation": parts["validation"], "test": parts["test"]}
        self.parts = {name: Part(part.images.to(device), part.labels.to(device)) for name, part in self.parts.items()}
        self.sizes = {name: len(part) for name, part in self.parts.items()}
        self.mean, self.std = _moments(train.images)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.flops_per_example = self.count_flops()

    def read(self, data_dir: Path | None) -> dict[str, Part]:
        """Parts ``train``, ``validation`` and ``test``, on the CPU."""
        raise NotImplementedError

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            _, channels, size, _ = self.parts["train"].images.shape
            net = models.build(self.model, channels, size, self.classes)
        return net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epoch_draws(self, config: Mapping[str, Any], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """What the trial of ``seed`` draws for the epoch after ``epoch``, on the device: the training images in their
        order, without the last incomplete batch, shape (n,), and their augmentation draws (n, N_DRAWS)."""
        order = self.epoch_order(config, seed, epoch)
        generator = torch.Generator().manual_seed(torch_seed(seed, "augmentation", epoch))
        return order.to(self.device), draw(len(order), generator, self.crop, self.flip).to(self.device)

    def batches(self, config: Mapping[str, Any], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented many at a time."""
        size = config["batch_size"]
        order, draws = (
            torch.cat([self.group.share(batch) for batch in side.split(size)]) if self.group.size > 1 else side
            for side in self.epoch_draws(config, seed, epoch)
        )
        size //= self.group.size
        magnitude = magnitudes(config)
        magnitude = magnitude.to(self.device) if isinstance(magnitude, Tensor) else magnitude
        chunk = max(1, CHUNK // (self.parts["train"].images[0].numel() * size)) * size
        for chosen, chosen_draws in zip(order.split(chunk), draws.split(chunk), strict=True):
            plain = self.plain("train", chosen)
            images = _channels_last(augment(plain.images, chosen_draws, magnitude))
            yield from zip(images.split(size), plain.labels.split(size), strict=True)

    def evaluation_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.parts[part]
        for images, labels in zip(
            data.images.split(EVALUATION_BATCH), data.labels.split(EVALUATION_BATCH), strict=True
        ):
            yield _channels_last(self.normalised(images)), labels

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        part = self.parts["train"]
        return self.normalised(part.images[:n]), part.labels[:n]

    def warm_batches(self, settings: "Settings", seed: int, step: int, dtype: torch.dtype) -> tuple[Batch, Batch]:
        n = settings.batch_size
        generator = torch.Generator().manual_seed(torch_seed(seed, "warm_start", step))
        order = torch.randperm(self.sizes["train"], generator=generator).to(self.device)
        draws = draw(n, generator, self.crop, self.flip).to(self.device, dtype)
        first = self.plain("train", self.group.share(order[:n]), dtype)
        if settings.probe == "train":
            part, chosen = "train", order[n : 2 * n]
        else:
            part = "validation"
            chosen = torch.randperm(self.sizes[part], generator=generator)[:n].to(self.device)
        second = self.plain(part, self.group.share(chosen), dtype)
        return Batch(first.images, first.labels, self.group.share(draws)), second

    def train_loss(self, net: Callable[..., Tensor], batch: Batch, config: Mapping[str, Any]) -> Tensor:
        assert batch.draws is not None
        magnitude = magnitudes(config)
        magnitude = magnitude.to(batch.draws) if isinstance(magnitude, Tensor) else magnitude
        return self.criterion(net(_channels_last(augment(batch.images, batch.draws, magnitude))), batch.labels, config)

    def probe_loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(net(_channels_last(batch.images)), batch.labels)

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (images.to(dtype) - self.mean.to(dtype)) / self.std.to(dtype)

    def plain(self, part: str, chosen: Tensor, dtype: torch.dtype = torch.float32) -> Batch:
        data = self.parts[part]
        return Batch(self.normalised(data.images[chosen], dtype), data.labels[chosen])


class Digits(ImageTask):
    """UCI handwritten digits as scikit-learn ships them: 1,797 images of 8x8 in 17 grey levels, a test set of 450."""

    crop, flip, mixed = 0, False, False  # too small to crop; not to be mirrored; autocast only costs

    def read(self, data_dir: Path | None) -> dict[str, Part]:
        table = _read_digits()
        images = torch.from_numpy(table[:, :-1].astype(np.uint8).reshape(-1, 1, 8, 8))
        labels = torch.from_numpy(table[:, -1].astype(np.int64))
        train, rest = stratified_split(labels, 0.5, "digits", "train")  # half for tests: a score must tell .97 from .98
        validation, test = stratified_split(labels[rest], 0.5, "digits", "validation")
        indices = {"train": train, "validation": rest[validation], "test": rest[test]}
        return {name: Part(images[index], labels[index]) for name, index in indices.items()}


class Cifar10(ImageTask):
    """CIFAR-10 (Krizhevsky 2009) from its python batches: 45,000 / 5,000 / 10,000 images, augmented as He et al. do."""

    crop, flip, mixed = 4, True, True

    def read(self, data_dir: Path | None) -> dict[str, Part]:
        assert data_dir is not None  # find_data has seen to it
        folder = data_dir / "cifar-10-batches-py"
        train = _read_cifar([folder / f"data_batch_{i}" for i in range(1, 6)], "labels")
        return _with_validation(train, _read_cifar([folder / "test_batch"], "labels"), "cifar10")


class Cifar100(ImageTask):
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine labels: 45,000 / 5,000 / 10,000 images, augmented as CIFAR-10."""

    classes, crop, flip, mixed = 100, 4, True, True

    def read(self, data_dir: Path | None) -> dict[str, Part]:
        assert data_dir is not None
        train, test = (_read_cifar([data_dir / "cifar-100-python" / name], "fine_labels") for name in ("train", "test"))
        return _with_validation(train, test, "cifar100")


class FashionMnist(ImageTask):
    """Fashion-MNIST (Xiao et al. 2017) from its IDX files: 54,000 / 6,000 / 10,000 grey images of 28x28, augmented as
    CIFAR-10 but for smaller shifts."""

    crop, flip, mixed = 2, True, True

    def read(self, data_dir: Path | None) -> dict[str, Part]:
        assert data_dir is not None
        folder = data_dir / "FashionMNIST" / "raw"
        train, test = (read_idx_pair(folder, name) for name in ("train", "t10k"))
        return _with_validation(train, test, "fashion_mnist")


def _with_validation(data: Part, test: Part, name: str) -> dict[str, Part]:
    """A tenth of the training images, of every class alike, becomes the validation part."""
    train, validation = stratified_split(data.labels, 0.9, name, "train")
    parts = {"train": train, "validation": validation}
    return {**{part: Part(data.images[index], data.labels[index]) for part, index in parts.items()}, "test": test}


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels by channel, shape (channels, 1, 1), in float64."""
    pixels = images.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(channel.long(), minlength=256) for channel in pixels.unbind()]).double()
    values, total = torch.arange(256, dtype=torch.float64), counts.sum(1)
    mean = counts @ values / total
    std = (counts @ values**2 / total - mean**2).sqrt()
    return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _read_digits() -> np.ndarray:
    """(1797, 65) table of pixels and label; found without importing sklearn, which takes seconds."""
    with gzip.open(installed_file("sklearn", "datasets/data/digits.csv.gz", "scikit-learn"), "rt") as lines:
        return np.loadtxt(lines, delimiter=",")


def _read_cifar(files: Sequence[Path], labels: str) -> Part:
    """Images (n, 3, 32, 32) and the entry ``labels`` of CIFAR's pickled batches."""
    batches = []
    for path in files:
        with open(path, "rb") as file:
            batches.append(_ArraysOnly(file, encoding="latin1").load())
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return Part(torch.from_numpy(images), torch.tensor([label for batch in batches for label in batch[labels]]))


def read_idx_pair(folder: Path, name: str) -> Part:
    """The part ``name`` (train, t10k) of an MNIST-like set in ``folder``: images (n, 1, size, size) and labels."""
    images = _read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    return Part(images.unsqueeze(1), _read_idx(folder / f"{name}-labels-idx1-ubyte.gz").long())


def _read_idx(path: Path) -> Tensor:
    """The bytes of a gzipped IDX file (LeCun's format): two zeros, type, number of dimensions, sizes, data.
    Errors: UserError if it is none."""
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = int.from_bytes(content[:2], "big"), content[2], content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(int)
        data = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is no gzipped IDX file ({error}); delete and fetch it again") from None
    if zeros or kind != 8:
        raise UserError(f"{path} is no IDX file of bytes; delete and fetch it again")
    return torch.from_numpy(data.copy())


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of containers, numbers, strings and numpy arrays and refuses all else: data are not code."""

    ALLOWED: ClassVar[set[tuple[str, str]]] = {
        *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise UserError(f"a data file names {module}.{name}, as no CIFAR batch does: it is not what it seems")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _NEW_NUMPY else module, name)


_NEW_NUMPY = int(np.__version__.split(".")[0]) >= 2
