"""The task of image trees, on a generated tree of JPEG files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from backends.context import UserError
from harness.ohgw import Settings, lookahead, lookahead_objective
from harness.ohgw.coordinates import Coordinate
from harness.seeds import rng
from harness.space import Float, Space
from harness.tasks import imagenet, load_task
from scripts.plain_loops import imagenet as plain_loop
from tests.harness.test_tasks import CONFIG, never, resume, same

CONF = Path(__file__).parents[2] / "conf" / "task" / "imagenet.yaml"
CLASSES = ("n01", "n02", "n03")


def write_tree(folder: Path, n: int = 24, size: int = 48) -> Path:
    """Three classes told apart by their mean colour; images of different shapes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", n), ("val", n // 2)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 90, (size + i % 3 * 8, size, 3), dtype=np.uint8)
                pixels[:, :, label] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{i:03d}.JPEG")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("imagenet"))


def build(tree: Path | None, **changes: Any) -> imagenet.ImageNet:
    small = {"model": "cnn", "image_size": 16, "batch_size": 8, "parts_per_pass": 2, "validation_share": 0.25,
             "loader_workers": 0, "max_epochs": 9, "data_dir": None if tree is None else str(tree)}  # fmt: skip
    task = load_task(yaml.safe_load(CONF.read_text())["task"] | small | changes, "cpu")
    assert isinstance(task, imagenet.ImageNet)
    return task


def test_the_tree_is_split_by_class(tree):
    task = build(tree)
    assert task.sizes == {"train": 54, "validation": 18, "test": 36}
    for paths, labels in task.files.values():
        assert [path.parent.name for path in paths] == [CLASSES[label] for label in labels.tolist()]
    assert not set(task.files["train"][0]) & set(task.files["validation"][0])
    assert build(tree, max_epochs=3).files["train"][0] == task.files["train"][0]
    noisy = build(tree, label_noise=0.5).files["train"][1]
    assert int((noisy != task.files["train"][1]).sum()) == 27


def test_the_epochs_of_a_pass_see_every_image_once(tree):
    task = build(tree, batch_size=9)
    config = task.completed({"lr": 0.1})
    passes = [torch.cat([task.epoch_order(config, 3, epoch) for epoch in pair]) for pair in ((0, 1), (2, 3))]
    for order in passes:
        assert sorted(order.tolist()) == list(range(54))
    assert not torch.equal(*passes)
    with pytest.raises(UserError, match="27 images of an epoch"):
        task.start({"lr": 0.1, "batch_size": 30}, 0)


@pytest.mark.parametrize("model", ["cnn", "vit_tiny"])
def test_it_learns(tree, model):
    run = build(tree, model=model).start({"lr": 0.05, "momentum": 0.9}, 0)
    for _ in range(6):
        trained = run.train_epoch(never)
    assert trained is not None
    assert trained["train_score"] > 0.5
    assert run.evaluate("validation")["score"] > 0.8
    assert run.evaluate("test")["score"] > 0.8


def test_a_run_resumed_inside_a_pass_equals_an_uninterrupted_one_bit_for_bit(tree):
    task = build(tree)
    config = CONFIG | {"clip": 0.5}
    straight, broken = task.start(config, 1), task.start(config, 1)
    for _ in range(3):  # one and a half passes
        assert broken.train_epoch(never) == straight.train_epoch(never)
        broken = resume(task, broken)
    assert same(straight.state_dict(), broken.state_dict())


def test_the_number_of_decoding_processes_changes_nothing(tree):
    alone, helped = build(tree), build(tree, loader_workers=2)
    for (images, labels), (others, answers) in zip(
        *(task.batches(task.completed(CONFIG), 1, 1) for task in (alone, helped)), strict=True
    ):
        assert torch.equal(images, others)
        assert torch.equal(labels, answers)
    assert alone.start(CONFIG, 0).evaluate("test") == helped.start(CONFIG, 0).evaluate("test")


def test_loading_leaves_the_global_generator_alone(tree):
    task = build(tree, loader_workers=2)
    state = torch.get_rng_state()
    next(task.evaluation_batches("test"))
    next(task.batches(task.completed(CONFIG), 0, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_have_the_shapes_and_areas_of_torchvisions():
    generator = np.random.default_rng(0)
    boxes = [imagenet._crop(64, 48, generator) for _ in range(2000)]
    for left, top, width, height in boxes:
        assert left >= 0
        assert top >= 0
        assert left + width <= 64
        assert top + height <= 48
        assert 0.7 < width / height < 1.42
        assert 0.07 < width * height / (64 * 48) <= 1
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.zeros(3, 48, 64), list(imagenet.SCALE), list(imagenet.RATIO))
              for _ in range(2000)]  # fmt: skip
    ours = np.mean([width * height for *_, width, height in boxes])
    assert ours == pytest.approx(np.mean([height * width for *_, height, width in theirs]), rel=0.05)
    assert imagenet._crop(1000, 10, generator)[3] == 10  # no allowed shape fits: the middle


def test_evaluation_takes_the_centre(tmp_path):
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[12:-12, 12:-12] = 200
    Image.fromarray(pixels).save(tmp_path / "x.png")
    images = imagenet.Images([tmp_path / "x.png"], torch.tensor([0]), 28, None)
    assert images[0][0].shape == (3, 28, 28)
    assert int(images[0][0][:, 13:15, 13:15].min()) == 200
    expected = (64 - 2 * 12) / (64 / imagenet.MARGIN)  # of the crop's side
    assert float((images[0][0][0, 14] > 100).float().mean()) == pytest.approx(expected, abs=0.04)


def test_the_gradient_is_that_of_the_objective_in_float64(tree):
    task = build(tree, space="study10", model="vit_tiny")
    config = task.space.sample(rng(1, "test")) | {"lr": 0.05, "clip": 0.5}
    run = task.start(config, 0)
    run.net.double()
    problem = run.problem(Settings(batch_size=8))
    batches = problem.draw(0)
    assert len(batches[0].labels) == len(batches[1].labels) == 8
    space = {name: Coordinate(domain) for name, domain in task.space.domains.items() if isinstance(domain, Float)}
    estimate = lookahead(problem, config, batches, space)
    for name, coordinate in space.items():
        psi, h = coordinate.psi(config[name]), 1e-6 * coordinate.width
        above, below = (
            lookahead_objective(problem, {**config, name: coordinate.value(psi + d)}, batches) for d in (h, -h)
        )
        # bilinear interpolation has kinks, which a small h seldom crosses
        assert estimate.gradient[name] == pytest.approx((above - below) / (2 * h), rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("probe", ["train", "val"])
def test_warm_start_batches_are_disjoint_and_repeatable(tree, probe):
    problem = build(tree).start(CONFIG, 0).problem(Settings(batch_size=12, probe=probe))
    first, second = problem.draw(0)
    again, _ = problem.draw(0)
    assert torch.equal(first.images, again.images)
    assert len(first.labels) == len(second.labels) == 12
    assert not torch.equal(first.images, problem.draw(1)[0].images)


@pytest.mark.parametrize(("model", "parameters"), [("resnet50", 25.6e6), ("vit_s_16", 22.05e6)])
def test_the_networks_are_the_published_ones(model, parameters):
    net = imagenet.build(model, 224, 1000)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.002)


def test_a_network_of_torchvision_trains_and_warm_starts(tree):
    task = build(tree, model="vit_s_16", image_size=32)
    run = task.start(CONFIG, 0)
    problem = run.problem(Settings(batch_size=4))
    space = {name: Coordinate(domain) for name, domain in task.space.domains.items() if isinstance(domain, Float)}
    estimate = lookahead(problem, CONFIG, problem.draw(0), space)
    assert all(np.isfinite(v) and v for v in estimate.gradient.values())


def test_missing_or_wrong_trees_are_users_errors(tree, tmp_path):
    with pytest.raises(UserError, match=r"task\.data_dir.*image-net"):
        build(None)
    with pytest.raises(UserError, match=r"has no folder train; .*image-net"):
        build(tmp_path)
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"val has no folder n01"):
        build(tmp_path)
    with pytest.raises(UserError, match=r"one of resnet50.*, not 'resnet51'"):
        build(tree, model="resnet51")
    with pytest.raises(UserError, match="patches of 16"):
        build(tree, model="vit_s_16", image_size=40)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    write_tree(tmp_path, n=8)
    damaged = tmp_path / "val" / "n02" / "000.JPEG"
    damaged.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"n02/000\.JPEG cannot be read"):
        build(tmp_path, loader_workers=workers).start(CONFIG, 0).evaluate("test")


@pytest.mark.parametrize(("space", "floats", "others"), [("study3", 3, 0), ("study5", 5, 0), ("study10", 10, 0),
                                                         ("mixed", 5, 3), ("continuous", 5, 0)])  # fmt: skip
def test_spaces(space, floats, others):
    spaces = yaml.safe_load(CONF.read_text())["task"]["spaces"]
    chosen = Space.from_spec(spaces[space])
    assert (len(chosen.continuous), len(chosen)) == (floats, floats + others)


def test_the_usual_loop_runs(tree):
    task = yaml.safe_load(CONF.read_text())["task"] | {"data_dir": str(tree), "image_size": 16, "model": "cnn",
                                                       "batch_size": 8}  # fmt: skip
    asked = iter([False, False, True])
    plain_loop.plain_loop(task, CONFIG, torch.device("cpu"), 0)(lambda: next(asked))
    assert list(asked) == []


@pytest.mark.slow
def test_the_command_trains_on_a_tree(tree, tmp_path, harness):
    words = ["task=imagenet", f"task.data_dir={tree}", "task.model=cnn", "task.image_size=16", "task.batch_size=8",
             "task.validation_share=0.25", "task.loader_workers=1", "ohgw=off,normalized", "ohgw.batch_size=8",
             "budget.epochs=4", "n_workers=1", "tracker=none"]  # fmt: skip
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for path in tmp_path.glob("results/*/*normalized*/trials.jsonl")
               for line in path.read_text().splitlines()]  # fmt: skip
    assert records
    assert all(record["length"] == pytest.approx(0.1, rel=0.5) for record in records)
