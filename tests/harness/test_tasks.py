"""Image tasks: data, augmentation, optimiser, runs that can be resumed, and the problem they pose to a warm start."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from backends.context import TrialFailed, UserError
from harness.ohgw import Settings
from harness.tasks import data, load_task, models, optimizers, supervised, vision

CONF = Path(__file__).parents[2] / "conf" / "task"
CONFIG = {"lr": 0.1, "wd": 1e-3, "momentum": 0.9, "augmentation": 0.4, "label_smoothing": 0.1}
IDENTITY = torch.tensor([0.0] * vision.SCALED + [0.0, 0.0, 1.0])  # no crop, no flip


def build(name: str = "digits", **changes: Any) -> vision.ImageTask:
    task = load_task(spec(name, **changes), "cpu")
    assert isinstance(task, vision.ImageTask)
    return task


def spec(name: str = "digits", **changes):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["task"] | changes


def never() -> bool:
    return False


def write_cifar(folder: Path, n: int = 40) -> str:
    """A tree like CIFAR-10's with ``n`` random images a file."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {"data": generator.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]}
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    return str(folder)


@pytest.fixture
def cifar(tmp_path):
    return build("cifar10", data_dir=write_cifar(tmp_path), batch_size=16, model="resnet8")


@pytest.fixture
def digits():
    return build()


# data


def test_digits_are_the_uci_digits_split_in_half_and_quarters_by_class(digits):
    sizes = {name: len(part) for name, part in digits.parts.items()}
    assert sum(sizes.values()) == 1797
    assert sizes["train"] == pytest.approx(898, abs=5)
    assert sizes["test"] == pytest.approx(449, abs=5)
    every_image = torch.cat([part.images for part in digits.parts.values()])
    assert every_image.max() == 16
    for part in digits.parts.values():
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(part) / 10 + 1


def test_parts_are_disjoint_and_the_same_every_time():
    labels = torch.arange(100) % 10
    first, second = data.stratified_split(labels, 0.9, "name")
    again, _ = data.stratified_split(labels, 0.9, "name")
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(100))
    assert torch.equal(first, again)
    assert labels[second].bincount().tolist() == [1] * 10
    assert not torch.equal(first, data.stratified_split(labels, 0.9, "other")[0])


def test_label_noise_replaces_exactly_that_share_of_training_labels(digits):
    noisy = build(label_noise=0.25)
    changed = noisy.parts["train"].labels != digits.parts["train"].labels
    assert int(changed.sum()) == round(0.25 * len(changed))
    assert torch.equal(noisy.parts["validation"].labels, digits.parts["validation"].labels)
    assert torch.equal(noisy.parts["test"].labels, digits.parts["test"].labels)


def test_a_larger_share_of_label_noise_keeps_the_smaller_one():
    labels = torch.zeros(200, dtype=torch.long)
    few, many = (data.with_label_noise(labels, share, 10, "x") for share in (0.1, 0.5))
    assert bool((many[few > 0] == few[few > 0]).all())


def test_cifar10_tree_is_read_and_split(cifar):
    assert {name: len(part) for name, part in cifar.parts.items()} == {"train": 180, "validation": 20, "test": 40}
    assert cifar.parts["train"].images.shape == (180, 3, 32, 32)
    assert cifar.parts["train"].images.dtype == torch.uint8


@pytest.mark.skipif("OHGW_DATA_DIR" not in os.environ, reason="OHGW_DATA_DIR names no folder with the real CIFAR-10")
def test_real_cifar10():
    task = build("cifar10", data_dir=os.environ["OHGW_DATA_DIR"])
    assert {name: len(part) for name, part in task.parts.items()} == {
        "train": 45_000,
        "validation": 5_000,
        "test": 10_000,
    }
    assert task.parts["validation"].labels.bincount().tolist() == [500] * 10
    assert (task.mean.flatten() / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    assert (task.std.flatten() / 255).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=2e-3)


def test_missing_data_name_the_file_and_the_command_that_fetches_it(tmp_path):
    with pytest.raises(UserError, match=r"task.data_dir.*data_batch_1.*torchvision"):
        build("cifar10")
    folder = write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(UserError, match=rf"{folder} has no cifar-10-batches-py/test_batch; fetch it with: .*{folder}"):
        build("cifar10", data_dir=folder)


def test_a_data_file_with_code_in_it_is_refused(tmp_path):
    folder = write_cifar(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match="system"):
        build("cifar10", data_dir=folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_any_pickle_protocol_are_read(protocol):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    content = vision._ArraysOnly(io.BytesIO(pickle.dumps({"data": array}, protocol)), encoding="latin1").load()
    assert np.array_equal(content["data"], array)


def test_a_task_is_built_once_in_a_process():
    assert build() is build()


def test_building_a_task_imports_neither_sklearn_nor_the_compiler():
    code = (
        "import sys, yaml; from harness.tasks import optimizers, vision\n"
        f"spec = yaml.safe_load(open({str(CONF / 'digits.yaml')!r}))['task']\n"
        "config = {'wd': 0, 'lr': 1, 'momentum': 0, 'nesterov': False}\n"
        "vision._read_digits(); optimizers.Sgd(vision.models.build('mlp', 1, 8, 10), config)\n"
        "print([m for m in ('sklearn', 'torch._dynamo', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parents[1], check=True)
    assert out.stdout.strip() == "[]"


# augmentation


def images(n: int = 6, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_magnitude_0_without_crop_and_flip_changes_nothing():
    draws = vision.draw(6, torch.Generator().manual_seed(1), crop=0, flip=False).double()
    torch.testing.assert_close(vision.augment(images(), draws, 0.0), images(), rtol=0, atol=1e-12)


def test_crop_shifts_by_whole_pixels_and_flip_mirrors():
    draws = IDENTITY.double().repeat(6, 1)
    draws[:, vision.SCALED] = 2  # x
    draws[:, vision.SCALED + 1] = -1  # y
    shifted = vision.augment(images(), draws, 0.0)
    torch.testing.assert_close(shifted[:, :, 1:, :-2], images()[:, :, :-1, 2:], rtol=0, atol=1e-12)
    assert shifted[:, :, 0].abs().max() < 1e-12
    draws = IDENTITY.double().repeat(6, 1)
    draws[:, -1] = -1
    torch.testing.assert_close(vision.augment(images(), draws, 0.0), images().flip(3), rtol=0, atol=1e-12)


def test_draws_stay_in_their_ranges():
    draws = vision.draw(2000, torch.Generator().manual_seed(0), crop=4, flip=True)
    assert draws[:, : vision.SCALED].abs().max() <= 1
    assert set(draws[:, vision.SCALED : -1].unique().tolist()) == set(range(-4, 5))
    assert set(draws[:, -1].tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("magnitude", [0.13, 0.57, 0.91])
def test_augmentation_derivative_in_the_magnitude(magnitude):
    draws = vision.draw(6, torch.Generator().manual_seed(2), crop=2, flip=True).double()
    weights = images().flip(0)

    def loss(m):
        return (vision.augment(images(), draws, m) * weights).sum()

    m = torch.tensor(magnitude, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(m), m)
    h = 1e-7  # small: bilinear interpolation has kinks where a pixel meets another
    difference = (loss(magnitude + h) - loss(magnitude - h)) / (2 * h)
    assert float(gradient) == pytest.approx(float(difference), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.17, 0.3])
def test_smoothed_cross_entropy_is_torchs(smoothing):
    logits, labels = images(10, 1, 3).flatten(1), torch.arange(10) % 9
    ours = supervised.smoothed_cross_entropy(logits, labels, torch.tensor(smoothing, dtype=torch.float64))
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing))


# networks and optimiser


def test_resnet20_is_the_one_of_he_et_al():
    net = models.build("resnet20", 3, 32, 10)
    assert sum(p.numel() for p in net.parameters()) == 269_722  # 0.27 M in their table 6
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in net.modules()) == 20
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_bit_for_bit(momentum, nesterov):
    net, twin = (models.build("cnn", 1, 8, 10) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    ours = optimizers.Sgd(net, {"lr": 0.05, "wd": 0.01, "momentum": momentum, "nesterov": nesterov})
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in zip(models.parameters_by_decay(twin), (0.01, 0), strict=True)
    ]
    theirs = torch.optim.SGD(groups, lr=0.05, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True)
    for step in range(4):
        batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), torch.arange(8)).backward()
            optimizer.step()
    for ours_p, theirs_p in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)


def test_weight_decay_spares_biases_and_batchnorm():
    net = models.build("cnn", 1, 8, 10)
    decayed, rest = models.parameters_by_decay(net)
    assert {p.ndim for p in decayed} == {2, 4}
    assert {p.ndim for p in rest} == {1}


# runs


def test_initial_weights_depend_on_the_seed_alone(digits):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weights = digits.start(CONFIG, 3).net.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    for name, tensor in digits.start({"lr": 0.001}, 3).net.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert not torch.equal(digits.start(CONFIG, 4).net[0].weight, weights["0.weight"])


def test_missing_hyperparameters_are_0(digits):
    named = digits.start({"lr": 0.1, "wd": 0.0, "momentum": 0.0, "augmentation": 0.0, "label_smoothing": 0.0}, 0)
    assert digits.start({"lr": 0.1}, 0).train_epoch(never) == named.train_epoch(never)


@pytest.mark.parametrize("model", ["cnn", "mlp", "resnet8"])
def test_training_learns(model):
    run = build(model=model).start({"lr": 0.05, "momentum": 0.9}, 0)
    for _ in range(3):
        run.train_epoch(never)
    assert run.evaluate("validation")["score"] > 0.85
    assert run.epoch == 3


def same(a, b):
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def resume(task, run):
    """A new run that continues ``run``, through a file."""
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    resumed = task.start(run.config, run.seed)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    return resumed


@pytest.mark.parametrize(
    "config", [CONFIG, {"lr": 0.1}, CONFIG | {"nesterov": True}], ids=["momentum", "plain", "nesterov"]
)
def test_a_resumed_digits_run_equals_an_uninterrupted_one_bit_for_bit(digits, config):
    straight, broken = digits.start(config, 1), digits.start(config, 1)
    for _ in range(3):
        expected = [straight.train_epoch(never), straight.evaluate("validation"), straight.evaluate("test")]
        found = [broken.train_epoch(never), broken.evaluate("validation"), broken.evaluate("test")]
        assert found == expected
        broken = resume(digits, broken)
    assert same(straight.state_dict(), broken.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_cifar_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, precision):
    task = build("cifar10", data_dir=write_cifar(tmp_path), batch_size=16, model="resnet8", precision=precision)
    straight, broken = task.start(CONFIG, 1), task.start(CONFIG, 1)
    for _ in range(2):
        assert broken.train_epoch(never) == straight.train_epoch(never)
        broken = resume(task, broken)
    assert same(straight.state_dict(), broken.state_dict())


def test_the_cosine_reaches_0_at_the_last_epoch_and_needs_no_state(cifar):
    run = cifar.start(CONFIG, 0)
    run._schedule(0)
    assert run.optimizer.lr == CONFIG["lr"]
    run.epoch = cifar.max_epochs - 1
    run._schedule(len(cifar.parts["train"]) // cifar.batch_size)
    assert run.optimizer.lr == pytest.approx(0, abs=1e-12)


def test_an_epoch_stops_at_the_next_batch(digits):
    asked = iter([False, False, True])
    run = digits.start(CONFIG, 0)
    assert run.train_epoch(lambda: next(asked)) is None
    assert list(asked) == []
    assert run.epoch == 0


def test_a_loss_that_is_not_finite_fails_the_trial(digits):
    run = digits.start({"lr": 1e18, "momentum": 0.9}, 0)
    with pytest.raises(TrialFailed, match="loss is"):
        run.train_epoch(never)


def test_a_long_epoch_notices_divergence_before_its_end(digits, monkeypatch):
    monkeypatch.setattr(supervised, "CHECK_EVERY", 5)
    asked = iter([False] * 28)
    run = digits.start({"lr": float("nan")}, 0)
    with pytest.raises(TrialFailed):
        run.train_epoch(lambda: next(asked))
    assert len(list(asked)) == 28 - 5


def test_flops_are_those_of_an_epoch(digits):
    from torch.utils.flop_counter import FlopCounterMode

    run = digits.start(CONFIG, 0)
    with FlopCounterMode(display=False) as counter:
        flops = run.train_epoch(never)["flops"]
    assert flops == counter.get_total_flops()


def test_every_batch_size_of_evaluation_gives_the_same_score(cifar, monkeypatch):
    run = cifar.start(CONFIG, 0)
    whole = run.evaluate("test")
    monkeypatch.setattr(vision, "EVALUATION_BATCH", 16)
    assert run.evaluate("test")["loss"] == pytest.approx(whole["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("precision", "mixed", "dtype"), [("fp32", True, None), ("bf16", False, torch.bfloat16), ("auto", False, None)]
)
def test_precision(precision, mixed, dtype):
    assert supervised.autocast_dtype(precision, torch.device("cpu"), mixed) == dtype


def test_unknown_precision_is_a_users_error():
    with pytest.raises(UserError, match="auto, fp32, bf16, fp16"):
        build(precision="fp8")


# the problem of a warm start


def test_warm_start_batches_are_disjoint_and_repeatable(digits):
    problem = digits.start(CONFIG, 0).problem(Settings(batch_size=300))
    first, second = problem.draw(0)
    again, _ = problem.draw(0)
    other, _ = problem.draw(1)
    assert len(first.labels) == len(second.labels) == 300
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.draws, again.draws)
    assert not torch.equal(first.images, other.images)
    seen = {image.numpy().tobytes() for image in first.images}
    train = {image.numpy().tobytes() for image in digits.normalised(digits.parts["train"].images)}
    probe = {image.numpy().tobytes() for image in second.images}
    assert not seen & probe
    assert seen <= train
    assert probe <= train


def test_the_probe_can_come_from_validation(digits):
    _, second = digits.start(CONFIG, 0).problem(Settings(probe="val")).draw(0)
    validation = {image.numpy().tobytes() for image in digits.normalised(digits.parts["validation"].images)}
    assert {image.numpy().tobytes() for image in second.images} <= validation


def test_batches_of_a_warm_start_can_be_half_the_training_set_and_no_more(cifar):
    run = cifar.start(CONFIG, 0)
    first, second = run.problem(Settings(batch_size=90)).draw(0)
    assert len(first.labels) == len(second.labels) == 90
    with pytest.raises(UserError, match="91 examples"):
        run.problem(Settings(batch_size=91))


def test_training_loss_of_the_problem_is_the_trainers(digits):
    run = digits.start(CONFIG, 0)
    problem = run.problem(Settings(batch_size=32))
    batch, _ = problem.draw(0)
    z = {name: torch.tensor(CONFIG[name]) for name in problem.differentiable}
    images = vision.augment(batch.images, batch.draws, CONFIG["augmentation"])
    plain = F.cross_entropy(run.net(images), batch.labels, label_smoothing=CONFIG["label_smoothing"])
    torch.testing.assert_close(problem.train_loss(run.net, batch, z), plain)
    torch.testing.assert_close(problem.train_loss(run.net, batch, {}), plain)


def test_what_is_differentiable_follows_the_space():
    assert build().start(CONFIG, 0).problem(Settings()).differentiable == ("label_smoothing", "augmentation")
    assert build(space="study3").start(CONFIG, 0).problem(Settings()).differentiable == ()
