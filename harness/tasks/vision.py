"""Image classification on small images: the UCI digits and CIFAR-10, trained with SGD.

    task = Digits("cpu", model="cnn", batch_size=32, max_epochs=27, space="study5", spaces={"study5": {...}})
    run = task.start({"lr": 0.1, "momentum": 0.9}, seed=0)
    run.train_epoch(lambda: False)      # {"train_loss": ..., "train_score": ..., "flops": ...}
    run.evaluate("validation")          # {"loss": ..., "score": ...}

All images are one uint8 tensor on the device. Crop, flip and the augmentation whose magnitude is a hyperparameter are
one resampling of many images at once, the same function in training and in the warm start. Everything random comes from
a named stream of the trial's seed and the epoch, so a run is resumed from weights, momentum and the epoch number alone,
bit for bit, and a warm start cannot disturb it. (No model here draws random numbers: torch's global generator is idle.)

Hyperparameters: lr, wd (on weight matrices and kernels only), momentum (heavy ball; ``nesterov: true``), augmentation,
label_smoothing; all but lr default to 0.
"""

import gzip
import importlib.util
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

from backends.context import TrialFailed, UserError
from harness.seeds import rng, torch_seed
from harness.space import Space
from harness.tasks import models

if TYPE_CHECKING:
    from harness.ohgw import Problem, Settings

DEFAULTS = {"wd": 0.0, "momentum": 0.0, "augmentation": 0.0, "label_smoothing": 0.0, "nesterov": False}
SPLIT_SEED = 0  # splits and label noise belong to the task, not to a trial
MAX_ROTATION = math.radians(45)  # magnitude 1 is meant to be too much, so that the best magnitude lies inside [0, 1]
MAX_SCALING = 0.3
MAX_TRANSLATION = 0.25  # of the image's size
MAX_CONTRAST = 0.5
MAX_BRIGHTNESS = 0.5  # in standard deviations of the pixels
SCALED = 6  # draws in [-1, 1] that the magnitude scales: rotation, scaling, translation x and y, contrast, brightness
N_DRAWS = SCALED + 3  # and those it does not: crop x and y in pixels, flip as -1 or 1
CHUNK = 1 << 22  # numbers augmented at once: large enough to hide launches, small enough to stay in memory
EVALUATION_BATCH = 500
CHECK_EVERY = 100  # batches between looks at the loss, which wait for the device


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


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """``F.cross_entropy(logits, labels, label_smoothing=smoothing)``, also when a gradient in it is wanted."""
    if not isinstance(smoothing, Tensor):
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    log_p = F.log_softmax(logits, dim=1)
    return (1 - smoothing) * F.nll_loss(log_p, labels) - smoothing * log_p.mean()


class ImageTask:
    """Images on a device, a network and a search space. Keys of the YAML that only the driver reads are ignored.

    Errors: UserError if the data are missing (with the command that fetches them) or ``precision`` is unknown.
    """

    classes: ClassVar[int] = 10
    crop: ClassVar[int]  # pixels, either way
    flip: ClassVar[bool]
    mixed: ClassVar[bool]  # whether autocast pays

    def __init__(
        self,
        device: str,
        *,
        model: str,
        batch_size: int,
        max_epochs: int,
        space: str,
        spaces: Mapping[str, Any],
        data_dir: str | None = None,
        data_files: Sequence[str] = (),
        fetch: str = "",
        label_noise: float = 0.0,
        schedule: str = "constant",
        precision: str = "auto",
        **_driver: Any,
    ):
        self.device, self.model, self.batch_size, self.max_epochs = torch.device(device), model, batch_size, max_epochs
        self.schedule = schedule
        self.space = Space.from_spec(spaces[space])
        self.autocast = autocast_dtype(precision, self.device, self.mixed)
        parts = self.read(find_data(data_dir, data_files, fetch))
        if batch_size > len(parts["train"]):
            raise UserError(f"task.batch_size={batch_size} is more than the {len(parts['train'])} training examples")
        train = parts["train"]
        noisy = Part(train.images, with_label_noise(train.labels, label_noise, self.classes, type(self).__name__))
        self.parts = {"train": noisy, "validation": parts["validation"], "test": parts["test"]}
        self.parts = {name: Part(part.images.to(device), part.labels.to(device)) for name, part in self.parts.items()}
        self.mean, self.std = _moments(train.images)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        self.flops_per_image = self._flops_per_image()

    def read(self, data_dir: Path | None) -> dict[str, Part]:
        """Parts ``train``, ``validation`` and ``test``, on the CPU."""
        raise NotImplementedError

    def largest_warm_start(self, probe: str) -> int:
        """Two disjoint batches from the training part, or one from each part."""
        train, validation = len(self.parts["train"]), len(self.parts["validation"])
        return train // 2 if probe == "train" else min(train, validation)

    def start(self, config: Mapping[str, Any], seed: int) -> "ImageRun":
        """A run at its initial weights, which depend on ``seed`` alone (drawn on the CPU, the same on every device)."""
        return ImageRun(self, config, seed)

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            _, channels, size, _ = self.parts["train"].images.shape
            net = models.build(self.model, channels, size, self.classes)
        return net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def epoch_draws(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """What the trial of ``seed`` draws for the epoch after ``epoch``, on the device: the training images in their
        order, without the last incomplete batch, shape (n,), and their augmentation draws (n, N_DRAWS)."""
        generator = torch.Generator().manual_seed(torch_seed(seed, "batches", epoch))
        n = self.steps_per_epoch * self.batch_size
        order = torch.randperm(len(self.parts["train"]), generator=generator)[:n]
        generator.manual_seed(torch_seed(seed, "augmentation", epoch))
        return order.to(self.device), draw(n, generator, self.crop, self.flip).to(self.device)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.parts["train"]) // self.batch_size

    def lr_factor(self, epoch: int, step: int) -> float:
        """Share of the learning rate at batch ``step`` of the epoch after ``epoch``: 1 if the schedule is constant,
        else a half cosine that is 0 at ``max_epochs``."""
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (epoch + step / self.steps_per_epoch) / self.max_epochs))

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (images.to(dtype) - self.mean.to(dtype)) / self.std.to(dtype)

    def _flops_per_image(self) -> int:
        """FLOPs of a training step per image, counted on 4: those of convolutions and matrix products (all that torch's
        counter counts) are proportional to the batch size."""
        from harness.ohgw.cost import count_flops

        net, part = self.network(0), self.parts["train"]
        images, labels = self.normalised(part.images[:4]), part.labels[:4]
        return count_flops(lambda: F.cross_entropy(net(images), labels).backward()) // 4


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
        images, labels = _read_cifar(data_dir, [f"data_batch_{i}" for i in range(1, 6)])
        train, validation = stratified_split(labels, 0.9, "cifar10", "train")
        test = Part(*_read_cifar(data_dir, ["test_batch"]))
        parts = {"train": train, "validation": validation}
        return {**{name: Part(images[index], labels[index]) for name, index in parts.items()}, "test": test}


class Sgd:
    """``torch.optim.SGD``, heavy-ball or Nesterov, with weight decay on weight matrices and kernels only.

    It is that class's functional form: the class itself imports torch._dynamo on first use, 4 s for every fresh worker.
    ``param_groups`` is what GradScaler asks of an optimizer. ``buffers`` are the momentum, zeros before the first step.
    """

    def __init__(self, net: nn.Module, config: Mapping[str, Any]):
        groups = models.parameters_by_decay(net)
        self.param_groups = [{"params": params} for params in groups]
        self.decays = (config["wd"], 0.0)
        self.lr, self.momentum = config["lr"], config["momentum"]
        self.nesterov = bool(config["nesterov"]) and self.momentum > 0  # the same thing without momentum
        self.buffers = [torch.zeros_like(p) for params in groups for p in params]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters, all of which must have gradients, with one fused kernel for each kind of decay."""
        buffers = iter(self.buffers)
        for group, decay in zip(self.param_groups, self.decays, strict=True):
            params: list[Tensor] = list(group["params"])
            gradients = [p.grad for p in params if p.grad is not None]
            sgd(params, gradients, list(islice(buffers, len(params))), fused=True, foreach=False, weight_decay=decay,
                momentum=self.momentum, lr=self.lr, dampening=0, nesterov=self.nesterov, maximize=False)  # fmt: skip

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class ImageRun:
    """One configuration in training: SGD on random batches, the last incomplete one of an epoch left out."""

    def __init__(self, task: ImageTask, config: Mapping[str, Any], seed: int):
        torch.backends.cudnn.deterministic = True  # a resumed trial must equal an uninterrupted one bit for bit
        self.task, self.seed, self.epoch = task, seed, 0
        self.net = task.network(seed)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.autocast == torch.float16)
        self.reconfigure(config)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Train with ``config`` from now on; only before epoch 1, since it forgets the momentum."""
        self.config = {**DEFAULTS, **config}
        self.optimizer = Sgd(self.net, self.config)

    def train_epoch(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Train one epoch; None (and a run to be thrown away) if ``should_stop`` said so before a batch.

        Errors: TrialFailed when the loss is not finite.
        """
        task, smoothing = self.task, self.config["label_smoothing"]
        self.net.train()
        losses: list[Tensor] = []
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in self._batches():
            if should_stop():
                return None
            self._schedule(len(losses))
            with torch.autocast(task.device.type, task.autocast, enabled=task.autocast is not None):
                output = self.net(batch.images)
                loss = F.cross_entropy(output, batch.labels, label_smoothing=smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)  # type: ignore[arg-type]
            self.scaler.update()
            losses.append(loss.detach())
            logits.append(output.detach())
            labels.append(batch.labels)
            if len(losses) % CHECK_EVERY == 0:
                _mean_loss(losses[-CHECK_EVERY:])
        self.epoch += 1
        score = (torch.cat(logits).argmax(1) == torch.cat(labels)).float().mean()
        flops = task.flops_per_image * task.batch_size * len(losses)
        return {"train_loss": _mean_loss(losses), "train_score": float(score), "flops": flops}

    @torch.inference_mode()
    def evaluate(self, part: str) -> dict[str, float]:
        """Mean cross-entropy and accuracy on ``part`` ("validation" or "test") with BatchNorm's running statistics."""
        data, task = self.task.parts[part], self.task
        self.net.eval()
        loss, correct = torch.zeros((), device=task.device), torch.zeros((), device=task.device)
        for images, labels in zip(
            data.images.split(EVALUATION_BATCH), data.labels.split(EVALUATION_BATCH), strict=True
        ):
            with torch.autocast(task.device.type, task.autocast, enabled=task.autocast is not None):
                logits = self.net(_channels_last(task.normalised(images)))
            loss += F.cross_entropy(logits.float(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
        loss_sum, n_correct = torch.stack([loss, correct]).tolist()
        return {"loss": loss_sum / len(data), "score": n_correct / len(data)}

    def problem(self, settings: "Settings") -> "Problem":
        """What OHGW needs of this run at its initial weights. Its batches come from streams of their own."""
        from harness.ohgw import Problem, UpdateRule

        task, config = self.task, self.config
        dtype = next(self.net.parameters()).dtype
        n = settings.batch_size
        if n > task.largest_warm_start(settings.probe):
            raise UserError(f"a warm start on {n} examples needs more than this task has")

        def train_loss(net: Callable[..., Tensor], batch: Batch, z: Mapping[str, Tensor]) -> Tensor:
            assert batch.draws is not None
            images = augment(batch.images, batch.draws, z.get("augmentation", config["augmentation"]))
            smoothing = z.get("label_smoothing", config["label_smoothing"])
            return smoothed_cross_entropy(net(_channels_last(images)), batch.labels, smoothing)

        def draw_pair(step: int) -> tuple[Batch, Batch]:
            generator = torch.Generator().manual_seed(torch_seed(self.seed, "warm_start", step))
            order = torch.randperm(len(task.parts["train"]), generator=generator).to(task.device)
            draws = draw(n, generator, task.crop, task.flip).to(task.device, dtype)
            first = self._plain("train", order[:n], dtype)
            if settings.probe == "train":
                return Batch(first.images, first.labels, draws), self._plain("train", order[n : 2 * n], dtype)
            chosen = torch.randperm(len(task.parts["validation"]), generator=generator)[:n].to(task.device)
            return Batch(first.images, first.labels, draws), self._plain("validation", chosen, dtype)

        decayed = {name for name, parameter in self.net.named_parameters() if models.decays(parameter)}
        return Problem(
            model=self.net,
            train_loss=train_loss,
            probe_loss=lambda net, batch: F.cross_entropy(net(_channels_last(batch.images)), batch.labels),
            draw=draw_pair,
            update=UpdateRule(kind="sgd", nesterov=bool(config["nesterov"]), lr="lr", wd="wd", momentum="momentum"),
            decayed=decayed.__contains__,
            differentiable=tuple(name for name in ("label_smoothing", "augmentation") if name in task.space),
            linear=tuple(name for name in ("label_smoothing",) if name in task.space),
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights, BatchNorm, momentum and the epoch; hyperparameters belong to the configuration."""
        return {"epoch": self.epoch, "net": self.net.state_dict(), "momentum": self.optimizer.buffers,
                "scaler": self.scaler.state_dict()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        for buffer, saved in zip(self.optimizer.buffers, state["momentum"], strict=True):
            buffer.copy_(saved)
        self.scaler.load_state_dict(state["scaler"])

    def _batches(self) -> Any:
        """The batches of the coming epoch, augmented many at a time."""
        task = self.task
        order, draws = task.epoch_draws(self.seed, self.epoch)
        chunk = max(1, CHUNK // (task.parts["train"].images[0].numel() * task.batch_size)) * task.batch_size
        for chosen, chosen_draws in zip(order.split(chunk), draws.split(chunk), strict=True):
            plain = self._plain("train", chosen)
            images = _channels_last(augment(plain.images, chosen_draws, self.config["augmentation"]))
            pairs = zip(images.split(task.batch_size), plain.labels.split(task.batch_size), strict=True)
            yield from (Batch(*pair) for pair in pairs)

    def _plain(self, part: str, chosen: Tensor, dtype: torch.dtype = torch.float32) -> Batch:
        data = self.task.parts[part]
        return Batch(self.task.normalised(data.images[chosen], dtype), data.labels[chosen])

    def _schedule(self, step: int) -> None:
        """Set the learning rate of batch ``step`` of this epoch."""
        self.optimizer.lr = self.config["lr"] * self.task.lr_factor(self.epoch, step)


def autocast_dtype(precision: str, device: torch.device, mixed: bool) -> torch.dtype | None:
    """The dtype of autocast, None for fp32. ``auto``: bf16 or (capability 7, V100) fp16 on a GPU, bf16 on a CPU that
    has it in hardware, fp32 where autocast does not pay (``mixed``). Errors: UserError for an unknown precision."""
    named = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        if precision not in named:
            raise UserError(f"task.precision must be one of auto, {', '.join(named)}, not {precision!r}")
        return named[precision]
    if not mixed:
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else None


def find_data(data_dir: str | None, data_files: Sequence[str], fetch: str) -> Path | None:
    """The data folder; UserError that names the first missing one of ``data_files`` and the command ``fetch``."""
    if not data_files:
        return None
    folder = Path(os.path.expanduser(data_dir)) if data_dir else None
    for file in data_files:
        if folder is None or not (folder / file).is_file():
            place = f"task.data_dir={folder} has no {file}"
            if folder is None:
                place = f"this task needs task.data_dir, the folder with {file}"
            raise UserError(f"{place}; fetch it with: {fetch.replace('{data_dir}', str(folder or 'data'))}")
    return folder


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


def _mean_loss(losses: Sequence[Tensor]) -> float:
    """The mean of ``losses``; waits for the device. Errors: TrialFailed if it is not finite."""
    mean = float(torch.stack(list(losses)).mean())
    if not math.isfinite(mean):
        raise TrialFailed(f"training loss is {mean}")
    return mean


def _read_digits() -> np.ndarray:
    """(1797, 65) table of pixels and label; found without importing sklearn, which takes seconds."""
    spec = importlib.util.find_spec("sklearn")
    folders = (spec.submodule_search_locations if spec else None) or []
    file = next((path for folder in folders if (path := Path(folder) / "datasets/data/digits.csv.gz").is_file()), None)
    if file is None:
        raise UserError("the digits come with scikit-learn; install it with: uv pip install scikit-learn")
    with gzip.open(file, "rt") as lines:
        return np.loadtxt(lines, delimiter=",")


def _read_cifar(data_dir: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    batches = []
    for name in names:
        with open(data_dir / "cifar-10-batches-py" / name, "rb") as file:
            batches.append(_ArraysOnly(file, encoding="latin1").load())
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.tensor([label for batch in batches for label in batch["labels"]])


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
