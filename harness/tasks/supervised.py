"""What all tasks share that train a network on mini-batches of examples; a family adds data, network and loss.

    class MyTask(SupervisedTask):
        sizes                                   examples in "train", "validation", "test"
        network(seed)                           the network at its initial weights, on the device
        batches(config, seed, epoch)            (inputs, labels) of the epoch after ``epoch``, augmented
        evaluation_batches(part)                (inputs, labels)
        sample(n)                               (inputs, labels), for ``count_flops``, which __init__ calls at its end
        warm_batches(settings, seed, step, dtype)  two disjoint batches for OHGW
        train_loss(net, batch, config)          of such a batch, differentiable in the hyperparameters of ``config``
        probe_loss(net, batch)                  plain
        differentiable, linear, finite          names of hyperparameters, as ``harness.ohgw.Problem`` wants them

and, where it is not classification by cross-entropy, ``criterion``, ``statistics``, ``scores`` and ``train_score``.

Everything random comes from a named stream of the trial's seed and the epoch, so that a run is resumed from weights,
the optimiser's state and the epoch number alone, bit for bit, and a warm start cannot disturb it.

Hyperparameters of every family: lr, wd (on weight matrices and kernels only), momentum (heavy ball; ``nesterov: true``;
beta1 of Adam), optimizer (sgd, adam, adamw), beta2, clip (largest gradient norm), schedule (constant, cosine), warmup
(share of ``max_epochs`` in which the learning rate rises to lr), batch_size, label_smoothing. All but lr have defaults.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import TrialFailed, UserError
from harness.seeds import torch_seed
from harness.space import Space
from harness.tasks import models
from harness.tasks.distributed import ALONE, Group
from harness.tasks.optimizers import OPTIMIZERS, optimizer

if TYPE_CHECKING:
    from harness.ohgw import Problem, Settings

DEFAULTS = {
    "wd": 0.0,
    "momentum": 0.0,
    "nesterov": False,
    "optimizer": "sgd",
    "beta2": 0.999,
    "warmup": 0.0,
    "label_smoothing": 0.0,
}
SCHEDULES = ("constant", "cosine")
CHECK_EVERY = 100  # batches between looks at the loss, which wait for the device
FLOPS_SAMPLE = 4  # examples


class SupervisedTask:
    """Examples on a device, a network and a search space. Keys of the YAML that only the driver reads are ignored.

    Errors: UserError if the data are missing (with the command that fetches them) or ``precision`` is unknown.
    """

    mixed: ClassVar[bool] = False  # whether autocast pays
    defaults: ClassVar[Mapping[str, Any]] = {}  # of the family's own hyperparameters
    differentiable: ClassVar[tuple[str, ...]] = ("label_smoothing",)
    linear: ClassVar[tuple[str, ...]] = ("label_smoothing",)
    finite: ClassVar[tuple[str, ...]] = ()
    h: ClassVar[float | None] = None  # of the finite differences, in unit coordinates

    sizes: Mapping[str, int]
    flops_per_example: int

    def __init__(
        self,
        device: str,
        *,
        model: str,
        batch_size: int,
        max_epochs: int,
        space: str,
        spaces: Mapping[str, Any],
        schedule: str = "constant",
        precision: str = "auto",
        **_driver: Any,
    ):
        self.device, self.model, self.batch_size, self.max_epochs = torch.device(device), model, batch_size, max_epochs
        self.schedule = schedule
        self.space = Space.from_spec(spaces[space])
        self.autocast = autocast_dtype(precision, self.device, self.mixed)
        self.group: Group = ALONE

    # ---- for families

    def network(self, seed: int) -> nn.Module:
        """At its initial weights, which depend on ``seed`` alone (drawn on the CPU, the same on every device)."""
        raise NotImplementedError

    def batches(self, config: Mapping[str, Any], seed: int, epoch: int) -> Iterator[tuple[Any, Tensor]]:
        """This process's share of the training batches (inputs, labels) of the epoch after ``epoch``."""
        raise NotImplementedError

    def evaluation_batches(self, part: str) -> Iterator[tuple[Any, Tensor]]:
        """(inputs, labels) of all examples of a part."""
        raise NotImplementedError

    def sample(self, n: int) -> tuple[Any, Tensor]:
        """``n`` training examples, for counting FLOPs."""
        raise NotImplementedError

    def warm_batches(self, settings: "Settings", seed: int, step: int, dtype: torch.dtype) -> tuple[Any, Any]:
        """Two disjoint batches of ``settings.batch_size`` examples, from streams of their own; the second from the part
        ``settings.probe``. This process's shares."""
        raise NotImplementedError

    def train_loss(self, net: Callable[..., Tensor], batch: Any, config: Mapping[str, Any]) -> Tensor:
        """The trainer's mean loss on a batch of ``warm_batches``; ``config`` may hold 0-d tensors."""
        raise NotImplementedError

    def probe_loss(self, net: Callable[..., Tensor], batch: Any) -> Tensor:
        """The plain mean loss on a batch of ``warm_batches``."""
        raise NotImplementedError

    def forward(self, net: nn.Module, inputs: Any, config: Mapping[str, Any]) -> Tensor:
        """The network's output in training."""
        return net(inputs)

    def criterion(self, output: Tensor, labels: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The mean training loss; ``config`` may hold 0-d tensors."""
        return smoothed_cross_entropy(output, labels, config["label_smoothing"])

    def statistics(self, output: Tensor, labels: Tensor) -> Tensor:
        """What is summed over the examples of a part for ``scores``; any shape."""
        loss = F.cross_entropy(output.float(), labels, reduction="sum")
        return torch.stack([loss, (output.argmax(1) == labels).sum().to(loss.dtype)])

    def scores(self, statistics: Tensor, n: int) -> dict[str, float]:
        """``loss`` and ``score`` of a part of ``n`` examples (more keys are possible), from the sum of statistics."""
        loss, correct = statistics.tolist()
        return {"loss": loss / n, "score": correct / n}

    def kept(self, output: Tensor) -> Tensor:
        """What of a training batch's output ``train_score`` needs."""
        return output.detach()

    def train_score(self, kept: Sequence[Tensor], labels: Sequence[Tensor], loss: float) -> float:
        """The score on the epoch's training batches; ``loss``: their mean loss."""
        hits = (torch.cat(list(kept)).argmax(1) == torch.cat(list(labels))).float().mean()
        return float(self.group.total(hits)) / self.group.size

    # ---- for all

    def largest_warm_start(self, probe: str) -> int:
        """Two disjoint batches from the training part, or one from each part."""
        train, validation = self.sizes["train"], self.sizes["validation"]
        return train // 2 if probe == "train" else min(train, validation)

    def start(self, config: Mapping[str, Any], seed: int) -> "SupervisedRun":
        """A run at its initial weights, which depend on ``seed`` alone."""
        return SupervisedRun(self, config, seed)

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the defaults of all hyperparameters it does not have. Errors: UserError for a batch size that
        the training part has not, an unknown optimizer or schedule."""
        full = {**DEFAULTS, **self.defaults, "schedule": self.schedule, "batch_size": self.batch_size, **config}
        if full["batch_size"] > self.sizes["train"]:
            raise UserError(f"batch_size={full['batch_size']} is more than the {self.sizes['train']} training examples")
        if full["batch_size"] % self.group.size:
            raise UserError(
                f"batch_size={full['batch_size']} cannot be shared by task.gpus_per_trial={self.group.size}"
            )
        for name, words in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if full[name] not in words:
                raise UserError(f"{name} must be one of {', '.join(words)}, not {full[name]!r}")
        return full

    def steps_per_epoch(self, config: Mapping[str, Any]) -> int:
        """The last incomplete batch of an epoch is left out."""
        return self.sizes["train"] // config["batch_size"]

    def epoch_order(self, config: Mapping[str, Any], seed: int, epoch: int) -> Tensor:
        """The training examples of the epoch after ``epoch`` in their order, whole batches only, on the CPU."""
        generator = torch.Generator().manual_seed(torch_seed(seed, "batches", epoch))
        n = self.steps_per_epoch(config) * config["batch_size"]
        return torch.randperm(self.sizes["train"], generator=generator)[:n]

    def lr_factor(self, config: Mapping[str, Any], epoch: int, step: int) -> float:
        """Share of the learning rate at batch ``step`` of the epoch after ``epoch``: 1, or a half cosine that is 0 at
        ``max_epochs``; in the first ``warmup`` of all steps of ``max_epochs`` also a line from 0."""
        return scheduled(config["schedule"], config["warmup"], epoch + step / self.steps_per_epoch(config),
                         self.max_epochs, 1 / self.steps_per_epoch(config))  # fmt: skip

    def count_flops(self) -> int:
        """FLOPs of a training step per example, counted on 4: those of convolutions and matrix products (all that
        torch's counter counts) are proportional to the batch size. Attention counts as its plain matrix products. A
        family puts it into ``flops_per_example`` once it has its data; it takes seconds in a fresh process."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from harness.ohgw.cost import count_flops

        net, config = self.network(0), {**DEFAULTS, **self.defaults, "lr": 0.0}
        inputs, labels = self.sample(FLOPS_SAMPLE)

        def step() -> None:
            self.criterion(self.forward(net, inputs, config), labels, config).backward()

        with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
            return count_flops(step) // FLOPS_SAMPLE


class SupervisedRun:
    """One configuration in training on random batches."""

    def __init__(self, task: SupervisedTask, config: Mapping[str, Any], seed: int):
        torch.backends.cudnn.deterministic = True  # a resumed trial must equal an uninterrupted one bit for bit
        self.task, self.seed, self.epoch = task, seed, 0
        self.net = task.network(seed)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=task.autocast == torch.float16)
        self.reconfigure(config)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Train with ``config`` from now on; only before epoch 1, since it forgets the optimiser's state."""
        self.config = self.task.completed(config)
        self.optimizer = optimizer(self.net, self.config)

    def train_epoch(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Train one epoch; None (and a run to be thrown away) if ``should_stop`` said so before a batch.

        Errors: TrialFailed when the loss is not finite.
        """
        task, config = self.task, self.config
        self.net.train()
        losses: list[Tensor] = []
        kept: list[Tensor] = []
        labels: list[Tensor] = []
        with self._own_random_numbers():
            for inputs, answers in task.batches(config, self.seed, self.epoch):
                if task.group.any(should_stop()):
                    return None
                self._schedule(len(losses))
                with torch.autocast(task.device.type, task.autocast, enabled=task.autocast is not None):
                    output = task.forward(self.net, inputs, config)
                    loss = task.criterion(output, answers, config)
                self._step(loss)
                losses.append(loss.detach())
                kept.append(task.kept(output))
                labels.append(answers)
                if len(losses) % CHECK_EVERY == 0:
                    self._mean_loss(losses[-CHECK_EVERY:])
        if task.group.size > 1:
            task.group.average(running_statistics(self.net))
        self.epoch += 1
        mean = self._mean_loss(losses)
        flops = task.flops_per_example * config["batch_size"] * len(losses)
        return {"train_loss": mean, "train_score": task.train_score(kept, labels, mean), "flops": flops}

    @torch.inference_mode()
    def evaluate(self, part: str) -> dict[str, float]:
        """Mean loss and score on ``part`` ("validation" or "test") with BatchNorm's running statistics, no dropout."""
        task, group = self.task, self.task.group
        self.net.eval()
        total: Tensor | None = None
        for inputs, labels in task.evaluation_batches(part):
            mine = inputs.tensor_split(group.size)[group.rank], labels.tensor_split(group.size)[group.rank]
            if len(mine[0]):
                statistics = self._statistics(*mine)
                total = statistics if total is None else total + statistics
        if total is None:  # fewer examples than processes
            total = torch.zeros_like(self._statistics(inputs, labels))
        return task.scores(group.total(total), task.sizes[part])

    def _statistics(self, inputs: Any, labels: Tensor) -> Tensor:
        with torch.autocast(self.task.device.type, self.task.autocast, enabled=self.task.autocast is not None):
            output = self.net(inputs)
        return self.task.statistics(output, labels)

    def problem(self, settings: "Settings") -> "Problem":
        """What OHGW needs of this run at its initial weights. Its batches come from streams of their own.
        Errors: UserError if the task has fewer examples than it asks for."""
        from harness.ohgw import Problem, UpdateRule

        task, config = self.task, self.config
        dtype = next(self.net.parameters()).dtype
        n = settings.batch_size
        if n > task.largest_warm_start(settings.probe):
            raise UserError(f"a warm start on {n} examples needs more than this task has")
        if n % task.group.size:
            raise UserError(f"ohgw.batch_size={n} cannot be shared by task.gpus_per_trial={task.group.size}")
        decayed = {name for name, parameter in self.net.named_parameters() if models.decays(parameter)}
        movable = {kind: tuple(n for n in getattr(task, kind) if n in task.space)
                   for kind in ("differentiable", "linear", "finite")}  # fmt: skip
        return Problem(
            model=self.net,
            train_loss=lambda net, batch, z: task.train_loss(net, batch, {**config, **z}),
            probe_loss=task.probe_loss,
            draw=lambda step: task.warm_batches(settings, self.seed, step, dtype),
            update=UpdateRule(config["optimizer"], bool(config["nesterov"]), clip="clip"),
            decayed=decayed.__contains__,
            h=task.h,
            average=task.group.average if task.group.size > 1 else None,
            **movable,
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights, BatchNorm, the optimiser and the epoch; hyperparameters belong to the configuration."""
        return {"epoch": self.epoch, "net": self.net.state_dict(), "optimizer": self.optimizer.state,
                "scaler": self.scaler.state_dict()}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        for tensor, saved in zip(self.optimizer.state, state["optimizer"], strict=True):
            tensor.copy_(saved)
        self.scaler.load_state_dict(state["scaler"])

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """What the network draws in this epoch (dropout) comes from a stream of its own."""
        device = self.task.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(torch_seed(self.seed, "network", self.epoch, self.task.group.rank))
            yield

    def _step(self, loss: Tensor) -> None:
        """Backward pass and update."""
        optimizer, group = self.optimizer, self.task.group
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if group.size > 1:
            group.average([p.grad for p in optimizer.parameters if p.grad is not None])
        if optimizer.clip is not None:
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
            optimizer.clip_gradients()
        self.scaler.step(optimizer)  # type: ignore[arg-type]
        self.scaler.update()

    def _schedule(self, step: int) -> None:
        """Set the learning rate of batch ``step`` of this epoch."""
        self.optimizer.lr = self.config["lr"] * self.task.lr_factor(self.config, self.epoch, step)

    def _mean_loss(self, losses: Sequence[Tensor]) -> float:
        """The mean of ``losses`` over all processes; waits for the device. Errors: TrialFailed if it is not finite."""
        group = self.task.group
        mean = float(group.total(torch.stack(list(losses)).mean())) / group.size
        if not math.isfinite(mean):
            raise TrialFailed(f"training loss is {mean}")
        return mean


def running_statistics(net: nn.Module) -> list[Tensor]:
    """Means and variances that BatchNorm and its kin keep for evaluation."""
    layers = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [b for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None]


def scheduled(schedule: str, warmup: float, time: float, end: float, step: float) -> float:
    """Share of the learning rate at ``time`` of ``end`` (both in epochs, a batch taking ``step``): 1 or, for "cosine",
    a half cosine that is 0 at ``end`` (Loshchilov & Hutter 2017); times a line that reaches 1 after the share
    ``warmup`` of ``end`` and is not 0 at the first batch (Goyal et al. 2017)."""
    factor = 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * time / end))
    return factor * min(1.0, (time + step) / (warmup * end)) if warmup > 0 else factor


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """``F.cross_entropy(logits, labels, label_smoothing=smoothing)``, also when a gradient in it is wanted."""
    if not isinstance(smoothing, Tensor):
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    log_p = F.log_softmax(logits, dim=1)
    return (1 - smoothing) * F.nll_loss(log_p, labels) - smoothing * log_p.mean()


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
