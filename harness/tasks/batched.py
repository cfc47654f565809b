"""Many configurations of an image task trained at once: for tables of real learning curves.

    for trial in train_batched(task, configs, seeds, epochs=27):
        trial.reports       # per epoch, the keys of a trial's report (harness/trial.py, without its times)
        trial.failure       # None, or why epoch len(trial.reports) + 1 failed

Each configuration has its own initial weights, batches, augmentation draws and hyperparameters, those that one at a
time has for the same seed, so that its curves equal the one-at-a-time trainer's up to the rounding of batched matrix
products (which a learning rate at the edge of stability amplifies to another, equally likely curve, as another machine
does).
The weights of all are stacked along a new first axis and ``vmap`` runs the network over it; the sum of the losses has
every configuration's own gradient, so one that diverges does not touch the others. It leaves when its epoch has ended.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from backends.context import UserError
from harness.tasks import models
from harness.tasks.supervised import CHECK_EVERY
from harness.tasks.vision import MAGNITUDES, ImageTask, retouched, transforms

MEMORY = 1 << 30  # bytes a chunk may take unless told otherwise
LARGEST_CHUNK = 128  # beyond it nothing is gained, and the stacked weights leave the processor's cache
EVALUATED = 1 << 19  # numbers in the images, times configurations, evaluated at once, for the same reason
STATES = 4  # numbers kept per weight: itself, its gradient, its momentum and its change


@dataclass
class TrainedTrial:
    """``reports``: of the epochs that ended well. ``failure``: the message of the TrialFailed that came in the next."""

    config: dict[str, Any]
    seed: int
    reports: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None


def train_batched(
    task: ImageTask,
    configs: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    epochs: int,
    *,
    chunk: int | None = None,
    memory: int = MEMORY,
) -> Iterator[TrainedTrial]:
    """Train every configuration with its seed (``backends.context.trial_seed``) for ``epochs`` epochs; yields them in
    order, chunk by chunk.

    ``chunk``: how many at once; None: as many as fit in ``memory`` bytes by ``bytes_per_configuration``, 128 at most.
    Errors: UserError for a task in mixed precision and for hyperparameters other than those of SGD and one augmentation
    magnitude; ValueError if there are not as many seeds as configurations.
    """
    if task.autocast is not None:
        raise UserError("batched training is in full precision only: set task.precision=fp32")
    if len(configs) != len(seeds):
        raise ValueError(f"{len(configs)} configurations need as many seeds, not {len(seeds)}")
    for config in configs:
        _check(config)
    size = chunk or max(1, min(LARGEST_CHUNK, memory // bytes_per_configuration(task)))
    for start in range(0, len(configs), size):
        pairs = zip(configs[start : start + size], seeds[start : start + size], strict=True)
        trials = [TrainedTrial(dict(config), seed) for config, seed in pairs]
        _train_chunk(task, trials, epochs)
        yield from trials


def _check(config: Mapping[str, Any]) -> None:
    """Errors: UserError for a hyperparameter that the batched trainer does not know."""
    usual = {"optimizer": "sgd"}
    for name in ("optimizer", "beta2", "clip", "schedule", "warmup", "batch_size", *MAGNITUDES):
        if name in config and config[name] != usual.get(name):
            raise UserError(f"batched training knows no hyperparameter {name}: choose task.space=study3 or study5")


def bytes_per_configuration(task: ImageTask) -> int:
    """Estimate of what one more configuration takes in training: its weights ``STATES`` times, what the backward pass
    keeps of a batch (counted on one, twice for the gradients), and the batch's images, plain and augmented with their
    grids of points. (Evaluation, of as many images at once whatever the chunk, is not counted.)"""
    net, n = task.network(0), task.batch_size
    images = task.normalised(task.parts["train"].images[:n])
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        net(images)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    activations = sum(kept.values())
    return STATES * weights + 2 * activations + 4 * images.numel() * images.element_size()


@dataclass
class Hyperparameters:
    """One value per configuration, shape (configurations,); of the weights' type, ``nesterov`` bool."""

    lr: Tensor
    wd: Tensor
    momentum: Tensor
    augmentation: Tensor
    label_smoothing: Tensor
    nesterov: Tensor

    @classmethod
    def of(cls, configs: Sequence[Mapping[str, Any]], like: Tensor) -> "Hyperparameters":
        full = list(configs)
        names = ("lr", "wd", "momentum", "augmentation", "label_smoothing")
        values = {name: like.new_tensor([float(config[name]) for config in full]) for name in names}
        return cls(**values, nesterov=like.new_tensor([config["nesterov"] for config in full], dtype=torch.bool))


def is_mlp(net: nn.Module) -> bool:
    """Whether it flattens the images and is otherwise nothing but linear layers with biases and ReLU."""
    first, *others = net.children()
    return (
        isinstance(net, nn.Sequential)
        and isinstance(first, nn.Flatten)
        and all(
            isinstance(module, nn.ReLU) or (isinstance(module, nn.Linear) and module.bias is not None)
            for module in others
        )
    )


class Stack:
    """The networks of several trials in training, as stacked weights, statistics and momentum by name."""

    def __init__(self, task: ImageTask, trials: Sequence[TrainedTrial]):
        nets = [task.network(trial.seed) for trial in trials]
        self.task, self.net, self.epoch = task, nets[0], 0
        self.weights = _stacked([dict(net.named_parameters()) for net in nets])
        self.statistics = _stacked([dict(net.named_buffers()) for net in nets])
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.seeds = [trial.seed for trial in trials]
        self.common = task.completed({"lr": 0.0})
        self.hyper = Hyperparameters.of([task.completed(trial.config) for trial in trials], next(nets[0].parameters()))

    def keep(self, chosen: Sequence[int]) -> None:
        """Go on with these only."""
        index = torch.tensor(chosen, dtype=torch.long, device=self.task.device)
        for stacked in (self.weights, self.statistics, self.momentum, vars(self.hyper)):
            for name, tensor in stacked.items():
                stacked[name] = tensor.detach()[index]
        self.seeds = [self.seeds[i] for i in chosen]

    def forward(self, images: Tensor, own: bool) -> Tensor:
        """Logits (configurations, n, classes) of ``images``, which are (configurations, n, ...) if each has its ``own``
        and (n, ...) if all share them. In training, BatchNorm's statistics are updated in place."""

        if is_mlp(self.net):
            return self._mlp(images)

        def one(weights: dict[str, Tensor], statistics: dict[str, Tensor], batch: Tensor) -> Tensor:
            return functional_call(self.net, (weights, statistics), (batch,))

        return vmap(one, in_dims=(0, 0, 0 if own else None))(self.weights, self.statistics, images)

    def _mlp(self, images: Tensor) -> Tensor:
        """``forward`` of a plain stack of linear layers, whose operations are so small that ``vmap`` would cost as much
        as they do."""
        x = images.flatten(-3).expand(len(self.seeds), -1, -1)
        for name, module in self.net.named_children():
            if isinstance(module, nn.Linear):
                x = torch.baddbmm(self.weights[f"{name}.bias"].unsqueeze(1), x, self.weights[f"{name}.weight"].mT)
            elif isinstance(module, nn.ReLU):
                x = x.relu()
        return x

    def train_epoch(self) -> tuple[Tensor, Tensor]:
        """Losses (configurations, steps) and the shares of right answers (configurations,), float32."""
        self.net.train()
        losses, hits = [], []
        for step, (images, labels) in enumerate(self._batches()):
            for weight in self.weights.values():
                weight.requires_grad_(True)
            logits = self.forward(images, own=True)
            loss = cross_entropies(logits, labels, self.hyper.label_smoothing)
            gradients = torch.autograd.grad(loss.sum(), list(self.weights.values()))
            self._update(gradients, self.task.lr_factor(self.common, self.epoch, step))
            losses.append(loss.detach())
            hits.append(logits.detach().argmax(2) == labels)
        self.epoch += 1
        return torch.stack(losses, dim=1), torch.cat(hits, dim=1).float().mean(1)

    @torch.no_grad()
    def evaluate(self, part: str) -> tuple[list[float], list[float]]:
        """Mean cross-entropies and accuracies of all configurations on a part, as ``SupervisedRun.evaluate``."""
        data, task = self.task.parts[part], self.task
        self.net.eval()
        n = len(self.seeds)
        loss, correct = torch.zeros(n, device=task.device), torch.zeros(n, device=task.device)
        size = max(1, EVALUATED // (n * data.images[0].numel()))
        for images, labels in zip(data.images.split(size), data.labels.split(size), strict=True):
            logits, own_labels = self.forward(task.normalised(images), own=False), labels.expand(n, -1)
            loss += F.cross_entropy(logits.float().movedim(2, 1), own_labels, reduction="none").sum(1)
            correct += (logits.argmax(2) == labels).sum(1)
        return (loss.double() / len(data)).tolist(), (correct.double() / len(data)).tolist()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(configurations, batch, ...) images and labels of the coming epoch. One batch is augmented at a time: it has
        many images already, and more of them at once leave the processor's cache."""
        task, part = self.task, self.task.parts["train"]
        pairs = [task.epoch_draws(self.common, seed, self.epoch) for seed in self.seeds]
        order, draws = (torch.stack(side).split(task.batch_size, dim=1) for side in zip(*pairs, strict=True))
        magnitude = self.hyper.augmentation.repeat_interleave(task.batch_size).unsqueeze(1)
        for chosen, drawn in zip(order, draws, strict=True):
            plain = task.normalised(part.images.index_select(0, chosen.flatten()))
            images = augment_many(plain, drawn.flatten(0, 1), magnitude)
            yield images.view(*chosen.shape, *plain.shape[1:]), part.labels[chosen]

    @torch.no_grad()
    def _update(self, gradients: Sequence[Tensor], lr_factor: float) -> None:
        """A step of ``Sgd`` for each configuration with its own lr, wd and momentum."""
        hyper = self.hyper
        nesterov = bool(hyper.nesterov.any())
        for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
            if weight.stride() != gradient.stride():  # before the first update: with equal ones it takes a quarter
                self.weights[name] = weight = torch.empty_like(gradient).copy_(weight)
                self.momentum[name] = torch.empty_like(gradient).copy_(self.momentum[name])
            momentum = self.momentum[name]
            shape = [-1] + [1] * (weight.ndim - 1)
            decay = hyper.momentum.view(shape)
            if models.decays(weight[0]):
                gradient.addcmul_(hyper.wd.view(shape), weight)
            torch.addcmul(gradient, decay, momentum, out=momentum)
            change = momentum
            if nesterov:
                change = torch.where(hyper.nesterov.view(shape), torch.addcmul(gradient, decay, momentum), momentum)
            weight.addcmul_(hyper.lr.view(shape), change, value=-lr_factor)


def augment_many(images: Tensor, draws: Tensor, magnitude: Tensor) -> Tensor:
    """``vision.augment`` with a magnitude (n, 1) for each image. The points of all grids come from one matrix product:
    ``F.affine_grid`` makes one of each image, which costs more than the resampling for 8x8 images."""
    n, size = len(images), images.shape[-1]
    theta, contrast, brightness = transforms(draws, magnitude, size)
    centres = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).view(3, -1).to(draws.dtype)
    grid = (theta.view(-1, 3) @ points).view(n, 2, size, size).permute(0, 2, 3, 1)
    return retouched(images, grid, contrast, brightness)


def cross_entropies(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Mean cross-entropy of each configuration: logits (c, n, classes), labels (c, n), smoothing and result (c,)."""
    log_p = F.log_softmax(logits.movedim(2, 1), dim=1)  # a softmax over the last dimension of 10 costs three times this
    plain = F.nll_loss(log_p, labels, reduction="none").mean(1)
    smoothed = (1 - smoothing) * plain - smoothing * log_p.mean((1, 2))
    return torch.where(smoothing > 0, smoothed, plain)


def _train_chunk(task: ImageTask, trials: Sequence[TrainedTrial], epochs: int) -> None:
    """Train all to the end or to their failure, and enter what they report."""
    stack, alive = Stack(task, trials), list(trials)
    flops = task.flops_per_example * task.batch_size * task.steps_per_epoch(stack.common)
    for epoch in range(1, epochs + 1):
        if not alive:
            return
        losses, scores = stack.train_epoch()
        train_losses = losses.mean(1).tolist()
        validation_losses, validation_scores = stack.evaluate("validation")
        _, test_scores = stack.evaluate("test")
        failures = _failures(losses, validation_losses, epoch)
        for i, (trial, score) in enumerate(zip(alive, scores.tolist(), strict=True)):
            trial.failure = failures[i]
            if trial.failure is None:
                trial.reports.append({
                    "epoch": epoch, "train_loss": train_losses[i], "train_score": score,
                    "validation_loss": validation_losses[i], "validation_score": validation_scores[i],
                    "test_score": test_scores[i], "flops": {"train": flops},
                })  # fmt: skip
        chosen = [i for i, failure in enumerate(failures) if failure is None]
        if len(chosen) < len(alive):
            stack.keep(chosen)
            alive = [alive[i] for i in chosen]


def _failures(losses: Tensor, validation_losses: Sequence[float], epoch: int) -> list[str | None]:
    """Why each configuration fails in this epoch, in the words of the one-at-a-time trainer, which looks at the mean of
    every ``CHECK_EVERY`` losses first, then at the epoch's, then at the validation loss."""
    looks = [window.mean(1) for window in losses.split(CHECK_EVERY, dim=1) if window.shape[1] == CHECK_EVERY]
    train = torch.stack([*looks, losses.mean(1)], dim=1).tolist()
    return [_failure(means, validation, epoch) for means, validation in zip(train, validation_losses, strict=True)]


def _failure(train_means: Sequence[float], validation_loss: float, epoch: int) -> str | None:
    for mean in train_means:
        if not math.isfinite(mean):
            return f"training loss is {mean}"
    return None if math.isfinite(validation_loss) else f"validation loss is {validation_loss} in epoch {epoch}"


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
