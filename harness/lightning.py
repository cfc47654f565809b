"""One-shot hyper-gradient warm-starts for PyTorch Lightning: ``Trainer(callbacks=[OHGWCallback(space, settings)])``.

    space = {"lr": loguniform(1e-3, 1.0), "weight_decay": loguniform(1e-6, 1e-2)}   # Syne Tune's, or a Space
    callback = OHGWCallback(space, Settings(step="normalized", eta=0.1))
    Trainer(callbacks=[callback]).fit(module, loader)
    callback.record()                             # what to report to the tuner as "warm_start"

Needs the package lightning (``pip install 'ohgw-harness[lightning]'``). ``scripts/example_lightning.py`` is an example.

The module holds its hyperparameters in ``self.hparams`` (``save_hyperparameters()``) and reads them from there, in
``configure_optimizers`` and ``training_step`` alike. The warm start runs in ``on_train_start``, when the weights are at
their initial values on their device and no batch has been trained on. It draws two batches, calls ``training_step`` on
them with other weights and hyperparameters, writes x' into ``module.hparams`` and has the optimizer and its schedulers
configured anew. It leaves no other trace: weights, buffers, metrics and other attributes of the module, the order of
the data and all random states are afterwards what they were, nothing that ``training_step`` logs is kept, and with
``eta=0`` the fit is bit for bit the one without the callback.

x' is in the module's hyperparameters in every checkpoint, its record in the callback's state: a fit resumed from a
checkpoint goes on with x' and is not warm-started again. Loggers get the record as hyperparameter ``warm_start``; the
module's initial hyperparameters, which Lightning logs itself before training, remain x.

Not covered: hyperparameters of a datamodule; those of which a submodule was given a copy; other hooks that transform a
batch in training (``on_train_batch_start``); what ``training_step`` sends to a logger other than by ``self.log``.
"""

import contextlib
import copy
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from backends.context import UserError
from harness.ohgw import Batch, MissingGradient, Net, Problem, Settings, UpdateRule, WarmStart, warm_start
from harness.seeds import rng, torch_seed
from harness.space import Float, Space

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities import rank_zero_warn
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lightning":
        raise
    raise ImportError(
        "harness.lightning needs the package lightning; install it with: pip install 'ohgw-harness[lightning]'"
    ) from None

NAMES = {  # of the hyperparameters that the optimizer takes, in order of preference
    "lr": ("lr", "learning_rate"),
    "wd": ("wd", "weight_decay"),
    "momentum": ("momentum", "beta1"),
}
OWN = frozenset(vars(nn.Module()))  # torch's own attributes, which functional_call looks after
KINDS: dict[type, Any] = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}


class OHGWCallback(Callback):
    """Warm-starts the hyperparameters of ``space`` in ``module.hparams`` before the first training batch.

    ``space``: a ``Space`` or Syne Tune's ``config_space``. ``update``: the optimizer's rule; None infers it from what
    ``configure_optimizers`` returned (torch's SGD, Adam or AdamW), with the trainer's clip of the gradient's norm; the
    names it looks for in ``space`` are ``lr`` or ``learning_rate``, ``wd`` or ``weight_decay``, and ``momentum`` or
    ``beta1``; what is not in the space is a constant. A weight is decayed if its group's decay is positive (all are, if
    none is). ``differentiable``, ``linear``, ``finite``: further hyperparameters that ``training_step`` reads from
    ``self.hparams``, as in ``Problem``; where a derivative is taken it sees 0-d tensors. (torch's own
    ``cross_entropy(label_smoothing=...)`` takes numbers only: name it in ``finite``, or write the loss out. A missing
    gradient gives way to finite differences of all coordinates, as the record and a warning tell.)

    The probe loss is ``training_step`` with those further hyperparameters at 0, or at the value ``plain`` gives them,
    or the module's method called ``probe_step``, with the arguments and result of a ``training_step``. Batches of
    ``settings.batch_size`` examples come from the data set and ``collate_fn`` of the trainer's loader (``settings.probe
    == "val"``: the second one from that of validation), chosen by ``seed``, which all random draws derive from; or from
    ``draw(step) -> (B, B')``, on the CPU, which a loader over an iterable data set or with a sampler of its own needs.

    One process, or several with the strategy ddp: each then takes its share of the batches, estimates are averaged and
    all train with the first one's x'. Other strategies shard the weights and are refused.

    Errors: UserError for anything of this that does not fit the module, the trainer or each other."""

    def __init__(
        self,
        space: Space | Mapping[str, Any],
        settings: Settings,
        update: UpdateRule | None = None,
        *,
        differentiable: Sequence[str] = (),
        linear: Sequence[str] = (),
        finite: Sequence[str] = (),
        plain: Mapping[str, float] | None = None,
        probe_step: str = "training_step",
        draw: Callable[[int], tuple[Batch, Batch]] | None = None,
        seed: int = 0,
    ):
        self.space = space if isinstance(space, Space) else Space.from_config_space(space)
        self.settings, self.update, self.draw, self.seed = settings, update, draw, seed
        self.differentiable, self.linear, self.finite = tuple(differentiable), tuple(linear), tuple(finite)
        self.plain = {**dict.fromkeys((*self.differentiable, *self.finite), 0.0), **(plain or {})}
        self.probe_step = probe_step
        self.result: WarmStart | None = None
        """What this process did; None before the fit and after a resumed one."""
        self._record: dict[str, Any] | None = None
        for argument in ("differentiable", "finite", "plain"):
            self._check_names(argument, getattr(self, argument), tuple(self.space.continuous))
        self._check_names("settings.mask", settings.mask, tuple(self.space.continuous))
        self._check_names("linear", self.linear, self.differentiable)

    def record(self) -> dict[str, Any] | None:
        """``WarmStart.record()`` of the trial, also of a resumed one; None if it was not warm-started."""
        return copy.deepcopy(self._record)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.settings.estimator == "off":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
            raise UserError(
                f"OHGWCallback needs all weights in every process, which {type(strategy).__name__} does not keep; "
                "possible: one device, or strategy='ddp'"
            )
        if not pl_module.automatic_optimization:
            raise UserError(
                "OHGWCallback calls training_step without updating the weights, which manual optimization does there; "
                "possible: automatic_optimization = True"
            )
        self._config(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.settings.estimator == "off":
            return
        if self._record is not None:
            return self._check_same(pl_module, self._record)
        if trainer.global_step > 0:
            return rank_zero_warn("OHGWCallback: no warm start, since training has already begun without one")
        optimizer = _optimizer(trainer)
        with _isolated_rng(pl_module.device), _only_optimized(pl_module, optimizer):
            _seed(torch_seed(self.seed, "warm_start"))
            problem = self._problem(trainer, pl_module, optimizer)
            direction = rng(self.seed, "warm_start", "direction")
            self.result = warm_start(self._config(pl_module), self.space, problem, self.settings, direction)
            self._record = trainer.strategy.broadcast(self.result.record())
            if self._record["x_prime"] != self._record["x"]:
                self._train_with(trainer, pl_module, self._record["x_prime"])
        if self._record["fallback"]:
            rank_zero_warn(f"OHGWCallback used the estimator {self._record['estimator']}: {self._record['fallback']}")
        for logger in trainer.loggers:
            logger.log_hyperparams({"warm_start": self.record()})

    def state_dict(self) -> dict[str, Any]:
        return {} if self._record is None else {"warm_start": self.record()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._record = state_dict.get("warm_start")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give the module x' before its optimizer is configured."""
        record = checkpoint["callbacks"].get(self.state_key, {}).get("warm_start")
        if record is not None:
            pl_module.hparams.update(record["x_prime"])

    def _problem(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> Problem:
        narrow = {p.dtype for p in module.parameters() if p.requires_grad} - {torch.float32, torch.float64}
        if narrow:
            raise UserError(
                f"OHGWCallback needs weights in float32 or float64, not in {narrow.pop()}; possible: "
                "Trainer(precision='bf16-mixed'), which keeps the weights in float32"
            )
        steps = _Steps(module)
        decaying = [group["params"] for group in optimizer.param_groups if group.get("weight_decay", 0.0) > 0.0]
        decayed = {id(p) for params in decaying for p in params} or {id(p) for p in module.parameters()}
        decayed_names = {name for name, p in steps.named_parameters() if id(p) in decayed}

        def train_loss(net: Net, batch: Batch, z: Mapping[str, Tensor]) -> Tensor:
            # numbers where no gradient is asked for: many functions take nothing else
            values = {name: value if value.requires_grad else value.item() for name, value in z.items()}
            try:
                return net("training_step", batch, values)
            except TypeError as error:
                if "Tensor" in str(error) and any(value.requires_grad for value in z.values()):
                    raise MissingGradient(f"missing gradient in {', '.join(z)}: {error}") from error
                raise

        def probe_loss(net: Net, batch: Batch) -> Tensor:
            return net(self.probe_step, batch, self.plain)

        return Problem(
            model=steps,
            train_loss=train_loss,
            probe_loss=probe_loss,
            draw=lambda step: self._batches(trainer, module, step),
            update=self.update or _inferred(trainer, optimizer, self.space, self._config(module)),
            decayed=decayed_names.__contains__,
            differentiable=self.differentiable,
            linear=self.linear,
            finite=self.finite,
            average=_average if trainer.world_size > 1 else None,
        )

    def _train_with(self, trainer: Trainer, module: LightningModule, config: Mapping[str, Any]) -> None:
        """Write ``config`` into the module and configure its optimizer anew."""
        module.hparams.update(config)
        trainer.strategy.setup_optimizers(trainer)
        if self.update is None:  # refuses an optimizer that did not take the hyperparameters from module.hparams
            _inferred(trainer, _optimizer(trainer), self.space, self._config(module))

    def _config(self, module: LightningModule) -> dict[str, Any]:
        """The configuration in ``module.hparams``."""
        hparams = module.hparams
        if not isinstance(hparams, dict):
            raise UserError(
                f"OHGWCallback cannot put hyperparameters into a {type(hparams).__name__}; call "
                "self.save_hyperparameters() without arguments, or with a dictionary"
            )
        names = [*self.space, *(name for name in (self.update.names if self.update else ()) if name in hparams)]
        missing = [name for name in names if name not in hparams]
        if self.update and isinstance(self.update.lr, str) and self.update.lr not in hparams:
            missing.append(self.update.lr)
        if missing:
            raise UserError(
                f"{type(module).__name__} has no hyperparameter {', '.join(dict.fromkeys(missing))} in self.hparams, "
                f"which has {', '.join(map(str, hparams)) or 'none'}; call self.save_hyperparameters() in __init__"
            )
        for name, domain in self.space.continuous.items():
            _check_value(name, hparams[name], domain)
        return {name: hparams[name] for name in names}

    def _batches(self, trainer: Trainer, module: LightningModule, step: int) -> tuple[Batch, Batch]:
        """(B, B') of that step on the module's device; of several processes, this one's shares."""
        _seed(torch_seed(self.seed, "warm_start", step))
        pair = self.draw(step) if self.draw else self._drawn(trainer, step)
        return _to_device(trainer, module, pair[0]), _to_device(trainer, module, pair[1])

    def _drawn(self, trainer: Trainer, step: int) -> tuple[Batch, Batch]:
        n, world = self.settings.batch_size, trainer.world_size
        if n % world:
            raise UserError(f"a warm start on {n} examples cannot be shared by {world} processes; make it a multiple")
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "warm_start", "batches", step))
        own = slice(trainer.global_rank, None, world)
        train = trainer.train_dataloader
        if self.settings.probe == "train":
            rows = _rows(train, 2 * n, generator, "train")
            return _batch(train, rows[:n][own]), _batch(train, rows[n:][own])
        first = _batch(train, _rows(train, n, generator, "train")[own])
        validation = trainer.val_dataloaders
        return first, _batch(validation, _rows(validation, n, generator, "validation")[own])

    def _check_same(self, module: LightningModule, record: Mapping[str, Any]) -> None:
        """Raise UserError if ``module`` is not the one that was warm-started."""
        x_prime = record["x_prime"]
        changed = [name for name in x_prime if module.hparams.get(name) != x_prime[name]]
        if changed:
            raise UserError(
                f"this OHGWCallback has warm-started another module (self.hparams differs in {', '.join(changed)}); "
                "give every trial a callback of its own"
            )

    @staticmethod
    def _check_names(argument: str, names: Any, possible: tuple[str, ...]) -> None:
        unknown = [name for name in names if name not in possible]
        if unknown:
            raise UserError(
                f"OHGWCallback: {argument} names {', '.join(unknown)}; possible: {', '.join(possible) or 'none'}"
            )


class _Steps(nn.Module):
    """A LightningModule whose forward pass is one of its steps; the step leaves no trace on the module."""

    def __init__(self, module: LightningModule):
        super().__init__()
        self.module = module

    def forward(self, step: str, batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
        """The loss that the method ``step`` returns for ``batch`` under ``hyperparameters``."""
        module = self.module
        with _isolated_rng(module.device), _untouched(module):
            vars(module).update(log=_silent, log_dict=_silent)
            module.hparams.update(hyperparameters)
            method = getattr(module, step, None)
            if method is None:
                raise UserError(f"{type(module).__name__} has no method {step}")
            has_index = is_param_in_hook_signature(method, "batch_idx", min_args=2)
            output = method(batch, 0) if has_index else method(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(f"{type(module).__name__}.{step} must return a loss of one element, got {type(loss)}")
        return loss.reshape(())


def _silent(*args: Any, **kwargs: Any) -> None:
    """In place of ``self.log``."""


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """The attributes of all submodules (lists, dictionaries and tensors such as a metric's state) are copies inside,
    and the originals again outside. Parameters and buffers are left to torch."""
    kept = [(vars(part), dict(vars(part))) for part in module.modules()]
    for attributes, originals in kept:
        attributes.update({name: _copied(value) for name, value in originals.items() if name not in OWN})
    try:
        yield
    finally:
        for attributes, originals in kept:
            attributes.clear()
            attributes.update(originals)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):  # one that requires a gradient is part of the graph and cannot be changed in place
        return value if value.requires_grad else value.clone()
    if isinstance(value, list) and all(isinstance(item, Tensor) for item in value):
        return [_copied(item) for item in value]
    return copy.copy(value) if isinstance(value, list | dict | set | deque) else value


@contextlib.contextmanager
def _isolated_rng(device: torch.device) -> Iterator[None]:
    """Python's, numpy's and torch's global random states are afterwards what they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _seed(seed: int) -> None:
    """Seed the global random states, which data sets and training steps draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextlib.contextmanager
def _only_optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Weights that the optimizer does not have are constants inside."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in moved]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _average(tensors: list[Tensor]) -> None:
    """Replace the tensors by their means over the processes."""
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()


def _check_value(name: str, value: Any, domain: Float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not domain.lower <= value <= domain.upper:
        raise UserError(
            f"hyperparameter {name} must be a number in [{domain.lower}, {domain.upper}], its range in the search "
            f"space; self.hparams has {value!r}"
        )


# ---- the optimizer


def _optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    if len(trainer.optimizers) != 1:
        raise UserError(f"OHGWCallback needs a module with one optimizer, this one has {len(trainer.optimizers)}")
    return trainer.optimizers[0]


def _inferred(
    trainer: Trainer, optimizer: torch.optim.Optimizer, space: Space, config: Mapping[str, Any]
) -> UpdateRule:
    """The rule of ``optimizer``. Errors: UserError if there is none, or if the optimizer's values are not those of the
    hyperparameters in ``config``, to the last digits but five of float32."""
    kind: Any = KINDS.get(type(optimizer))
    groups = optimizer.param_groups
    if kind is None or any(group.get("dampening") or group.get("maximize") for group in groups):
        raise UserError(
            f"OHGWCallback does not know the update of {type(optimizer).__name__} as configured; possible: SGD without "
            "dampening, Adam and AdamW of torch.optim, or update=UpdateRule(...) with the nearest of them"
        )
    if kind == "adam" and groups[0].get("decoupled_weight_decay"):
        kind = "adamw"
    decays = {float(group["weight_decay"]) for group in groups}
    momenta = {float(group["momentum"] if kind == "sgd" else group["betas"][0]) for group in groups}
    # a scheduler starts at a share of the learning rate and keeps what it is a share of
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    values = {"lr": rates, "wd": decays - {0.0} or {0.0}, "momentum": momenta}
    found = {role: _named(role, values[role], space, config) for role in values}
    return UpdateRule(
        kind, any(group.get("nesterov") for group in groups), **found, clip=_clip(trainer), eps=groups[0].get("eps", 0)
    )


def _named(role: str, values: set[float], space: Space, config: Mapping[str, Any]) -> str | float:
    """The hyperparameter that is the optimizer's ``role``, which has ``values`` in its groups; else the value."""
    if len(values) > 1:
        raise UserError(
            f"the optimizer's parameter groups have several values of {role} ({', '.join(map(str, sorted(values)))}); "
            "possible: one value (decay: one and 0), or update=UpdateRule(...)"
        )
    [value] = values
    name = next((name for name in NAMES[role] if name in space.continuous), None)
    if name is None:
        return value
    if not math.isclose(config[name], value, rel_tol=1e-5, abs_tol=1e-12):
        raise UserError(
            f"self.hparams.{name} is {config[name]} but the optimizer has {value}: configure_optimizers must pass "
            f"self.hparams.{name} on as it is, or give OHGWCallback the rule in update=UpdateRule(...)"
        )
    return name


def _clip(trainer: Trainer) -> float:
    """The largest norm of the gradient."""
    if not trainer.gradient_clip_val:
        return math.inf
    if trainer.gradient_clip_algorithm not in (None, "norm"):
        raise UserError(
            "OHGWCallback follows a clip of the gradient's norm, not of its values; possible: "
            "Trainer(gradient_clip_algorithm='norm'), or update=UpdateRule(...)"
        )
    return float(trainer.gradient_clip_val)


# ---- the data


def _rows(loader: Any, n: int, generator: torch.Generator, which: str) -> list[int]:
    """``n`` different examples of the loader's data set, drawn as its sampler draws them, without touching it."""
    advice = "give OHGWCallback batches by draw=..."
    if not isinstance(loader, DataLoader):
        raise UserError(f"OHGWCallback needs one {which} DataLoader, got {type(loader).__name__}; or {advice}")
    if isinstance(loader.dataset, IterableDataset) or type(loader.batch_sampler) is not BatchSampler:
        raise UserError(
            f"OHGWCallback cannot draw from a {which} DataLoader over an iterable data set, or with a batch sampler of "
            f"its own; {advice}"
        )
    rows = _permuted(loader.sampler, len(loader.dataset), generator)  # type: ignore[arg-type]
    if rows is None:
        raise UserError(f"OHGWCallback cannot draw as a {type(loader.sampler).__name__} does; {advice}")
    if n > len(rows):
        raise UserError(
            f"a warm start needs {n} different examples and the {which} DataLoader has {len(rows)}; possible: a "
            "smaller Settings.batch_size"
        )
    return rows[:n]


def _permuted(sampler: Any, size: int, generator: torch.Generator) -> list[int] | None:
    """All examples that ``sampler`` may draw, in an order it could draw them in; None for an unknown sampler."""
    kind = type(sampler)
    if kind in (RandomSampler, SequentialSampler, DistributedSampler):
        return torch.randperm(size, generator=generator).tolist()
    if kind is SubsetRandomSampler:
        indices = list(sampler.indices)
        return [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    if kind is WeightedRandomSampler:
        possible = int((sampler.weights > 0).sum())
        return torch.multinomial(sampler.weights, possible, replacement=False, generator=generator).tolist()
    return None


def _batch(loader: Any, rows: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)  # or the loader would draw a seed from the global state
    chosen = Subset(loader.dataset, rows)
    [batch] = DataLoader(chosen, batch_size=len(rows), collate_fn=loader.collate_fn, generator=generator)
    return batch


def _to_device(trainer: Trainer, module: LightningModule, batch: Batch) -> Batch:
    """What Lightning's training loop does to a batch, its transfer hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
