"""``backend=simulated``: the real command in virtual time; what is reused, what comes out the same, interrupts."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import curves
from harness.sweep import make_plan
from tests.conftest import read_lines
from tests.harness.test_faults import wait_for

BARE = ["backend=simulated", "task.model=mlp"]
SMALL = [*BARE, "n_workers=4", "budget.epochs=40"]


def cells(tmp_path: Path, name: str = "default") -> dict[str, Path]:
    return {p.name: p for p in (tmp_path / "results" / name).iterdir() if p.is_dir() and p.name[0] != "."}


def same_events(tmp_path: Path, one: str, other: str) -> bool:
    a, b = cells(tmp_path, one), cells(tmp_path, other)
    assert set(a) == set(b)
    return all((a[cell] / "events.jsonl").read_bytes() == (b[cell] / "events.jsonl").read_bytes() for cell in a)


def counts(output: str) -> tuple[int, ...]:
    """(trainings asked, epochs, trainings run, epochs run, reused) as printed at the end."""
    (line,) = (line for line in output.splitlines() if line.startswith("curve store"))
    return tuple(int(word.strip("(,")) for word in line.split() if word.strip("(,").isdigit())


@pytest.mark.slow
def test_twice_is_byte_identical_and_random_schedulers_share_trials(tmp_path, harness):
    words = [*SMALL, "scheduler=random,asha,pasha,hyperband", "ohgw=off,normalized", "seed=0..1"]
    first = harness(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    asked, epochs, run, _, reused = counts(first.stdout)
    assert epochs == 16 * 40
    assert asked == run + reused
    assert run < 0.6 * asked, "the schedulers of one seed and variant share trials"
    again = harness(*words, "name=again")
    assert again.returncode == 0, again.stdout + again.stderr
    assert counts(again.stdout)[2:4] == (0, 0)
    assert "starting" not in again.stdout, "a warm store needs no workers"
    assert same_events(tmp_path, "default", "again")
    wide = harness(*BARE, "budget.epochs=40", "scheduler=asha", "ohgw=off", "n_workers=64", "name=wide")
    assert wide.returncode == 0, wide.stdout + wide.stderr


@pytest.mark.slow
def test_training_without_its_checkpoint_begins_with_the_same_warm_start(tmp_path, harness):
    """A trial resumed with x' that has rows in the store but no checkpoint: x is warm-started, not x' once more."""
    words = [*BARE, "scheduler=asha", "ohgw=normalized", "n_workers=4", "backend.max_gib=0"]
    for epochs in (4, 30):  # the second command needs more of the first one's trials
        assert harness(*words, f"budget.epochs={epochs}", f"name=to{epochs}").returncode == 0
    fresh = harness(*words, "budget.epochs=30", "name=fresh", "backend.store=fresh.sqlite")
    assert fresh.returncode == 0
    curves = []
    for name in ("to30", "fresh"):
        (cell,) = cells(tmp_path, name).values()
        reports = [e for e in read_lines(cell / "events.jsonl") if e["e"] == "report"]
        curves.append({(e["trial"], e["result"]["epoch"]): e["result"]["train_loss"] for e in reports})
    both = curves[0].keys() & curves[1].keys()
    assert len(both) > 15
    assert any(epoch == 3 for _, epoch in both)
    assert all(curves[0][key] == curves[1][key] for key in both)


def test_virtual_trials_report_what_live_ones_do(tmp_path, harness):
    words = [
        "task.model=mlp",
        "n_workers=1",
        "backend.threads=1",
        "budget.epochs=30",
        "scheduler=asha",
        "ohgw=normalized",
    ]
    for backend in ("pool", "simulated"):
        assert harness(*words, f"backend={backend}", f"name={backend}").returncode == 0
    seen = []
    for backend in ("pool", "simulated"):
        (cell,) = cells(tmp_path, backend).values()
        reports = [event for event in read_lines(cell / "events.jsonl") if event["e"] == "report"]
        kept = ("epoch", "train_loss", "validation_loss", "validation_score", "test_score")
        seen.append([(e["trial"], e["decision"], [e["result"][k] for k in kept]) for e in reports])
        for event in reports:
            first = event["result"]["epoch"] == 1
            assert ("warm_start" in event["result"]) == first
            assert (event["result"]["busy"]["startup"] > 0) == (first or event["result"]["epoch"] in (2, 4, 10))
    assert seen[0] == seen[1]


def test_time_is_the_sum_of_what_the_reports_cost(tmp_path, harness):
    done = harness(*BARE, "budget.epochs=40", "scheduler=asha", "n_workers=1", "ohgw=on")
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = cells(tmp_path).values()
    total = 0.0
    for event in read_lines(cell / "events.jsonl"):
        if event["e"] == "report":
            total += sum(event["result"]["busy"].values())
            assert event["t"] == pytest.approx(total, abs=1e-5)
    summary = json.loads((cell / "summary.json").read_text())
    assert summary["wallclock"] == pytest.approx(total, abs=1e-5)
    lines = read_lines(cell / "decisions.jsonl")
    assert summary["decision_seconds"]["suggestions"] == len(lines) > 0
    assert summary["decision_seconds"]["suggest"] == pytest.approx(sum(line["suggest"] for line in lines))


@pytest.mark.slow
def test_charged_decisions_take_virtual_time(tmp_path, harness):
    words = [*SMALL, "scheduler=asha", "ohgw=off"]
    assert harness(*words, "name=free").returncode == 0
    assert harness(*words, "name=charged", "backend.charge_decisions=true").returncode == 0
    (free,), (charged,) = cells(tmp_path, "free").values(), cells(tmp_path, "charged").values()
    starts = [[e["t"] for e in read_lines(c / "events.jsonl") if e["e"] == "start"][:4] for c in (free, charged)]
    assert starts[0] == [0.0] * 4
    assert 0.0 < starts[1][0] < starts[1][1] < starts[1][2] < starts[1][3]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL])
def test_an_interrupted_cell_comes_out_the_same(how, tmp_path, start_harness, harness):
    words = [*SMALL, "scheduler=asha", "ohgw=normalized", "seed=0..1"]
    process = start_harness(*words)

    def half_way() -> bool:
        folders = cells(tmp_path).values() if (tmp_path / "results" / "default").exists() else []
        return any(len(read_lines(cell / "events.jsonl")) > 20 for cell in folders if (cell / "events.jsonl").exists())

    wait_for(half_way)
    process.send_signal(how)
    process.wait(60)
    again = harness(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    fresh = harness(*words, "name=fresh")
    assert counts(fresh.stdout)[2] == 0
    assert same_events(tmp_path, "default", "fresh")


@pytest.mark.slow
def test_two_commands_share_one_store(tmp_path, start_harness, harness):
    words = [*SMALL, "scheduler=asha", "ohgw=off", "seed=0..2"]
    other = start_harness(*words, "name=other")
    assert harness(*words, "name=mine").returncode == 0
    assert other.wait(120) == 0
    assert same_events(tmp_path, "mine", "other")


def test_a_fit_that_fails_is_in_the_record_and_ends_nothing(tmp_path, monkeypatch, capsys):
    import torch

    from harness.runner import run_sweep
    from harness.schedulers.bo import resource_gp

    fit, calls = resource_gp.fit, []

    def sometimes(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise torch.linalg.LinAlgError("the input matrix is singular")
        return fit(*arguments)

    monkeypatch.setattr(resource_gp, "fit", sometimes)
    plan = make_plan([*SMALL, "scheduler=hyperband_bo", "ohgw=off", f"results_dir={tmp_path / 'results'}"])
    assert run_sweep(plan) == 0
    (cell,) = cells(tmp_path).values()
    origins = [e["origin"] for e in read_lines(cell / "events.jsonl") if e["e"] == "start"]
    assert [origin["by"] for origin in origins[:7]] == ["random"] * 6 + ["model"]
    failed = [origin for origin in origins if "failure" in origin]
    assert failed
    assert all(origin["by"] == "last_model" and "singular" in origin["failure"] for origin in failed)
    assert json.loads((cell / "summary.json").read_text())["model_failures"] == len(failed)
    assert f"{len(failed)} model fits failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["save_model=best"], "save_model must be none with backend=simulated"),
        (["backend.max_gib=-1"], "backend.max_gib must be a number >= 0"),
        (["backend.charge_decisions=maybe"], "backend.charge_decisions must be true or false"),
        (["backend.store=pyproject.toml"], "cannot use"),
    ],
)
def test_mistakes(words, message, tmp_path, harness):
    (tmp_path / "pyproject.toml").write_text("[project]\n" * 200)
    done = harness(*SMALL, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_where_the_store_lies_does_not_make_another_cell():
    (one,), (other,), (charged,) = (
        make_plan([*SMALL, word]).cells
        for word in ("backend.store=/tmp/a.sqlite", "backend.max_gib=1", "backend.charge_decisions=true")
    )
    assert one.identity == other.identity != charged.identity


def write(folder: Path, **sources: str) -> None:
    package = folder / "toytasks"
    package.mkdir(exist_ok=True)
    for name, text in {"__init__": "", **sources}.items():
        (package / f"{name}.py").write_text(text)


def test_the_code_version_follows_the_code_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    versions: dict[str, Any] = {}

    def version(name: str, warm: bool = False, **sources: str) -> None:
        write(tmp_path, **sources)
        for module in [m for m in sys.modules if m.startswith("toytasks")]:
            del sys.modules[module]
        curves.code_version.cache_clear()
        versions[name] = curves.code_version("toytasks.task.Toy", warm)

    task = "from toytasks.net import build\nclass Toy:\n    x = 1\n"
    version("first", task=task, net="build = 1\n", other="y = 1\n")
    version("comment", task="# a comment\n" + task)
    version("other", other="y = 2\n")
    version("import", net="build = 2\n")
    version("task", net="build = 1\n", task=task.replace("x = 1", "x = 2"))
    version("back", task=task)
    version("warm", warm=True)
    assert versions["first"] == versions["comment"] == versions["other"] == versions["back"]
    assert len({versions[name] for name in ("first", "import", "task", "warm")}) == 4


def test_a_curve_is_addressed_by_what_decides_it():
    def identity(*words: str) -> str:
        (cell,) = make_plan([*BARE, *words]).cells
        return json.dumps(curves.curve_identity(cell), sort_keys=True)

    base = identity("ohgw=off")
    same = [
        "scheduler=random",
        "n_workers=7",
        "budget.epochs=9",
        "task.tau=0.5",
        "seed=3",
        "backend.charge_decisions=true",
    ]
    assert all(identity("ohgw=off", word) == base for word in same)
    other = [
        "task.max_epochs=9",
        "task.batch_size=16",
        "task.label_noise=0.1",
        "task.space=study3",
        "task.schedule=cosine",
        "backend.threads=2",
    ]
    assert len({base, identity("ohgw=on"), *(identity("ohgw=off", word) for word in other)}) == len(other) + 2
