"""Image classification from a tree of image files, as ImageNet is kept: ``train/<class>/*.JPEG``, ``val/<class>/*``.

Too many images for a device: processes decode them (``loader_workers`` each), and normalisation and the augmentation
whose magnitudes are hyperparameters (``harness/tasks/vision.py``) run on the device. The published validation images
are the test part here; a share of the training images of every class is the validation part.

One epoch of the harness is 1/``parts_per_pass`` of a pass over the training images, so that rungs, checkpoints and
resumes lie inside a pass: every pass has its own order, drawn from a named stream, of which the epoch's part is taken.
Crops and flips are drawn from (trial, pass, image): neither the number of decoding processes nor a resume changes them.

Networks: torchvision's ``resnet50`` (He et al. 2016), ``vit_s_16`` (ViT-S/16, Touvron et al. 2021), ``resnet18``, and
the small ones of ``harness/tasks/models.py``. BatchNorm's statistics are those of a process's share of the batch.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import UserError
from harness.seeds import torch_seed
from harness.tasks import models, vision
from harness.tasks.data import stratified_split, with_label_noise
from harness.tasks.supervised import SupervisedTask
from harness.tasks.vision import MAGNITUDES, augment, magnitudes

if TYPE_CHECKING:
    from harness.ohgw import Settings

ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], those of torchvision
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # random resized crops (Szegedy et al. 2015)
CROP_TRIES = 10
MARGIN = 256 / 224  # images are evaluated on the centre of one this much larger
VISION_MODELS = ("resnet50", "resnet18", "vit_s_16")


class ImageNet(SupervisedTask):
    """A tree of images. Errors: UserError if it is missing or not such a tree."""

    mixed = True
    defaults: ClassVar[Mapping[str, Any]] = {"augmentation": 0.0}
    differentiable = ("label_smoothing", "augmentation", *MAGNITUDES)

    def __init__(
        self,
        device: str,
        *,
        data_dir: str | None,
        image_size: int = 224,
        parts_per_pass: int = 1,
        validation_share: float = 0.02,
        loader_workers: int | None = None,
        label_noise: float = 0.0,
        fetch: str = "",
        **options: Any,
    ):
        super().__init__(device, **options)
        folder = _tree(data_dir, fetch)
        self.image_size, self.parts_per_pass = image_size, parts_per_pass
        self.loader_workers = torch.get_num_threads() if loader_workers is None else loader_workers
        self.classes = sorted(entry.name for entry in os.scandir(folder / "train") if entry.is_dir())
        files, labels = _listed(folder / "train", self.classes)
        self.files = {"test": _listed(folder / "val", self.classes)}
        train, validation = stratified_split(labels, 1 - validation_share, "imagenet", "train")
        for part, index in {"train": train, "validation": validation}.items():
            self.files[part] = ([files[i] for i in index.tolist()], labels[index])
        noisy = with_label_noise(self.files["train"][1], label_noise, len(self.classes), "ImageNet")
        self.files["train"] = (self.files["train"][0], noisy)
        self.sizes = {part: len(paths) for part, (paths, _) in self.files.items()}
        for part, n in self.sizes.items():
            if not n:
                raise UserError(f"the {part} part of {folder} is empty: every class needs more images")
        self.flops_per_example = self.count_flops()

    def steps_per_epoch(self, config: Mapping[str, Any]) -> int:
        return self.sizes["train"] // self.parts_per_pass // config["batch_size"]

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        full = super().completed(config)
        if not self.steps_per_epoch(full):
            per_epoch = self.sizes["train"] // self.parts_per_pass
            raise UserError(f"batch_size={full['batch_size']} is more than the {per_epoch} images of an epoch "
                            f"(1/{self.parts_per_pass} of a pass, task.parts_per_pass)")  # fmt: skip
        return full

    def epoch_order(self, config: Mapping[str, Any], seed: int, epoch: int) -> Tensor:
        number, part = divmod(epoch, self.parts_per_pass)
        generator = torch.Generator().manual_seed(torch_seed(seed, "batches", number))
        order = torch.randperm(self.sizes["train"], generator=generator)
        n, whole = self.sizes["train"] // self.parts_per_pass, self.steps_per_epoch(config) * config["batch_size"]
        return order[part * n : part * n + whole]

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            net = build(self.model, self.image_size, len(self.classes))
        return net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batches(self, config: Mapping[str, Any], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        size, magnitude = config["batch_size"], magnitudes(config)
        magnitude = magnitude.to(self.device) if isinstance(magnitude, Tensor) else magnitude
        order = self.epoch_order(config, seed, epoch)
        generator = torch.Generator().manual_seed(torch_seed(seed, "augmentation", epoch))
        draws = _draws(len(order), generator).split(size)
        chosen = [self.group.share(batch) for batch in order.split(size)]
        crops = torch_seed(seed, "crops", epoch // self.parts_per_pass)
        for (images, labels), drawn in zip(self._loaded("train", chosen, crops), draws, strict=True):
            drawn = self.group.share(drawn).to(self.device, non_blocking=True)
            yield _channels_last(augment(self.normalised(images), drawn, magnitude)), labels

    def evaluation_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(self.sizes[part])
        for images, labels in self._loaded(part, list(order.split(vision.EVALUATION_BATCH)), None):
            yield _channels_last(self.normalised(images)), labels

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        images, labels = self._decoded("train", torch.arange(n) % self.sizes["train"], None)
        return self.normalised(images), labels

    def warm_batches(
        self, settings: "Settings", seed: int, step: int, dtype: torch.dtype
    ) -> tuple[vision.Batch, vision.Batch]:
        n = settings.batch_size
        generator = torch.Generator().manual_seed(torch_seed(seed, "warm_start", step))
        order = torch.randperm(self.sizes["train"], generator=generator)
        part, chosen = "train", order[n : 2 * n]
        draws = self.group.share(_draws(n, generator)).to(self.device, dtype)
        if settings.probe == "val":
            part, chosen = "validation", torch.randperm(self.sizes["validation"], generator=generator)[:n]
        crops = torch_seed(seed, "warm_start", step, "crops")
        images, labels = self._decoded("train", self.group.share(order[:n]), crops)
        others, answers = self._decoded(part, self.group.share(chosen), None)
        first = vision.Batch(self.normalised(images, dtype), labels, draws)
        return first, vision.Batch(self.normalised(others, dtype), answers)

    def train_loss(self, net: Callable[..., Tensor], batch: vision.Batch, config: Mapping[str, Any]) -> Tensor:
        assert batch.draws is not None
        magnitude = magnitudes(config)
        magnitude = magnitude.to(batch.draws) if isinstance(magnitude, Tensor) else magnitude
        return self.criterion(net(_channels_last(augment(batch.images, batch.draws, magnitude))), batch.labels, config)

    def probe_loss(self, net: Callable[..., Tensor], batch: vision.Batch) -> Tensor:
        return F.cross_entropy(net(_channels_last(batch.images)), batch.labels)

    def kept(self, output: Tensor) -> Tensor:
        return output.detach().argmax(1)  # logits of a thousand classes would fill the device

    def train_score(self, kept: Sequence[Tensor], labels: Sequence[Tensor], loss: float) -> float:
        hits = (torch.cat(list(kept)) == torch.cat(list(labels))).float().mean()
        return float(self.group.total(hits)) / self.group.size

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        mean, std = (torch.tensor(values, dtype=dtype, device=images.device).view(-1, 1, 1) for values in (MEAN, STD))
        return (images.to(dtype) / 255 - mean) / std

    def _decoded(self, part: str, chosen: Tensor, crops: int | None) -> tuple[Tensor, Tensor]:
        """Images (n, 3, size, size), uint8, and labels of one batch, on the device; all workers decode a piece."""
        pieces = chosen.split(max(1, len(chosen) // max(1, self.loader_workers)))
        images, labels = zip(*self._loaded(part, list(pieces), crops), strict=True)
        return torch.cat(images), torch.cat(labels)

    def _loaded(self, part: str, batches: list[Tensor], crops: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of indices as (images, labels) on the device, in their order. ``crops``: seed of random resized
        crops and flips; None: the centre."""
        from torch.utils.data import DataLoader

        files, labels = self.files[part]
        workers = min(self.loader_workers, len(batches))
        loader: Any = DataLoader(
            Images(files, labels, self.image_size, crops),
            batch_sampler=[batch.tolist() for batch in batches],  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one
        )
        for images, answers in loader:
            yield images.to(self.device, non_blocking=True), answers.to(self.device, non_blocking=True)


class Images(torch.utils.data.Dataset):
    """Decoded image files: (3, size, size) uint8 and the label. ``crops``: seed of the random resized crops and flips,
    drawn from it and the image's index; None: the centre of the slightly larger image."""

    def __init__(self, files: Sequence[Path], labels: Tensor, size: int, crops: int | None):
        self.files, self.labels, self.size, self.crops = files, labels, size, crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Errors: UserError for a file that is no image."""
        from PIL import Image, UnidentifiedImageError

        path = self.files[index]
        try:
            with Image.open(path) as image:
                if self.crops is None:
                    pixels = self._centre(image)
                else:
                    pixels = self._random_crop(image, np.random.default_rng([self.crops, index]))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]

    def _centre(self, image: Any) -> np.ndarray:
        target = round(self.size * MARGIN)
        image.draft("RGB", (target, target))  # JPEG decodes at an eighth, a quarter, half the size if that is enough
        shorter = min(image.size)
        side = shorter * self.size / target
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return self._resized(image, (left, top, left + side, top + side))

    def _random_crop(self, image: Any, rng: np.random.Generator) -> np.ndarray:
        """A crop of random area and shape, mirrored half the time (torchvision's RandomResizedCrop and flip)."""
        width, height = image.size
        left, top, w, h = _crop(width, height, rng)
        image.draft("RGB", (int(self.size * width / w), int(self.size * height / h)))
        x, y = image.width / width, image.height / height
        pixels = self._resized(image, (left * x, top * y, (left + w) * x, (top + h) * y))
        return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels

    def _resized(self, image: Any, box: tuple[float, float, float, float]) -> np.ndarray:
        from PIL import Image

        # a copy: torch wants to be able to write
        return np.array(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR, box))


def _crop(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, width and height of a random crop; the largest centred one of an allowed shape if none fits."""
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*SCALE)
        ratio = np.exp(rng.uniform(np.log(RATIO[0]), np.log(RATIO[1])))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    return (width - w) / 2, (height - h) / 2, w, h


def build(name: str, size: int, classes: int) -> nn.Module:
    """The network ``name`` for images of ``size`` pixels, initialised from torch's global generator.
    Errors: UserError for an unknown one, and for image sizes that it cannot take."""
    if name not in VISION_MODELS:
        if name not in models.MODELS:
            raise UserError(f"task.model must be one of {', '.join((*VISION_MODELS, *models.MODELS))}, not {name!r}")
        return models.build(name, 3, size, classes)
    import torchvision.models as zoo

    if name == "vit_s_16":
        if size % 16:
            raise UserError(f"task.image_size={size} cannot be cut into patches of 16")
        return zoo.VisionTransformer(size, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536,
                                     num_classes=classes)  # fmt: skip
    return getattr(zoo, name)(weights=None, num_classes=classes)


def _draws(n: int, generator: torch.Generator) -> Tensor:
    """Augmentation draws as ``vision.draw``, without crop and flip, which the decoders see to."""
    return vision.draw(n, generator, crop=0, flip=False)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _tree(data_dir: str | None, fetch: str) -> Path:
    """The folder with ``train`` and ``val``; UserError if they are not there."""
    if data_dir is None:
        raise UserError(f"this task needs task.data_dir, the folder with train/ and val/; fetch it with: {fetch}")
    folder = Path(os.path.expanduser(data_dir))
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise UserError(f"task.data_dir={folder} has no folder {part}; fetch it with: {fetch}")
    return folder


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """All image files of the classes, sorted, with their labels. Errors: UserError for a class that is not there."""
    files: list[Path] = []
    labels: list[int] = []
    if not classes:
        raise UserError(f"{folder} has no folder for any class; images belong in {folder}/<class>/")
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name}, as train/ has; val/ must be sorted into classes as well")
        found = sorted(e.name for e in os.scandir(folder / name) if e.name.lower().endswith(ENDINGS))
        files += [folder / name / file for file in found]
        labels += [label] * len(found)
    return files, torch.tensor(labels, dtype=torch.long)
