"""The batched trainer's curves are those of the one-at-a-time trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from backends.context import TrialFailed, UserError, trial_seed
from harness.seeds import rng
from harness.tasks import batched, load_task
from harness.tasks.batched import TrainedTrial, augment_many, bytes_per_configuration, cross_entropies, train_batched
from harness.tasks.supervised import smoothed_cross_entropy
from harness.tasks.vision import Batch, Digits, ImageTask, augment, draw
from harness.trial import Clock, one_epoch

CONF = Path(__file__).parents[2] / "conf" / "task"
DIVERGING = {"lr": 1e6, "wd": 1e-3, "momentum": 0.9, "augmentation": 0.4, "label_smoothing": 0.1}
EPOCHS = 3


class PreciseDigits(Digits):
    """The digits in float64, where the rounding of batched products is too small to grow visible in three epochs."""

    def network(self, seed: int) -> nn.Module:
        return super().network(seed).double()

    def normalised(self, images: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        return super().normalised(images, torch.float64)

    def epoch_draws(self, config: Mapping[str, Any], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        order, draws = super().epoch_draws(config, seed, epoch)
        return order, draws.double()

    def plain(self, part: str, chosen: Tensor, dtype: torch.dtype = torch.float64) -> Batch:
        return super().plain(part, chosen, torch.float64)


def build(**changes: Any) -> ImageTask:
    target = f"{PreciseDigits.__module__}.{PreciseDigits.__qualname__}"
    spec = yaml.safe_load((CONF / "digits.yaml").read_text())["task"] | {"_target_": target} | changes
    task = load_task(spec, "cpu")
    assert isinstance(task, ImageTask)
    return task


def sample(task: ImageTask, n: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Random configurations, every second with Nesterov's momentum, and their seeds."""
    configs = [task.space.sample(rng(k, "test")) | {"nesterov": k % 2 == 1} for k in range(n)]
    return configs, [trial_seed(0, k) for k in range(n)]


class Context:
    """As much of a TrialContext as an epoch asks for."""

    def should_stop(self) -> bool:
        return False

    def interrupted(self) -> bool:
        return False


def one_at_a_time(task: ImageTask, config: dict[str, Any], seed: int, epochs: int = EPOCHS) -> TrainedTrial:
    run, trial = task.start(config, seed), TrainedTrial(config, seed)
    try:
        while run.epoch < epochs:
            report = one_epoch(Context(), run, Clock("cpu", 0.0))  # type: ignore[arg-type]
            assert report is not None
            trial.reports.append(report)
    except TrialFailed as failure:
        trial.failure = str(failure)
    return trial


def assert_same(found: TrainedTrial, expected: TrainedTrial) -> None:
    """Equal up to rounding: losses (added up in float32) relatively, scores exactly."""
    assert (found.config, found.seed, found.failure) == (expected.config, expected.seed, expected.failure)
    assert len(found.reports) == len(expected.reports)
    for report, other in zip(found.reports, expected.reports, strict=True):
        assert list(report) == list(other)
        for key, value in report.items():
            assert value == (pytest.approx(other[key], rel=1e-5) if key.endswith("loss") else other[key])


@pytest.fixture(scope="module")
def mlp() -> ImageTask:
    return build(model="mlp")


@pytest.mark.parametrize("changes", [{"model": "mlp"}, {"model": "mlp", "schedule": "cosine", "label_noise": 0.1},
                                     {"model": "cnn"}, {"model": "resnet8", "batch_size": 256}])  # fmt: skip
def test_curves_are_those_of_the_one_at_a_time_trainer(changes):
    task = build(**changes)
    configs, seeds = sample(task, 5 if changes["model"] != "resnet8" else 2)
    trials = list(train_batched(task, configs, seeds, EPOCHS))
    assert len(trials) == len(configs)
    for trial, config, seed in zip(trials, configs, seeds, strict=True):
        assert_same(trial, one_at_a_time(task, config, seed))


def test_in_single_precision_curves_agree_where_training_is_stable():
    task = build(model="mlp", _target_="harness.tasks.vision.Digits")
    configs, seeds = sample(task, 5)
    configs = [config | {"lr": config["lr"] / 10, "momentum": config["momentum"] * 0.8} for config in configs]
    for trial in train_batched(task, configs, seeds, EPOCHS):
        for report, other in zip(trial.reports, one_at_a_time(task, trial.config, trial.seed).reports, strict=True):
            for part in ("train", "validation"):
                assert report[f"{part}_loss"] == pytest.approx(other[f"{part}_loss"], rel=1e-3)
                assert report[f"{part}_score"] == pytest.approx(other[f"{part}_score"], abs=0.005)


def test_hyperparameters_have_the_defaults_of_the_task(mlp):
    (trial,) = train_batched(mlp, [{"lr": 0.05}], [7], 1)
    assert_same(trial, one_at_a_time(mlp, {"lr": 0.05}, 7, epochs=1))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_diverging_configuration_fails_alone(model):
    task = build(model=model)
    configs, seeds = sample(task, 4)
    configs[1] = DIVERGING
    alone = list(train_batched(task, configs[:1] + configs[2:], seeds[:1] + seeds[2:], EPOCHS))
    trials = list(train_batched(task, configs, seeds, EPOCHS))
    assert_same(trials[1], one_at_a_time(task, DIVERGING, seeds[1]))
    assert trials[1].failure is not None or model == "cnn"
    for trial, other in zip(trials[:1] + trials[2:], alone, strict=True):
        assert_same(trial, other)


@pytest.mark.parametrize("lr", [10.0, 30.0, 100.0, 1e3, 1e10, 1e30])
def test_failures_come_in_the_same_epoch_for_the_same_reason(mlp, lr):
    config = {"lr": lr, "momentum": 0.5, "augmentation": 0.2}
    (trial,) = train_batched(mlp, [config], [3], EPOCHS)
    expected = one_at_a_time(mlp, config, 3)
    assert (trial.failure, len(trial.reports)) == (expected.failure, len(expected.reports))


def test_all_may_fail(mlp):
    assert [len(trial.reports) for trial in train_batched(mlp, [DIVERGING] * 2, [0, 1], EPOCHS)] == [0, 0]


def test_chunks_do_not_change_the_results(mlp):
    configs, seeds = sample(mlp, 5)
    whole = list(train_batched(mlp, configs, seeds, 2))
    for trial, other in zip(train_batched(mlp, configs, seeds, 2, chunk=2), whole, strict=True):
        assert_same(trial, other)


def test_the_memory_limits_the_chunk(mlp, monkeypatch):
    sizes = []
    monkeypatch.setattr(batched, "_train_chunk", lambda task, trials, epochs: sizes.append(len(trials)))
    configs, seeds = sample(mlp, 7)
    list(train_batched(mlp, configs, seeds, 1, memory=3 * bytes_per_configuration(mlp)))
    list(train_batched(mlp, configs, seeds, 1, memory=1))
    assert sizes == [3, 3, 1] + [1] * 7
    weights = sum(p.numel() for p in mlp.network(0).parameters()) * 4
    assert 4 * weights < bytes_per_configuration(mlp) < 100 * weights


def test_reports_and_failure_are_those_of_the_looks_at_the_loss(monkeypatch):
    losses = torch.ones(4, 5)
    losses[1, 1], losses[2, 4], losses[3, 0] = torch.inf, torch.nan, torch.inf
    losses[3, 3] = torch.nan
    monkeypatch.setattr(batched, "CHECK_EVERY", 2)
    reasons = batched._failures(losses, [torch.inf, 1.0, 1.0, 1.0], epoch=4)
    assert reasons == ["validation loss is inf in epoch 4", "training loss is inf", "training loss is nan",
                       "training loss is inf"]  # fmt: skip


def test_augmentation_of_many_magnitudes_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 32, generator=generator)
    draws = draw(6, generator, 4, True)
    magnitudes = [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]
    together = augment_many(images, draws, torch.tensor(magnitudes).unsqueeze(1))
    for k, magnitude in enumerate(magnitudes):
        alone = augment(images[k : k + 1], draws[k : k + 1], magnitude)
        assert torch.allclose(together[k : k + 1], alone, atol=1e-4)


def test_cross_entropies_are_those_of_each():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 10, generator=generator)
    labels = torch.randint(0, 10, (3, 8), generator=generator)
    smoothing = [0.0, 0.1, 0.3]
    found = cross_entropies(logits, labels, torch.tensor(smoothing))
    expected = [smoothed_cross_entropy(logits[k], labels[k], s) for k, s in enumerate(smoothing)]
    assert found.tolist() == pytest.approx([float(loss) for loss in expected])


def test_mixed_precision_and_missing_seeds_are_refused(mlp):
    with pytest.raises(UserError, match="precision=fp32"):
        next(train_batched(build(model="mlp", precision="bf16"), [{"lr": 0.1}], [0], 1))
    with pytest.raises(ValueError, match="seeds"):
        next(train_batched(mlp, [{"lr": 0.1}], [], 1))
