"""The other image tasks: CIFAR-100, Fashion-MNIST, deeper residual networks, the transformer, and all search spaces."""

import gzip
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from backends.context import UserError
from harness.ohgw import Settings, lookahead, lookahead_objective
from harness.ohgw.coordinates import Coordinate
from harness.seeds import rng
from harness.space import Float, Space
from harness.tasks import load_task, models, vision
from harness.tasks.optimizers import optimizer
from tests.harness.test_tasks import CONFIG, never, resume, same, write_cifar

CONF = Path(__file__).parents[2] / "conf" / "task"
VISION = ("digits", "cifar10", "cifar100", "fashion_mnist")


def spec(name: str, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["task"] | changes


def build(name: str = "digits", **changes: Any) -> vision.ImageTask:
    task = load_task(spec(name, **changes), "cpu")
    assert isinstance(task, vision.ImageTask)
    return task


def write_cifar100(folder: Path, n: int = 400) -> str:
    """A tree like CIFAR-100's with ``n`` random images a file."""
    (folder / "cifar-100-python").mkdir()
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        images = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": images, "fine_labels": [i % 100 for i in range(n)], "coarse_labels": [0] * n,
                   "filenames": [f"{i}.png" for i in range(n)], "batch_label": "training batch 1 of 1"}  # fmt: skip
        (folder / "cifar-100-python" / name).write_bytes(pickle.dumps(content, protocol=2))
    return str(folder)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(folder: Path, n: int = 200) -> str:
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("train", "t10k"):
        write_idx(raw / f"{name}-images-idx3-ubyte.gz", generator.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return str(folder)


WRITERS = {"cifar10": write_cifar, "cifar100": write_cifar100, "fashion_mnist": write_fashion_mnist}


def tiny(name: str, folder: Path, **changes: Any) -> vision.ImageTask:
    written = {} if name == "digits" else {"data_dir": WRITERS[name](folder)}
    return build(name, **{"batch_size": 16, "model": "cnn", **written, **changes})


def test_cifar100_has_a_hundred_classes(tmp_path):
    task = tiny("cifar100", tmp_path)
    assert task.sizes == {"train": 400, "validation": 0, "test": 400}  # 4 a class here; 500 in reality
    assert task.network(0)(task.sample(2)[0]).shape == (2, 100)
    assert task.parts["train"].labels.bincount().tolist() == [4] * 100


def test_fashion_mnist_is_read_from_idx_files(tmp_path):
    task = tiny("fashion_mnist", tmp_path)
    assert task.sizes == {"train": 180, "validation": 20, "test": 200}
    assert task.parts["test"].images.shape == (200, 1, 28, 28)
    expected = np.random.default_rng(0).integers(0, 256, (200, 28, 28))
    train = {image.numpy().tobytes() for image in task.parts["train"].images}
    assert train <= {image.astype(np.uint8).tobytes() for image in expected}


@pytest.mark.skipif("OHGW_DATA_DIR" not in os.environ, reason="OHGW_DATA_DIR names no folder with the real data")
def test_real_fashion_mnist():
    if not (Path(os.environ["OHGW_DATA_DIR"]) / "FashionMNIST").exists():
        pytest.skip("no Fashion-MNIST there")
    task = build("fashion_mnist", data_dir=os.environ["OHGW_DATA_DIR"])
    assert task.sizes == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert float(task.mean) / 255 == pytest.approx(0.2860, abs=2e-3)


@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(b"\0\0\x08\x03\0\0"), gzip.compress(bytes(20))])
def test_a_damaged_idx_file_is_a_users_error(tmp_path, content):
    folder = write_fashion_mnist(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is no .*IDX file"):
        build("fashion_mnist", data_dir=folder)


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_missing_data_name_the_file_and_the_command(name):
    with pytest.raises(UserError, match=r"task\.data_dir.*train.*torchvision\.datasets"):
        build(name)


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, tmp_path):
    task = tiny(name, tmp_path, model="resnet8" if name == "cifar100" else "vit_tiny", label_noise=0.1)
    config = CONFIG | {"optimizer": "adamw", "clip": 0.5, "warmup": 0.1, "schedule": "cosine"}
    straight, broken = task.start(config, 1), task.start(config, 1)
    for _ in range(2):
        assert broken.train_epoch(never) == straight.train_epoch(never)
        broken = resume(task, broken)
    assert same(straight.state_dict(), broken.state_dict())


@pytest.mark.parametrize(("name", "layers", "parameters"), [("resnet32", 32, 464_154), ("resnet56", 56, 853_018)])
def test_deeper_residual_networks_are_those_of_he_et_al(name, layers, parameters):
    net = models.build(name, 3, 32, 10)
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in net.modules()) == layers
    assert sum(p.numel() for p in net.parameters()) == parameters  # 0.46 M and 0.85 M in their table 6


def test_the_transformer_sees_patches_of_four_pixels():
    net = models.build("vit", 3, 32, 10)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert net.get_parameter("positions").shape == (64, 192)
    assert 2.6e6 < sum(p.numel() for p in net.parameters()) < 2.8e6
    with pytest.raises(UserError, match="patches of 4"):
        models.build("vit", 1, 30, 10)


def test_an_unknown_model_is_a_users_error():
    with pytest.raises(UserError, match="resnet20"):
        models.build("resnet19", 3, 32, 10)


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize(("space", "floats", "others"), [("study3", 3, 0), ("study5", 5, 0), ("study10", 10, 0),
                                                         ("mixed", 5, 3), ("continuous", 5, 0)])  # fmt: skip
def test_spaces(name, space, floats, others):
    space = Space.from_spec(spec(name)["spaces"][space])
    assert len(space.continuous) == floats
    assert len(space) == floats + others


@pytest.mark.parametrize("name", VISION)
def test_continuous_is_the_continuous_part_of_mixed(name):
    mixed, continuous = (Space.from_spec(spec(name)["spaces"][space]) for space in ("mixed", "continuous"))
    assert continuous.domains == mixed.continuous


@pytest.mark.parametrize("space", ["study3", "study5", "study10", "mixed", "continuous"])
def test_every_space_trains_and_moves_its_continuous_part(space):
    task = build(space=space, batch_size=64, model="vit_tiny" if space == "mixed" else "cnn")
    for number in range(2):
        x = task.space.sample(rng(number, "test"))
        run = task.start(x, number)
        problem = run.problem(Settings(batch_size=32))
        assert set(task.space.continuous) <= set(problem.movable)
        assert run.train_epoch(never) is not None


@pytest.mark.parametrize("model", ["mlp", "cnn", "vit_tiny"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_gradient_of_study10_is_that_of_the_objective_in_float64(model, kind):
    task = build(space="study10", model=model)
    config = task.space.sample(rng(5, "test")) | {"optimizer": kind, "lr": 0.05, "clip": 0.3}
    run = task.start(config, 0)
    run.net.double()
    problem = run.problem(Settings(batch_size=16))
    space = {name: Coordinate(domain) for name, domain in task.space.domains.items() if isinstance(domain, Float)}
    batches = problem.draw(0)
    estimate = lookahead(problem, config, batches, space)
    for name, coordinate in space.items():
        psi, h = coordinate.psi(config[name]), 1e-6 * coordinate.width
        above, below = (
            lookahead_objective(problem, {**config, name: coordinate.value(psi + d)}, batches) for d in (h, -h)
        )
        # bilinear interpolation and ReLU have kinks, which a small h seldom crosses
        assert estimate.gradient[name] == pytest.approx((above - below) / (2 * h), rel=2e-4, abs=1e-7), name


def test_own_magnitudes_take_the_place_of_the_common_one():
    draws = vision.draw(5, torch.Generator().manual_seed(0), crop=0, flip=False)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    common = vision.magnitudes({"augmentation": 0.3})
    each = vision.magnitudes({"augmentation": 0.0, **dict.fromkeys(vision.MAGNITUDES, 0.3)})
    torch.testing.assert_close(vision.augment(images, draws, each), vision.augment(images, draws, common))
    only_contrast = vision.magnitudes({"augmentation": 0.0, "contrast": 0.5})
    ratio = vision.augment(images, draws, only_contrast) / vision.augment(images, draws, 0.0)
    expected = (1 + vision.MAX_CONTRAST * 0.5 * draws[:, 4]).view(-1, 1, 1, 1).expand_as(ratio)
    torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_is_torchs_bit_for_bit(kind):
    net, twin = (models.build("cnn", 1, 8, 10) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    config = {"lr": 0.01, "wd": 0.01, "momentum": 0.8, "beta2": 0.95, "optimizer": kind, "clip": 0.7}
    ours = optimizer(net, config)
    groups = [{"params": params, "weight_decay": decay}
              for params, decay in zip(models.parameters_by_decay(twin), (0.01, 0), strict=True)]  # fmt: skip
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    parameters = [p for group in models.parameters_by_decay(twin) for p in group]
    theirs = kinds[kind](groups, lr=0.01, betas=(0.8, 0.95), fused=True)
    for step in range(4):
        batch = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        for model, optim in ((net, ours), (twin, theirs)):
            optim.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), torch.arange(8)).backward()
        ours.clip_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        ours.step()
        theirs.step()
    for ours_p, theirs_p in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)


@pytest.mark.parametrize(("name", "value"), [("optimizer", "lion"), ("schedule", "linear"), ("batch_size", 10_000)])
def test_a_hyperparameter_that_makes_no_sense_is_a_users_error(name, value):
    with pytest.raises(UserError, match=name):
        build().start({"lr": 0.1, name: value}, 0)


def test_the_batch_size_can_be_a_hyperparameter():
    task = build()
    run = task.start({"lr": 0.1, "batch_size": 64}, 0)
    assert task.steps_per_epoch(run.config) == task.sizes["train"] // 64
    inputs, labels = next(task.batches(run.config, 0, 0))
    assert len(inputs) == len(labels) == 64


def test_warm_up_rises_in_its_share_of_the_longest_training():
    task = build(max_epochs=10)
    config = task.completed({"lr": 1.0, "warmup": 0.2})
    steps = task.steps_per_epoch(config)
    factors = [task.lr_factor(config, epoch, step) for epoch in range(10) for step in range(steps)]
    assert factors[0] == pytest.approx(1 / (2 * steps))
    assert factors[: 2 * steps] == sorted(factors[: 2 * steps])
    assert factors[2 * steps :] == [1.0] * (8 * steps)
    cosine = task.completed({"lr": 1.0, "warmup": 0.2, "schedule": "cosine"})
    assert task.lr_factor(cosine, 5, 0) == pytest.approx(0.5)
