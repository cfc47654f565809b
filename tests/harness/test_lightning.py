"""harness/lightning.py: the warm start of a LightningModule, and scripts/example_lightning.py, which uses it."""

import ast
import copy
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

pytest.importorskip("lightning")

import torchmetrics
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from backends.context import UserError
from harness.lightning import OHGWCallback
from harness.ohgw import Problem, Settings, UpdateRule, warm_start
from harness.seeds import torch_seed
from harness.space import Categorical, Float, Space

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "scripts" / "example_lightning.py"
SPACE = Space(
    {
        "lr": Float(1e-3, 1.0, log=True),
        "weight_decay": Float(1e-6, 1e-1, log=True),
        "momentum": Float(0.0, 0.99),
        "label_smoothing": Float(0.0, 0.3),
        "width": Categorical((8, 16)),
    }
)
X = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.6, "label_smoothing": 0.1, "width": 16}
SETTINGS = Settings(step="normalized", eta=0.1, batch_size=8)
Z: dict[str, Any] = {"differentiable": ("label_smoothing",), "linear": ("label_smoothing",)}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Net(LightningModule):
    """An MLP with batch normalisation, a metric, an attribute that it changes and random draws in its training step."""

    def __init__(
        self,
        lr: float = 0.1,
        weight_decay: float = 0.01,
        momentum: float = 0.6,
        label_smoothing: float = 0.1,
        width: int = 16,
        optimizer: str = "sgd",
    ):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))
        self.accuracy = torchmetrics.MeanMetric()
        self.losses: list[float] = []
        self.inputs: list[float] = []
        self.seen = torch.zeros(())
        self.noise = 0.1

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits, smoothing = self.net(x), self.hparams["label_smoothing"]
        return (1 - smoothing) * nnf.cross_entropy(logits, y) - smoothing * logits.log_softmax(1).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen += len(x)
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        x = x + self.noise * noise * torch.linspace(0, 1, len(x))[:, None]  # one shift for all would be normalised away
        self.inputs.append(x.sum().item())
        loss = self.loss(x, y)
        self.accuracy.update(loss.detach())
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        h = self.hparams
        if h["optimizer"] == "sgd":
            return torch.optim.SGD(
                self.parameters(), h["lr"], h["momentum"], weight_decay=h["weight_decay"], nesterov=True
            )
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rprop": torch.optim.Rprop}[h["optimizer"]]
        rest = {} if h["optimizer"] == "rprop" else {"weight_decay": h["weight_decay"], "betas": (h["momentum"], 0.999)}
        return kind(self.parameters(), lr=h["lr"], **rest)


def data(n: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **{**defaults, **quiet, **options}
    )


def net(kind: type[Net] = Net, **hyperparameters: Any) -> Net:
    seed_everything(3, verbose=False)
    return kind(**{**X, **hyperparameters})


def fit(folder: Path, callback: Any = None, module: Net | None = None, loader: Any = None, **options: Any) -> Net:
    module = module or net()
    loader = DataLoader(data(), 4, shuffle=True) if loader is None else loader
    trainer(folder, *([callback] if callback else []), **options).fit(module, loader)
    return module


def callback(settings: Settings = SETTINGS, **options: Any) -> OHGWCallback:
    return OHGWCallback(SPACE, settings, **{**Z, **options})


# ---- the gradient


def by_hand(module: Net, rule: UpdateRule, settings: Settings = SETTINGS) -> Any:
    """The warm start of the same problem without Lightning (and without noise in the training step)."""
    tensors = [part.double() if part.is_floating_point() else part for part in data().tensors]

    def draw(step: int) -> Any:
        generator = torch.Generator().manual_seed(torch_seed(0, "warm_start", "batches", step))
        rows = torch.randperm(40, generator=generator)[: 2 * settings.batch_size]
        first, second = rows.split(settings.batch_size)
        return [t[first] for t in tensors], [t[second] for t in tensors]

    def loss(model: Any, batch: Any, smoothing: Any) -> Tensor:
        log_p = model(batch[0]).log_softmax(1)
        return (1 - smoothing) * nnf.nll_loss(log_p, batch[1]) - smoothing * log_p.mean()

    problem = Problem(
        model=module.net,
        train_loss=lambda model, batch, z: loss(model, batch, z["label_smoothing"]),
        probe_loss=lambda model, batch: loss(model, batch, 0.0),
        draw=draw,
        update=rule,
        **Z,
    )
    return warm_start(X, SPACE, problem, settings)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_warm_start_is_that_of_the_same_problem_by_hand(optimizer: str, clip: float | None, tmp_path: Path):
    module = net(optimizer=optimizer)
    module.noise = 0.0
    kind: Any = optimizer
    nesterov = optimizer == "sgd"
    rule = UpdateRule(kind, nesterov=nesterov, wd="weight_decay", clip=clip or math.inf)
    expected = by_hand(copy.deepcopy(module).double(), rule)
    warm = callback()
    fit(tmp_path, warm, module, precision="64-true", gradient_clip_val=clip)
    assert warm.result is not None
    assert warm.result.estimator == "lookahead"
    assert warm.result.fallback is None
    assert warm.result.loss == pytest.approx(expected.loss, rel=1e-12)
    assert set(expected.gradient) == {"lr", "weight_decay", "momentum", "label_smoothing"}
    for name, slope in expected.gradient.items():
        assert warm.result.gradient[name] == pytest.approx(slope, rel=1e-10, abs=1e-14)
        assert slope != 0.0 or (name == "momentum" and optimizer != "sgd")
    assert warm.result.config == pytest.approx(expected.config, rel=1e-10)


def test_the_gradient_is_the_difference_quotient_under_noise(tmp_path: Path):
    results = []
    for estimator in ("lookahead", "finite_difference"):
        settings = Settings(estimator=estimator, batch_size=8)  # type: ignore[arg-type]
        warm = callback(settings)
        fit(tmp_path, warm, precision="64-true")
        results.append(warm.result.gradient)  # type: ignore[union-attr]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert abs(results[0]["label_smoothing"]) > 1e-6


# ---- what it does to the fit


def test_training_goes_on_with_x_prime(tmp_path: Path):
    warm = callback()
    module = fit(tmp_path, warm)
    assert warm.result is not None
    x_prime = warm.result.config
    assert all(x_prime[name] != X[name] for name in SPACE.continuous)
    assert x_prime["width"] == X["width"]
    assert {name: module.hparams[name] for name in X} == x_prime
    [group] = module.optimizers().param_groups  # type: ignore[union-attr]
    assert (group["lr"], group["weight_decay"]) == (x_prime["lr"], x_prime["weight_decay"])
    vanilla = fit(tmp_path, module=net(**x_prime))
    assert_same(module, vanilla)


def test_an_eta_of_zero_leaves_the_fit_bit_for_bit(tmp_path: Path):
    warm = callback(Settings(eta=0.0, batch_size=8))
    states = []
    for each in (warm, None):
        module = fit(tmp_path, each, max_epochs=2)
        rng = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index] # noqa: NPY002
        states.append((module, rng))
    assert warm.result is not None
    assert warm.result.estimator == "lookahead"
    assert warm.result.config == warm.result.x
    assert_same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def assert_same(a: Net, b: Net) -> None:
    """Weights, buffers, metric, attributes and all losses are equal to the last bit."""
    assert a.losses == b.losses
    assert len(a.losses) > 0
    assert a.seen == b.seen
    assert a.accuracy.compute() == b.accuracy.compute()
    assert set(vars(a)) == set(vars(b))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_the_move_disturbs_neither_the_order_of_the_data_nor_random_draws(tmp_path: Path):
    moved, vanilla = fit(tmp_path, callback(), max_epochs=2), fit(tmp_path, max_epochs=2)
    assert moved.losses[-1] != vanilla.losses[-1]
    assert moved.inputs == vanilla.inputs
    assert len(set(moved.inputs)) == 20


def test_n_steps_and_the_random_estimator(tmp_path: Path):
    several = callback(Settings(step="normalized", eta=0.02, n_steps=3, batch_size=8))
    fit(tmp_path, several)
    scattered = [callback(Settings(estimator="random", step="normalized", eta=0.1, batch_size=8)) for _ in range(2)]
    for each in scattered:
        fit(tmp_path, each)
    records = [each.record() for each in (several, *scattered)]
    assert records[0] is not None
    assert records[1] is not None
    assert records[2] is not None
    assert records[0]["n_steps"] == 3
    assert records[1]["length"] == pytest.approx(0.1)
    assert records[1]["x_prime"] == records[2]["x_prime"]


def test_the_estimator_off_does_nothing(tmp_path: Path):
    warm = callback(Settings(estimator="off"))
    assert_same(fit(tmp_path, warm), fit(tmp_path))
    assert warm.record() is None


def test_weights_outside_the_optimizer_are_constants(tmp_path: Path):
    class HeadOnly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[3].parameters(), self.hparams["lr"], weight_decay=1e-3)

    space = Space({"lr": SPACE["lr"]})
    losses = []
    for frozen in (False, True):
        module = net(HeadOnly)
        module.net[0].requires_grad_(not frozen)
        module.net[1].requires_grad_(not frozen)
        warm = OHGWCallback(space, SETTINGS)
        fit(tmp_path, warm, module)
        assert warm.result is not None
        losses.append((warm.result.loss, warm.result.gradient))
        assert all(p.requires_grad == (not frozen) for p in module.net[0].parameters())
    assert losses[0] == losses[1]


def test_decay_of_some_weights_only(tmp_path: Path):
    class Grouped(Net):
        def configure_optimizers(self) -> Any:
            h = self.hparams
            groups = [
                {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": h["weight_decay"]},
                {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.SGD(groups, h["lr"], h["momentum"])
            return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1)]

    results = []
    for estimator in ("lookahead", "finite_difference"):
        warm = callback(Settings(estimator=estimator, batch_size=8))  # type: ignore[arg-type]
        fit(tmp_path, warm, net(Grouped), precision="64-true")
        results.append(warm.result.gradient)  # type: ignore[union-attr]
    everywhere = callback(Settings(batch_size=8))
    fit(tmp_path, everywhere, precision="64-true")
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert everywhere.result is not None
    assert everywhere.result.gradient["weight_decay"] != pytest.approx(results[0]["weight_decay"], rel=1e-3)


# ---- label smoothing that autograd cannot reach


class TorchsSmoothing(Net):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nnf.cross_entropy(self.net(x), y, label_smoothing=self.hparams["label_smoothing"])


class NumbersOnly(Net):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nnf.cross_entropy(self.net(x), y, label_smoothing=float(self.hparams["label_smoothing"]))


@pytest.mark.parametrize("kind", [TorchsSmoothing, NumbersOnly])
def test_a_missing_gradient_falls_back_to_finite_differences_and_says_so(kind: type[Net], tmp_path: Path):
    warm, exact = callback(), callback()
    with pytest.warns(UserWarning, match="finite_difference: lookahead: missing gradient"):
        fit(tmp_path, warm, net(kind), precision="64-true")
    fit(tmp_path, exact, precision="64-true")
    record = warm.record()
    assert record is not None
    assert record["estimator"] == "finite_difference"
    assert "label_smoothing" in record["fallback"]
    assert exact.result is not None
    assert record["gradient"] == pytest.approx(exact.result.gradient, rel=1e-6)


def test_finite_differences_of_one_hyperparameter_are_no_fallback(tmp_path: Path):
    warm, exact = callback(differentiable=(), linear=(), finite=("label_smoothing",)), callback()
    fit(tmp_path, warm, net(TorchsSmoothing), precision="64-true")
    fit(tmp_path, exact, precision="64-true")
    assert warm.result is not None
    assert exact.result is not None
    assert warm.result.fallback is None
    assert warm.result.gradient == pytest.approx(exact.result.gradient, rel=1e-6)


# ---- the probe


def test_the_probe_is_without_smoothing_or_with_what_plain_says_or_a_method(tmp_path: Path):
    class Probed(Net):
        def probe_loss(self, batch: Any) -> dict[str, Tensor]:
            return {"loss": self.loss(*batch)}

    losses = {}
    variants: dict[str, dict[str, Any]] = {
        "default": {},
        "zero": {"plain": {"label_smoothing": 0.0}},
        "smooth": {"plain": {"label_smoothing": 0.3}},
        "method": {"probe_step": "probe_loss"},
    }
    for name, options in variants.items():
        module = net(Probed)
        module.noise = 0.0
        warm = callback(**options)
        fit(tmp_path, warm, module)
        losses[name] = warm.result.loss  # type: ignore[union-attr]
    assert losses["default"] == losses["zero"] == losses["method"]
    assert losses["smooth"] != losses["default"]


def test_the_probe_may_come_from_the_validation_data(tmp_path: Path):
    drawn: list[Any] = []

    class Spied(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(*batch))

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            drawn.append(batch[0])
            return batch

    x, y = data()[:12]
    validation = TensorDataset(x + 100, y)
    warm = callback(Settings(step="normalized", eta=0.1, batch_size=8, probe="val"))
    run = trainer(tmp_path, warm, num_sanity_val_steps=0, limit_train_batches=1, limit_val_batches=0.5)
    run.fit(net(Spied), DataLoader(data(), 4), DataLoader(validation, 4))
    assert [len(x) for x in drawn[:2]] == [8, 8]
    assert drawn[0].max() < 50 < drawn[1].min()


# ---- the data


class Recorded(TensorDataset):
    """A data set that notes which examples were asked for."""

    asked: list[int]

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(int(index))
        return super().__getitem__(index)


def asked(tmp_path: Path, batch_size: int = 8, **options: Any) -> list[int]:
    dataset = Recorded(*data().tensors)
    dataset.asked = []
    warm = callback(Settings(step="normalized", eta=0.1, batch_size=batch_size))
    loader = DataLoader(dataset, 4, **options)
    before: list[int] = []

    class Noting(Net):
        def configure_optimizers(self) -> Any:
            before[:] = dataset.asked  # the last time: after the batches of the warm start were drawn
            return super().configure_optimizers()

    fit(tmp_path, warm, net(Noting), loader, max_steps=1)
    return before[-2 * batch_size :]


def test_the_two_batches_are_disjoint_and_follow_the_sampler(tmp_path: Path):
    assert len(set(asked(tmp_path))) == 16
    assert asked(tmp_path) == asked(tmp_path, shuffle=True)
    subset = SubsetRandomSampler(list(range(20, 40)), generator=torch.Generator().manual_seed(0))
    assert min(asked(tmp_path, sampler=subset)) >= 20
    weights = torch.cat([torch.zeros(22), torch.ones(18)])
    weighted = asked(tmp_path, sampler=WeightedRandomSampler(weights.tolist(), 40))
    assert min(weighted) >= 22
    assert len(set(weighted)) == 16


def test_a_sampler_of_its_own_is_refused_unless_batches_are_given(tmp_path: Path):
    class Own(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(40))

        def __len__(self) -> int:
            return 40

    with pytest.raises(UserError, match="cannot draw as a Own does; give OHGWCallback batches by draw="):
        fit(tmp_path, callback(), loader=DataLoader(data(), 4, sampler=Own()))
    batches = [tuple(t[rows] for t in data().tensors) for rows in (slice(0, 8), slice(8, 16))]
    warm = callback(draw=lambda step: (batches[0], batches[1]))
    fit(tmp_path, warm, loader=DataLoader(data(), 4, sampler=Own()))
    assert warm.result is not None


def test_an_iterable_data_set_is_refused(tmp_path: Path):
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([data()[i] for i in range(8)])

    with pytest.raises(UserError, match="iterable data set"):
        fit(tmp_path, callback(), loader=DataLoader(Stream(), 4))


def test_too_little_data_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="needs 16 different examples and the train DataLoader has 15"):
        fit(tmp_path, callback(), loader=DataLoader(Subset(data(), range(15)), 4))


# ---- checkpoints


def test_a_resumed_fit_goes_on_with_x_prime_and_is_not_warm_started_again(tmp_path: Path):
    steps: list[int] = []

    class Counted(Net):
        def configure_optimizers(self) -> Any:
            steps.append(0)
            return super().configure_optimizers()

    whole, warm = net(Counted), callback()
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    loader = DataLoader(data(), 4)
    trainer(tmp_path, warm, keep, max_epochs=2, enable_checkpointing=True).fit(whole, loader)
    assert len(steps) == 2  # with x, and with x'
    file = tmp_path / "kept" / "epoch=0.ckpt"
    record = warm.record()
    assert record is not None
    saved = torch.load(file, weights_only=True)
    assert {name: saved["hyper_parameters"][name] for name in X} == record["x_prime"]
    assert Net.load_from_checkpoint(file).hparams["lr"] == record["x_prime"]["lr"]

    resumed, again = net(Counted), callback()
    seed_everything(99, verbose=False)
    resumed.noise = whole.noise = 0.0
    trainer(tmp_path, again, max_epochs=2).fit(resumed, loader, ckpt_path=file)
    assert len(steps) == 3  # with x' at once
    assert again.result is None
    assert again.record() == record
    assert {name: resumed.hparams[name] for name in X} == record["x_prime"]
    [group] = resumed.optimizers().param_groups  # type: ignore[union-attr]
    assert group["lr"] == record["x_prime"]["lr"]


def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path):
    def quiet() -> Net:
        module = net()
        module.noise = 0.0
        return module

    loader = DataLoader(data(), 4)
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole, resumed = quiet(), quiet()
    trainer(tmp_path, callback(), keep, max_epochs=2, enable_checkpointing=True).fit(whole, loader)
    trainer(tmp_path, callback(), max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole.losses[10:] == resumed.losses


def test_training_that_began_without_a_warm_start_goes_on_without(tmp_path: Path):
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_epochs=1, filename="first")
    trainer(tmp_path, keep, enable_checkpointing=True).fit(net(), DataLoader(data(), 4))
    warm, module = callback(), net()
    with pytest.warns(UserWarning, match="training has already begun"):
        trainer(tmp_path, warm, max_epochs=2).fit(
            module, DataLoader(data(), 4), ckpt_path=tmp_path / "kept" / "first.ckpt"
        )
    assert warm.record() is None
    assert {name: module.hparams[name] for name in X} == X


def test_a_second_fit_of_the_module_is_not_warm_started_and_another_module_is_refused(tmp_path: Path):
    warm = callback()
    module = fit(tmp_path, warm)
    record = warm.record()
    fit(tmp_path, warm, module)
    assert warm.record() == record
    with pytest.raises(UserError, match="has warm-started another module"):
        fit(tmp_path, warm, net())


def test_loggers_get_the_record_and_no_log_of_the_warm_start(tmp_path: Path):
    import yaml

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    warm = callback()
    fit(tmp_path, warm, logger=logger, log_every_n_steps=1)
    hparams = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    record = warm.record()
    assert record is not None
    assert hparams["lr"] == X["lr"]
    assert hparams["warm_start"]["x_prime"] == record["x_prime"]
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 10


# ---- mistakes


class Unsaved(Net):
    def __init__(self, **hyperparameters: Any):
        LightningModule.__init__(self)
        self.net = nn.Sequential(nn.Linear(6, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class OwnAttribute(Net):
    def __init__(self, **hyperparameters: Any):
        super().__init__(**hyperparameters)
        self.lr = hyperparameters["lr"]

    def configure_optimizers(self) -> Any:
        h = self.hparams
        return torch.optim.SGD(self.parameters(), self.lr, h["momentum"], weight_decay=h["weight_decay"])


class Manual(Net):
    def __init__(self, **hyperparameters: Any):
        super().__init__(**hyperparameters)
        self.automatic_optimization = False


class GroupsOfTheirOwn(Net):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.1}, {"params": self.net[3].parameters(), "lr": 0.2}]
        return torch.optim.SGD(groups, momentum=0.6)


class NoLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: net(Unsaved), {}, "has no hyperparameter lr, .* has none; call self.save_hyperparameters"),
        (lambda: net(OwnAttribute), {}, "self.hparams.lr is .* but the optimizer has 0.1: configure_optimizers must"),
        (lambda: net(Manual), {}, "possible: automatic_optimization = True"),
        (lambda: net(GroupsOfTheirOwn), {}, r"several values of lr \(0.1, 0.2\)"),
        (lambda: net(NoLoss), {}, "NoLoss.training_step must return a loss of one element, got"),
        (lambda: net(optimizer="rprop"), {}, "does not know the update of Rprop .*UpdateRule"),
        (lambda: net(lr=2.0), {}, r"lr must be a number in \[0.001, 1.0\].*has 2.0"),
        (lambda: net(label_smoothing=None), {}, "label_smoothing must be a number"),
        (net, {"precision": "bf16-true"}, "float32 or float64, not in torch.bfloat16"),
        (net, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "norm, not of its values"),
    ],
)
def test_what_cannot_be_warm_started_is_refused(module: Any, options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, callback(), module(), **options)


def test_another_optimizer_goes_with_a_rule(tmp_path: Path):
    warm = callback(update=UpdateRule("adam", wd="weight_decay"))
    module = fit(tmp_path, warm, net(optimizer="rprop"))
    assert warm.result is not None
    assert module.hparams["lr"] == warm.result.config["lr"] != X["lr"]


def test_a_hyperparameter_that_is_not_in_the_module_is_refused(tmp_path: Path):
    space = Space({**SPACE.domains, "depth": Float(0.0, 1.0)})
    with pytest.raises(UserError, match=r"Net has no hyperparameter depth in self.hparams, which has lr, weight_decay"):
        fit(tmp_path, OHGWCallback(space, SETTINGS))


def test_names_that_are_not_in_the_space_are_refused():
    for options in ({"differentiable": ("x",)}, {"finite": ("width",)}, {"plain": {"x": 0.0}}, {"linear": ("lr",)}):
        with pytest.raises(UserError, match=r"possible: label_smoothing|possible: lr, weight_decay"):
            callback(**options)
    with pytest.raises(UserError, match=r"settings\.mask names y; possible: lr"):
        callback(Settings(mask=("y",)))


def test_strategies_that_shard_the_weights_are_refused():
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    for strategy in (FSDPStrategy(), object.__new__(DeepSpeedStrategy)):  # to make one needs the package deepspeed
        expected = f"{type(strategy).__name__} does not keep; possible: one device, or strategy='ddp'"
        with pytest.raises(UserError, match=expected):
            callback().setup(SimpleNamespace(strategy=strategy), net(), "fit")  # type: ignore[arg-type]


# ---- the package is an extra


def test_nothing_else_imports_the_package():
    for folder in ("harness", "backends"):
        for file in (ROOT / folder).rglob("*.py"):
            names = {
                name
                for node in ast.walk(ast.parse(file.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            }
            found = {name for name in names if name.split(".")[0] == "lightning" or name == "harness.lightning"}
            assert not found or file == ROOT / "harness" / "lightning.py"


def test_a_missing_package_is_named_with_the_way_to_install_it():
    code = "import sys; sys.modules['lightning'] = None; import harness.lightning"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ImportError: harness.lightning needs the package lightning" in done.stderr
    assert "pip install 'ohgw-harness[lightning]'" in done.stderr


# ---- several processes

DDP = """
import json, sys
from pathlib import Path
from lightning.pytorch import Trainer, seed_everything
from tests.harness.test_lightning import *

if __name__ == "__main__":
    warm = OHGWCallback(SPACE, Settings(step="normalized", eta=0.1, batch_size=8), **Z)
    seed_everything(3, verbose=False)
    module = Smooth(**X)
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    several = {"strategy": "ddp", "devices": devices} if devices > 1 else {"devices": 1}
    run = trainer(folder, warm, precision="64-true", max_steps=1, **several)
    run.fit(module, DataLoader(data(), 4))
    (folder / f"{devices}-{run.global_rank}.json").write_text(json.dumps([warm.record(), dict(module.hparams)]))
"""


class Smooth(Net):
    """Without batch normalisation and noise, so that a batch may be split."""

    def __init__(self, **hyperparameters: Any):
        super().__init__(**hyperparameters)
        self.net[1] = nn.LayerNorm(16)
        self.noise = 0.0


@pytest.mark.slow
def test_two_processes_are_warm_started_as_one_is(tmp_path: Path):
    script = tmp_path / "several.py"
    script.write_text(DDP)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for devices in (1, 2):
        command = [sys.executable, str(script), str(tmp_path), str(devices)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    (one, _), (first, hparams), (second, others) = (
        json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")
    )
    assert first == second
    assert hparams == others
    assert {name: hparams[name] for name in X} == first["x_prime"] != X
    assert first["fallback"] is None
    assert first["gradient"] == pytest.approx(one["gradient"], rel=1e-9)
    assert first["x_prime"] == pytest.approx(one["x_prime"], rel=1e-9)


# ---- the example


def split() -> tuple[list[str], list[str]]:
    """(lines outside the marks, lines between them)."""
    plain: list[str] = []
    added: list[str] = []
    inside = False
    for line in EXAMPLE.read_text().splitlines():
        mark = line.strip() in ("# OHGW begin", "# OHGW end")
        inside = inside != mark
        if not mark:
            (added if inside else plain).append(line)
    assert not inside
    return plain, added


def test_the_example_takes_at_most_twenty_lines():
    plain, added = split()
    assert 0 < len(added) <= 20
    body = "\n".join(plain).split('"""', 2)[2]
    assert "ohgw" not in body.lower()
    assert "warm" not in body.lower()


@pytest.mark.parametrize("hooked", [True, False])
def test_the_example_trains_with_and_without_the_callback(hooked: bool, tmp_path: Path):
    script = EXAMPLE if hooked else tmp_path / "example_without.py"
    if not hooked:
        script.write_text("\n".join(split()[0]) + "\n")
    folder = tmp_path / "cwd"
    folder.mkdir()
    command = [sys.executable, str(script), "--epochs", "1", "--lr", "0.003"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("trained with")]
    trained = ast.literal_eval(line.removeprefix("trained with "))
    assert set(trained) == {"lr", "weight_decay", "momentum", "label_smoothing"}
    assert (trained["lr"] != 0.003) == hooked
    assert not list(folder.iterdir())
