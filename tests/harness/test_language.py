"""Language modelling: texts, vocabulary, windows, the causal network, runs, and what a warm start is told."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from backends.context import TrialFailed, UserError
from harness.ohgw import Settings, count_flops, lookahead, lookahead_objective, warm_start
from harness.ohgw.coordinates import Coordinate
from harness.seeds import rng
from harness.space import Space
from harness.tasks import language, load_task
from scripts.plain_loops import language as plain_loop
from tests.harness.test_tasks import never, resume, same

CONF = Path(__file__).parents[2] / "conf" / "task"
CONFIG = {"lr": 1e-2, "wd": 0.05, "momentum": 0.9, "label_smoothing": 0.1, "optimizer": "adamw"}
DROPOUT = {"dropout": 0.2, "embedding_dropout": 0.1, "attention_dropout": 0.1}
SGD = CONFIG | {"optimizer": "sgd", "lr": 0.3, "clip": 0.3}
SENTENCES = " the cat sat on the mat \n\n the dog sat on <unk> \n a cat saw the dog \n"


def spec(name: str, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["task"] | changes


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """20,000 bytes of Python's help."""
    file = tmp_path_factory.mktemp("text") / "some, text.txt"
    file.write_bytes(language.python_topics()[:20_000])
    return file


@pytest.fixture
def text(text_file):
    return build(text_file)


def build(text_file: Path, **changes: Any) -> language.LanguageTask:
    small = {"text_file": str(text_file), "context": 16, "batch_size": 16, "parts_per_pass": 3}
    task = load_task(spec("text", **small | changes), "cpu")
    assert isinstance(task, language.LanguageTask)
    return task


def write_wikitext(folder: Path, name: str = "wikitext-103") -> str:
    (folder / name).mkdir(parents=True)
    for part, repeats in (("train", 60), ("valid", 20), ("test", 20)):
        (folder / name / f"wiki.{part}.tokens").write_text(SENTENCES * repeats, encoding="utf-8")
    return str(folder)


def build_wikitext(folder: str | None, name: str = "wikitext103", **changes: Any) -> language.LanguageTask:
    small = {"data_dir": folder, "model": "transformer_tiny", "context": 8, "batch_size": 4, "parts_per_pass": 2}
    task = load_task(spec(name, **small | changes), "cpu")
    assert isinstance(task, language.LanguageTask)
    return task


# texts


def test_a_text_is_split_into_three_parts_in_its_order(text, text_file):
    assert b"".join(bytes(stream.tolist()) for stream in text.streams.values()) == text_file.read_bytes()
    assert [len(stream) for stream in text.streams.values()] == [16_000, 2_000, 2_000]


def test_pythons_help_is_some_english_without_repeated_paragraphs():
    content = language.python_topics()
    assert content == language.python_topics()
    assert 100_000 < len(content) < 2_000_000
    assert b"statement" in content
    paragraphs = content.split(b"\n\n")
    assert len(paragraphs) == len(set(paragraphs))


def test_building_a_task_imports_neither_the_topics_nor_the_compiler():
    code = (
        "import sys, torch; from harness.tasks import language, optimizers\n"
        "net = language.build('transformer_tiny', len(set(language.python_topics())), 8)\n"
        "optimizers.AdamW(net, {'wd': 0, 'lr': 1, 'momentum': 0, 'beta2': 0.9})\n"
        "language._reproducible_attention()  # as on a GPU\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "print([m for m in ('pydoc_data', 'sklearn', 'torch._dynamo', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parents[1], check=True)
    assert out.stdout.strip() == "[]"


def test_a_text_that_is_not_there_or_too_short_is_a_users_error(text_file, tmp_path):
    with pytest.raises(UserError, match=r"task\.text_file=.*nothing\.txt cannot be read: No such file"):
        build(tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_bytes(b"x" * 200)
    with pytest.raises(UserError, match=r"validation part has 20 tokens, too few for task\.context=16"):
        build(tmp_path / "short.txt")
    with pytest.raises(UserError, match=r"transformer_tiny.*not 'lstm'"):
        build(text_file, model="lstm")


def test_the_vocabulary_is_the_most_frequent_words_of_the_training_part(tmp_path):
    file = tmp_path / "train"
    file.write_text(SENTENCES, encoding="utf-8")
    stream, words = language.learn_vocabulary(file, 5)
    expected = SENTENCES.replace("\n", " <eos> ").split()
    assert list(words) == ["the", "<eos>", "cat", "sat", "<unk>"]  # of those that are there twice the first
    assert stream.tolist() == [words.get(word, 4) for word in expected]
    (tmp_path / "test").write_text("the zebra sat", encoding="utf-8")
    assert language.encode(tmp_path / "test", words).tolist() == [0, 4, 3]


def test_all_words_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "train").write_text("b a\u0085c a\n", encoding="utf-8")
    stream, words = language.learn_vocabulary(tmp_path / "train", 100)
    assert list(words) == ["a", "b", "c", "<eos>", "<unk>"]
    assert stream.tolist() == [1, 0, 2, 0, 3]
    monkeypatch.setattr(language, "READ", 1)  # line by line
    (tmp_path / "train").write_text(SENTENCES, encoding="utf-8")
    pieces, _ = language.learn_vocabulary(tmp_path / "train", 5)
    monkeypatch.undo()
    assert np.array_equal(pieces, language.learn_vocabulary(tmp_path / "train", 5)[0])


def test_wikitext_is_read_from_its_three_files(tmp_path):
    task = build_wikitext(write_wikitext(tmp_path))
    words = len(SENTENCES.replace("\n", " <eos> ").split())
    assert {part: len(stream) for part, stream in task.streams.items()} == {
        "train": 60 * words,
        "validation": 20 * words,
        "test": 20 * words,
    }
    assert task.streams["train"].dtype == torch.int16
    assert task.vocabulary == len({*SENTENCES.split(), "<eos>"})
    names = [f"wikitext-103/wiki.{part}.tokens" for part in ("test", "valid", "train")]
    assert len(build_wikitext(str(tmp_path), data_files=names).streams["test"]) == 60 * words


@pytest.mark.skipif("OHGW_DATA_DIR" not in os.environ, reason="OHGW_DATA_DIR names no folder with the real data")
def test_real_wikitext2():
    folder = Path(os.environ["OHGW_DATA_DIR"])
    found = [f"wikitext-2/{part}.txt" for part in ("train", "valid", "test")]
    if not (folder / found[0]).exists():
        pytest.skip("no WikiText-2 there")
    task = build_wikitext(str(folder), "wikitext2", data_files=found, vocabulary=50_000)
    assert [len(stream) for stream in task.streams.values()] == [2_088_628, 217_646, 245_569]
    assert task.vocabulary == 33_278  # as Merity et al. count


@pytest.mark.parametrize("name", ["wikitext103", "wikitext2"])
def test_missing_data_name_the_file_and_the_command(name, tmp_path):
    with pytest.raises(UserError, match=r"task\.data_dir.*wiki\.train\.tokens; fetch it with: curl .*zip"):
        build_wikitext(None, name)
    with pytest.raises(UserError, match=rf"{tmp_path} has no wikitext-.*/wiki\.train\.tokens.*{tmp_path}"):
        build_wikitext(str(tmp_path), name)


def test_wrong_files_are_users_errors(tmp_path):
    folder = write_wikitext(tmp_path)
    with pytest.raises(UserError, match="must be three files"):
        build_wikitext(folder, data_files=["wikitext-103/wiki.test.tokens"])
    (tmp_path / "wikitext-103" / "wiki.valid.tokens").write_bytes(b"the cat \xff\xff")
    with pytest.raises(UserError, match=r"wiki\.valid\.tokens is no text in UTF-8: .* at byte 8"):
        build_wikitext(folder)


# windows


def test_the_epochs_of_a_pass_see_every_window_once(text):
    config = text.completed(CONFIG | {"batch_size": 1})
    passes = [[text.epoch_windows(config, 3, epoch) for epoch in three] for three in ((0, 1, 2), (3, 4, 5))]
    for epochs in passes:
        assert len({offset for offset, _ in epochs}) == 1
        order = torch.cat([windows for _, windows in epochs]).tolist()
        assert len(order) == len(set(order)) == text.sizes["train"] // 3 * 3
    assert not torch.equal(passes[0][0][1], passes[1][0][1])
    assert len({text.epoch_windows(config, seed, 0)[0] for seed in range(20)}) > 5


def test_labels_are_the_tokens_that_follow(text):
    for offset in (0, 15):
        every = torch.arange(text.sizes["train"])
        tokens, labels = text.windows("train", every, offset)
        assert torch.equal(tokens.flatten(), text.streams["train"][offset : offset + tokens.numel()].long())
        assert torch.equal(labels.flatten(), text.streams["train"][offset + 1 : offset + 1 + tokens.numel()].long())
    assert len(list(text.batches(text.completed(CONFIG), 0, 0))) == text.steps_per_epoch(text.completed(CONFIG))


@pytest.mark.parametrize("context", [16, 13, 1999 // 2])
def test_every_token_of_a_part_is_predicted_once(text_file, context):
    task = build(text_file, context=context, batch_size=1)
    batches = list(task.evaluation_batches("validation"))
    labels = torch.cat([labels for _, labels in batches]).flatten()
    assert torch.equal(labels[labels != language.IGNORED], task.streams["validation"][1:].long())
    assert sum(len(tokens) for tokens, _ in batches) == task.sizes["validation"]


def test_the_score_is_the_perplexity_of_all_tokens(text, monkeypatch):
    run = text.start(CONFIG | DROPOUT, 0)
    found = run.evaluate("validation")
    stream = text.streams["validation"].long()
    losses = [F.cross_entropy(run.net(stream[i : i + 16][None])[0][: len(stream[i + 1 : i + 17])],
                              stream[i + 1 : i + 17], reduction="sum").item() for i in range(0, 1999, 16)]  # fmt: skip
    assert found["loss"] == pytest.approx(sum(losses) / 1999, rel=1e-5)
    assert found["score"] == pytest.approx(math.exp(found["loss"]))
    monkeypatch.setattr(language, "EVALUATION_LOGITS", {"cpu": 1})
    assert run.evaluate("validation")["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_label_noise_changes_that_share_of_what_is_to_be_predicted(text, text_file):
    noisy = build(text_file, label_noise=0.25)
    changed = noisy.targets["train"] != text.targets["train"]
    assert int(changed.sum()) == 4_000
    assert torch.equal(noisy.streams["train"], text.streams["train"])
    assert torch.equal(noisy.targets["test"], text.targets["test"])
    tokens, labels = next(noisy.batches(noisy.completed(CONFIG), 0, 0))
    assert float((tokens[:, 1:] != labels[:, :-1]).float().mean()) == pytest.approx(0.25, abs=0.1)


def test_a_batch_must_fit_into_an_epoch(text):
    with pytest.raises(UserError, match="batch_size=400 is more than the 333 windows of an epoch"):
        text.start(CONFIG | {"batch_size": 400}, 0)
    with pytest.raises(UserError, match="1000000"):
        text.start(CONFIG | {"batch_size": 1_000_000}, 0)


# network


def test_the_network_does_not_see_the_future(text):
    net = text.network(0)
    tokens = torch.arange(32).view(2, 16)
    changed = tokens.clone()
    changed[:, 9:] += 7
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_default_has_about_ten_million_parameters():
    options = spec("wikitext103")
    net = language.build(options["model"], options["vocabulary"], options["context"])
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(9.8e6, rel=0.01)
    with torch.no_grad():
        loss = F.cross_entropy(net(torch.arange(64).view(1, 64)).flatten(0, 1), torch.arange(64, 128))
    assert float(loss) == pytest.approx(math.log(options["vocabulary"]), rel=0.05)  # knows nothing yet


def test_initial_weights_depend_on_the_seed_alone(text):
    state = torch.get_rng_state()
    weights = text.start(CONFIG, 3).net.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert same(dict(text.start({"lr": 1.0}, 3).net.state_dict()), dict(weights))
    assert not torch.equal(text.network(4).tokens.weight, weights["tokens.weight"])


# runs


@pytest.mark.parametrize("config", [CONFIG, SGD, CONFIG | DROPOUT], ids=["adamw", "sgd", "dropout"])
def test_it_learns(text, config):
    run = text.start(config | {"label_smoothing": 0.0}, 0)
    before = run.evaluate("test")["score"]
    scores = [run.train_epoch(never)["train_score"] for _ in range(2)]
    assert scores[1] < scores[0] < before
    assert run.evaluate("test")["score"] < 0.6 * before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(text_file, precision):
    task = build(text_file, precision=precision, label_noise=0.1)
    config = CONFIG | DROPOUT | {"clip": 0.5, "warmup": 0.1, "schedule": "cosine", "beta2": 0.99}
    straight, broken = task.start(config, 1), task.start(config, 1)
    for _ in range(2):
        assert broken.train_epoch(never) == straight.train_epoch(never)
        assert broken.evaluate("validation") == straight.evaluate("validation")
        broken = resume(task, broken)
        torch.rand(3)  # dropout draws from a stream of its own
    assert same(straight.state_dict(), broken.state_dict())


def test_flops_are_those_of_an_epoch(text):
    run, reported = text.start(CONFIG, 0), []
    with sdpa_kernel(SDPBackend.MATH):
        counted = count_flops(lambda: reported.append(run.train_epoch(never)))
    assert reported[0]["flops"] == counted


@pytest.mark.parametrize("loss", [701.0, math.inf, math.nan])
def test_a_perplexity_that_is_not_finite_fails_the_trial(loss, text):
    with pytest.raises(TrialFailed, match="no finite perplexity"):
        text.scores(torch.tensor([loss, 1.0], dtype=torch.float64), 1)
    with pytest.raises(TrialFailed, match="no finite perplexity"):
        text.train_score([], [], loss)
    assert language.perplexity(language.LARGEST_LOSS) < math.inf


def test_divergence_fails_the_trial(text):
    run = text.start(SGD | {"lr": 1e12, "clip": 1e9}, 0)
    with pytest.raises(TrialFailed):
        run.train_epoch(never)


# the problem of a warm start


def problem_of(text_file, config, batch_size=8, *, double=True, **changes):
    run = build(text_file, **changes).start(config, 0)
    if double:
        run.net.double()
    return run.problem(Settings(batch_size=batch_size))


def test_fused_and_plain_attention_have_the_same_losses(text):
    """A warm start runs under the plain one, since the fused kernels have no second derivative; training does not."""
    net, (tokens, labels) = text.network(0), text.sample(8)
    losses, gradients = [], []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(kernel):
            loss = text.criterion(net(tokens), labels, {"label_smoothing": 0.1})
            losses.append(loss.item())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_training_loss_of_the_problem_is_the_trainers(text_file):
    run = build(text_file, space="study5").start(CONFIG | {"dropout": 0.3}, 0)
    problem = run.problem(Settings(batch_size=8))
    batch, probe = problem.draw(0)
    torch.manual_seed(batch.seed)
    output = run.task.forward(run.net, batch.tokens, run.config)
    expected = F.cross_entropy(output.flatten(0, 1), batch.labels.flatten(), label_smoothing=0.1)
    state = torch.get_rng_state()
    # the problem's other two rates are constants of 0
    torch.testing.assert_close(problem.train_loss(run.net, batch, {}), expected)
    assert torch.equal(torch.get_rng_state(), state)
    plain = F.cross_entropy(run.net(probe.tokens).flatten(0, 1), probe.labels.flatten())
    torch.testing.assert_close(problem.probe_loss(run.net, probe), plain)


def test_the_dropout_rate_of_a_coordinate_is_felt_and_its_masks_are_common(text_file):
    problem = problem_of(text_file, CONFIG | DROPOUT, space="study10")
    batch, _ = problem.draw(0)

    def loss(**rates: float) -> float:
        z = {name: torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}
        return problem.train_loss(problem.model, batch, z).item()

    for name in DROPOUT:
        assert loss(**{name: 0.3}) != loss(**{name: 0.2})
        assert loss(**{name: 0.3}) == loss(**{name: 0.3})
        assert loss(**{name: 0.0}) == pytest.approx(loss(**{name: 1e-5}), rel=1e-4)  # the others' masks stay
    none = dict.fromkeys(DROPOUT, 0.0)
    smoothed = F.cross_entropy(problem.model(batch.tokens).flatten(0, 1), batch.labels.flatten(), label_smoothing=0.1)
    assert loss(**none) == pytest.approx(smoothed.item(), rel=1e-4)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_a_larger_rate_drops_what_a_smaller_one_did(device):
    x = torch.ones(1000, 100, device=device)
    kept = []
    for rate in (language.SMALLEST_RATE, 0.1, 0.11, 0.5):
        with language._seeded(3, torch.device(device)):
            kept.append(language.dropped(x, rate) != 0)
    for few, many in zip(kept[1:], kept, strict=False):
        assert bool((few <= many).all())
        assert int(few.sum()) < int(many.sum())


@pytest.mark.parametrize("config", [CONFIG, SGD], ids=["adamw", "sgd"])
def test_the_gradient_is_that_of_the_objective_in_float64(text_file, config):
    config = config | {"clip": 0.3, "dropout": 0.2}
    problem = problem_of(text_file, config)
    batches = problem.draw(0)
    domains = Space.from_spec(spec("text")["spaces"]["continuous"]).continuous
    space = {name: Coordinate(domain) for name, domain in domains.items() if name in problem.movable}
    assert set(space) == {"lr", "wd", "momentum", "label_smoothing", "clip", "dropout"}
    estimate = lookahead(problem, config, batches, space)
    for name, coordinate in space.items():
        h = (problem.h if name == "dropout" else 1e-5) * coordinate.width
        psi = coordinate.psi(config[name])
        above, below = (
            lookahead_objective(problem, {**config, name: coordinate.value(psi + d)}, batches) for d in (h, -h)
        )
        assert estimate.gradient[name] == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-9), name
    assert estimate.gradient["lr"]
    assert estimate.gradient["dropout"]
    assert (abs(estimate.gradient["clip"]) > 1e-4) == (config["optimizer"] == "sgd")


def test_a_warm_start_needs_no_fallback_and_leaves_the_run_alone(text_file):
    task = build(text_file, space="study10")
    config = task.space.sample(rng(0, "test")) | {"lr": 0.01}
    vanilla, run = task.start(config, 0), task.start(config, 0)
    settings = Settings(estimator="lookahead", step="normalized", eta=0.1, batch_size=16)
    result = warm_start(config, task.space, run.problem(settings), settings)
    assert (result.estimator, result.fallback) == ("lookahead", None)
    assert set(result.gradient) == {"lr", "wd", "momentum", "clip", "label_smoothing", *DROPOUT}  # not warmup, beta2
    assert all(np.isfinite(v) for v in result.gradient.values())
    again = warm_start(config, task.space, task.start(config, 0).problem(settings), settings)
    assert again.config == result.config
    assert run.train_epoch(never) == vanilla.train_epoch(never)


@pytest.mark.parametrize("probe", ["train", "val"])
def test_warm_start_batches_are_disjoint_and_repeatable(text_file, probe):
    task = build(text_file)
    largest = task.largest_warm_start(probe)
    assert largest == (499 if probe == "train" else 124)
    problem = task.start(CONFIG, 0).problem(Settings(batch_size=largest, probe=probe))
    first, second = problem.draw(0)
    again, _ = problem.draw(0)
    assert torch.equal(first.tokens, again.tokens)
    assert first.seed == again.seed != problem.draw(1)[0].seed
    assert first.tokens.shape == second.labels.shape == (largest, 16)
    assert int(second.labels.min()) >= 0
    with pytest.raises(UserError, match="more than this task has"):
        task.start(CONFIG, 0).problem(Settings(batch_size=largest + 1, probe=probe))


# the families' presets and loops


@pytest.mark.parametrize("name", ["text", "wikitext103", "wikitext2"])
def test_spaces(name):
    spaces = {key: Space.from_spec(entry) for key, entry in spec(name)["spaces"].items()}
    sizes = {key: (len(space.continuous), len(space)) for key, space in spaces.items()}
    assert sizes == {"study3": (3, 3), "study5": (5, 5), "study7": (7, 7), "study10": (10, 10), "mixed": (7, 10),
                     "continuous": (7, 7)}  # fmt: skip
    assert spaces["continuous"].continuous == spaces["mixed"].continuous
    assert all(space.constants == {"optimizer": "adamw"} for key, space in spaces.items() if key != "mixed")


@pytest.mark.parametrize("config", [CONFIG | DROPOUT | {"clip": 1.0}, SGD], ids=["adamw", "sgd"])
def test_the_usual_loop_runs(text_file, config):
    options = spec("text", text_file=str(text_file), context=16)
    asked = iter([False, False, True])
    plain_loop.plain_loop(options, config, torch.device("cpu"), 0)(lambda: next(asked))
    assert list(asked) == []
    assert plain_loop.units_per_step(options, config) == 16 * 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "wikitext2"])
def test_the_command_trains_and_warm_starts(name, text_file, tmp_path, harness):
    words = [f"task={name}", "scheduler=asha", "ohgw=off,normalized", "ohgw.batch_size=16", "budget.epochs=4",
             "n_workers=1", "backend.threads=1", "tracker=none", "task.parts_per_pass=4"]  # fmt: skip
    if name == "text":
        words += [f"task.text_file={text_file}", "task.context=16"]
    else:
        data = write_wikitext(tmp_path / "data", "wikitext-2")
        words += [f"task.data_dir={data}", "task.context=4", "task.batch_size=4", "task.model=transformer_tiny"]
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for path in tmp_path.glob("results/*/*normalized*/trials.jsonl")
               for line in path.read_text().splitlines()]  # fmt: skip
    assert records
    assert all(record["estimator"] == "lookahead" for record in records)
    assert all("dropout" in record["gradient"] for record in records)
