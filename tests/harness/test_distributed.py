"""A trial on several processes is the same trial, ends as cleanly and goes on as exactly."""

import contextlib
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from backends.context import TrialFailed, UserError
from backends.local import LocalTrialBackend
from backends.pool import PoolBackend, WorkerPool
from harness.tasks import distributed, load_task, supervised
from harness.trial import one_warm_start, warm_start_flops
from tests.backends.conftest import finish, is_alive, wait_until
from tests.conftest import read_lines
from tests.harness.shared_tasks import Mortal

CONF = Path(__file__).parents[2] / "conf" / "task"
CONFIG = {"lr": 0.1, "wd": 1e-3, "momentum": 0.9, "augmentation": 0.4, "label_smoothing": 0.1}
OHGW = {"estimator": "lookahead", "step": "normalized", "eta": 0.1, "batch_size": 64}
TASKS = "tests.harness.shared_tasks"


def spec(kind: str, processes: int, **changes: Any) -> dict[str, Any]:
    digits = yaml.safe_load((CONF / "digits.yaml").read_text())["task"]
    return digits | {"_target_": f"{TASKS}.{kind}", "model": "mlp", "gpus_per_trial": processes} | changes


def never() -> bool:
    return False


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    distributed.close()
    torch.set_num_threads(threads)


def trained(task: Any, config: dict[str, Any], epochs: int) -> tuple[Any, list[dict[str, Any]]]:
    run = task.start(config, 3)
    reports = []
    for _ in range(epochs):
        report = run.train_epoch(never)
        assert report is not None
        reports.append(report | run.evaluate("validation"))
    return run, reports


def weights(run: Any) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in run.state_dict()["net"].values()])


@pytest.mark.parametrize("model", ["mlp", "groupnorm"])
@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw", "lr": 1e-3, "clip": 0.5}])
def test_two_processes_train_the_trial_of_one(model, more):
    one, two = (load_task(spec("DoubleDigits", k, model=model), "cpu") for k in (1, 2))
    config = CONFIG | more
    (alone, expected), (shared, reports) = (trained(task, config, 2) for task in (one, two))
    for ours, theirs in zip(reports, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)  # scores are float32
    assert weights(shared) == pytest.approx(weights(alone), rel=1e-9, abs=1e-11)
    assert shared.epoch == 2


@pytest.mark.parametrize("ohgw", [{}, {"estimator": "direct"}, {"estimator": "finite_difference"}, {"probe": "val"},
                                  {"n_steps": 2}])  # fmt: skip
def test_the_hyper_gradient_is_that_of_the_whole_batch(ohgw):
    settings = [{"task": spec("DoubleDigits", k), "ohgw": OHGW | ohgw} for k in (1, 2)]
    found, flops = [], []
    for chosen in settings:
        task = load_task(chosen["task"], "cpu")
        run = task.start(CONFIG, 3)
        found.append(one_warm_start(CONFIG, task, run, chosen, 3))
        flops.append(warm_start_flops(CONFIG, task, run, chosen, 3, found[-1].estimator))
    alone, shared = found
    assert shared.estimator == alone.estimator == (OHGW | ohgw)["estimator"]
    rounding = 1e-5 if "finite_difference" in ohgw.values() else 1e-9
    assert shared.gradient == pytest.approx(alone.gradient, rel=rounding, abs=1e-9)
    assert shared.loss == pytest.approx(alone.loss, rel=1e-9)
    assert shared.config == pytest.approx(alone.config, rel=1e-5)
    assert flops[0] == flops[1] > 0


def test_a_trial_of_two_processes_resumes_bit_for_bit():
    task = load_task(spec("Faulty", 2, model="cnn"), "cpu")
    config = CONFIG | {"momentum": 0.0}
    whole, reports = trained(task, config, 2)
    state, expected = whole.state_dict(), whole.evaluate("test")
    first, _ = trained(task, config, 1)
    saved = {"net": {k: v.clone() for k, v in first.state_dict()["net"].items()},
             "optimizer": [v.clone() for v in first.state_dict()["optimizer"]],
             "epoch": 1, "scaler": first.state_dict()["scaler"]}  # fmt: skip
    other = task.start(config | {"lr": 0.3}, 5)  # another trial meanwhile
    other.train_epoch(never)
    resumed = task.start(config, 3)
    resumed.load_state_dict(saved)
    assert (resumed.train_epoch(never) or {}) | resumed.evaluate("validation") == reports[1]
    assert all(torch.equal(value, resumed.state_dict()["net"][name]) for name, value in state["net"].items())
    assert resumed.evaluate("test") == expected
    with pytest.raises(RuntimeError, match="train another one"):
        other.train_epoch(never)


def test_batch_norm_evaluates_the_mean_of_the_processes_statistics():
    task = load_task(spec("DoubleDigits", 2, model="cnn"), "cpu")
    assert isinstance(task, distributed.SharedTask)
    run = task.start(CONFIG | {"lr": 1e-12, "augmentation": 0.0}, 3)
    run.train_epoch(never)
    means = {name: value for name, value in run.state_dict()["net"].items() if name.endswith("running_mean")}
    whole = load_task(spec("DoubleDigits", 1, model="cnn"), "cpu").start(CONFIG | {"lr": 1e-12, "augmentation": 0.0}, 3)
    whole.train_epoch(never)  # the mean over a batch is the mean of those over its halves; variances differ
    first, *_ = means
    assert means[first] == pytest.approx(whole.state_dict()["net"][first], rel=1e-6, abs=1e-9)


def test_stops_and_failures_leave_the_processes_fit_for_the_next_trial():
    task = load_task(spec("Faulty", 2), "cpu")
    config = CONFIG | {"momentum": 0.0}
    _, expected = trained(task, config, 1)
    (team,) = distributed._current
    calls = iter([False] * 5 + [True] * 100)
    assert task.start(config, 4).train_epoch(lambda: next(calls)) is None
    with pytest.raises(TrialFailed, match="training loss is"):
        task.start(config | {"lr": 1e30}, 4).train_epoch(never)
    with pytest.raises(UserError, match="batch_size=33 cannot be shared"):
        task.start(config | {"batch_size": 33}, 4)
    assert trained(task, config, 1)[1] == expected
    assert distributed._current == [team], "none of this costs new processes"


def test_an_error_that_only_the_first_process_meets_fails_the_trial_and_costs_new_processes(monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 0.5)
    task = load_task(spec("Faulty", 2), "cpu")
    _, expected = trained(task, CONFIG | {"momentum": 0.0}, 1)
    helper = distributed._current[0]._helpers[0].process.pid
    with pytest.raises(MemoryError):
        task.start(CONFIG | {"momentum": 0.1}, 4).train_epoch(never)
    assert not is_alive(helper)
    assert trained(task, CONFIG | {"momentum": 0.0}, 1)[1] == expected


def test_a_part_smaller_than_the_processes_is_evaluated_all_the_same():
    """The processes that have no example add nothing."""
    task: Any = load_task(spec("DoubleDigits", 1), "cpu")
    run = task.start(CONFIG, 3)
    expected = run.evaluate("validation")

    class Last(distributed.Group):
        rank, size = 1, 10_000

        def total(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor + torch.tensor([expected["loss"], expected["score"]]) * task.sizes["validation"]

    task.group = Last()
    try:
        mine = task.parts["validation"]
        assert run.evaluate("validation") != expected  # rank 1 has one example
        task.group.rank = 9_999
        assert len(mine.labels) < 10_000
        assert run.evaluate("validation") == pytest.approx(expected)
    finally:
        task.group = distributed.ALONE


def test_buckets_keep_the_order_and_never_mix_dtypes():
    sizes = [4, 4, 100, 2, 2]
    tensors = [torch.zeros(n) for n in sizes] + [torch.zeros(3, dtype=torch.float64)]
    found = list(distributed.buckets(tensors, size=32))
    assert [[len(tensor) for tensor in bucket] for bucket in found] == [[4, 4], [100], [2, 2], [3]]
    assert all(a is b for a, b in zip(tensors, itertools.chain(*found), strict=True))
    assert list(distributed.buckets([])) == []


def test_running_statistics_are_batch_norms():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.GroupNorm(1, 2))
    assert len(supervised.running_statistics(net)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=digits", "task.gpus_per_trial=3"], r"task.batch_size must be a multiple of task.gpus_per_trial=3"),
        (["task=digits", "task.gpus_per_trial=2", "ohgw.batch_size=7"], "ohgw.batch_size must be a multiple"),
        (["task=xgboost", "task.gpus_per_trial=2"], "no key of task=xgboost"),
        (["task=digits", "task.gpus_per_trial=2", "backend=slurm"], "backend.gres=gpu:1 asks for fewer"),
        (["task=digits", "task.gpus_per_trial=8", "launch=slurm"], "launch.gres=gpu:4 asks for fewer"),
    ],
)
def test_what_cannot_be_shared_is_said_before_anything_runs(words, message):
    from harness.sweep import make_plan

    with pytest.raises(UserError, match=message):
        make_plan(words)


def test_workers_of_several_gpus(monkeypatch):
    from backends import gpus
    from harness.sweep import make_plan

    found = [gpus.Gpu(i, f"GPU-{i}", "H100", (9, 0)) for i in range(5)]
    monkeypatch.setattr(gpus, "visible_gpus", lambda: found)
    assert gpus.grouped([gpu.uuid for gpu in found], 2) == ["GPU-0,GPU-1", "GPU-2,GPU-3"]
    assert gpus.default_n_workers(2) == 2
    assert make_plan(["task=digits", "task.gpus_per_trial=2"]).cells[0].config["n_workers"] == 2
    launched = make_plan(["task=digits", "task.gpus_per_trial=2", "launch=slurm"])
    assert launched.cells[0].config["n_workers"] == 2
    with pytest.raises(UserError, match=r"workers of 8 GPUs are asked for .*shows 5"):
        make_plan(["task=digits", "task.gpus_per_trial=8"])


def test_gpu_hours_count_every_gpu():
    from harness.record import report_columns, summarize
    from harness.recorder import Progress

    result = {"epoch": 1, "validation_score": 0.5, "test_score": 0.5, "busy": {"train": 30.0, "test": 10.0}}
    events = [{"e": "start", "t": 0.0, "trial": 0, "config": {}},
              {"e": "report", "t": 40.0, "trial": 0, "decision": "CONTINUE", "result": result}]  # fmt: skip
    assert report_columns(events, gpus=4)["gpu_hours"] == [120 / 3600]
    summary = summarize({"labels": {}, "seed": 0, "task": {"gpus_per_trial": 4, "tau": 0.4}}, events)
    assert summary["gpu_hours"] == 120 / 3600
    assert summary["busy"]["train"] == 30.0
    assert summary["t_tau"]["0.4"]["gpu_hours"] == 120 / 3600
    progress = Progress(4)
    for event in events:
        progress.apply(event, "max")
    assert progress.gpu_seconds == 120


@contextlib.contextmanager
def backend_of(pool: WorkerPool | None, path: Path, kind: str, ohgw: dict[str, Any] = OHGW, **options: Any) -> Any:
    """Of trials on two processes: local, or on a pool."""
    settings = {"task": spec(kind, 2), "ohgw": ohgw, "max_resource_attr": "epochs", "checkpoint_seconds": 0.0}
    options |= {"settings": settings, "path": path, "seed": 1}
    make: Any = functools.partial(PoolBackend, pool=pool)
    if pool is None:
        make = functools.partial(LocalTrialBackend, threads=1)
    with contextlib.closing(make("harness.trial.run", **options)) as backend:
        yield backend


def run(backend: Any, **config: Any) -> tuple[str, list[tuple[Any, ...]]]:
    """A trial's end and what its epochs reported."""
    trial_id = backend.start_trial(CONFIG | config).trial_id
    statuses, results = finish(backend, [trial_id], seconds=120)
    keys = ("epoch", "train_loss", "validation_loss", "test_score")
    return statuses[trial_id], [tuple(report[key] for key in keys) for report in results[trial_id]]


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True])
def test_a_killed_process_costs_an_attempt_and_the_trial_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, local):
    order = tmp_path / "order"
    monkeypatch.setenv(Mortal.label, str(order))  # for the processes of both backends
    events: list[dict[str, Any]] = []
    with contextlib.nullcontext() if local else WorkerPool(1, threads=1) as pool:
        with backend_of(pool, tmp_path / "whole", "Mortal") as backend:
            expected = run(backend, epochs=3)
        order.touch()
        with backend_of(pool, tmp_path / "killed", "Mortal") as backend:
            backend.on_event = events.append
            assert run(backend, epochs=3) == expected
            errors = "".join(backend.stderr(0))
    assert expected[0] == "Completed"
    assert [epoch for epoch, *_ in expected[1]] == [1, 2, 3]
    assert not order.exists(), "a process was killed"
    assert [event["e"] for event in events] == ["retry"]
    assert "process 1 of 2 of this trial was killed by SIGKILL" in errors


@pytest.mark.slow
def test_an_error_that_only_a_helper_meets_ends_the_attempt(tmp_path):
    off = OHGW | {"estimator": "off"}
    with WorkerPool(1, threads=1) as pool, backend_of(pool, tmp_path, "Faulty", off, max_retries=0) as backend:
        assert run(backend, momentum=0.11, epochs=2) == ("Failed", [])
        errors = "".join(backend.stderr(0))
        assert "process 1 of 2 of this trial failed alone" in errors
        assert "no memory left" in errors
        assert run(backend, momentum=0.2, epochs=2) == ("Failed", [])  # in all of them
        assert "ZeroDivisionError: everywhere" in backend.failure(1)
        assert run(backend, momentum=0.0, epochs=2)[0] == "Completed"


@pytest.mark.slow
def test_helpers_die_with_a_killed_worker():
    script = (
        "import json, sys, time; from harness.tasks import load_task, distributed\n"
        "load_task(json.loads(sys.argv[1]), 'cpu')\n"
        "print(distributed._current[0]._helpers[0].process.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, json.dumps(spec("Faulty", 2))]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert worker.stdout is not None
    helper = int(worker.stdout.readline())
    assert is_alive(helper)
    worker.kill()
    worker.communicate()
    wait_until(lambda: not is_alive(helper), 5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pool", "local", "simulated"])
def test_the_command_with_two_processes_a_trial(harness, tmp_path, backend):
    words = ("task=digits", "task.model=mlp", "scheduler=random", "task.max_epochs=2", "budget.trials=2", "n_workers=1",
             "budget.epochs=null", "backend.threads=1", "tracker=none", "ohgw=normalized")  # fmt: skip
    for k in (1, 2):
        done = harness(*words, f"task.gpus_per_trial={k}", f"backend={backend}", f"name=k{k}")
        assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for k in (1, 2):
        (events,) = tmp_path.glob(f"results/k{k}/*/events.jsonl")
        found.append([event["result"] for event in read_lines(events) if event["e"] == "report"])
        summary = json.loads((events.parent / "summary.json").read_text())
        charged = sum(seconds for kind, seconds in summary["busy"].items() if kind != "test")
        assert summary["gpu_hours"] == pytest.approx(k * charged / 3600)
        assert summary["warm_started"] == 2
    for ours, theirs in zip(*found, strict=True):
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-3)
        assert ours["flops"] == theirs["flops"]
