"""What Slurm costs: starting trials, driving 64 workers, and running cells as a job array. Needs a running Slurm.

    python tests/slurm/cluster.py up /tmp/slurm && . /tmp/slurm/env.sh       # one on this machine, if there is none
    python scripts/bench_slurm.py [--parts trials,driver,array]

trials: seconds from a suggestion to the trial's first training step, on a warm worker of ``SlurmBackend`` and in a job
of its own (one sbatch per trial, a training script in Syne Tune's style), in turn; and trials per second when many are
started at once on the same number of workers or jobs. Workers are ready before the clock starts; their start-up is
printed apart.

driver: a real Tuner with ASHA and the harness's recorder drives ``--workers`` stub workers whose trials sleep
``--epoch`` seconds (give or take a fifth) an epoch and report what a real trial reports. Printed: the driver's CPU
share of one core (user and system time of the process and the Slurm commands it starts, over wall-clock), and the
decision latency: from the time stamp of a report to the scheduler's answer, recorded on disk. On one machine the
workers take CPU from the driver, so latencies are upper bounds.

array: seconds from ``python -m harness launch=slurm`` to the end of ``--cells`` small cells, as cells a minute, with
their own wall-clock seconds apart: the rest is Slurm's latency, starting Python and workers, and watching. As many
cells run at a time as this machine has cores.
"""

import argparse
import contextlib
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_trial_start import TRAINING_SCRIPT, one_trial  # noqa: E402

from backends import slurm_commands  # noqa: E402
from backends.pool import PoolBackend  # noqa: E402
from backends.slurm import SlurmWorkers  # noqa: E402
from backends.slurm_commands import Resources  # noqa: E402

MAX_T = 27


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="trials,driver,array", help="which of trials, driver, array (default: all)")
    parser.add_argument("--trials", type=int, default=10, help="trials of each kind, one at a time (default 10)")
    parser.add_argument("--many", type=int, default=40, help="trials of each kind, started at once (default 40)")
    parser.add_argument("--workers", type=int, default=64, help="workers of the driver's part (default 64)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the driver's part (default 60)")
    parser.add_argument("--epoch", type=float, default=5.0, help="seconds of a stub's epoch (default 5)")
    parser.add_argument("--cells", type=int, default=8, help="cells of the array (default 8)")
    parser.add_argument("--folder", default=".", help="folder for files that nodes and driver share (default: here)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-slurm-") as folder:
        os.chdir(folder)
        print(f"{os.cpu_count()} cores; Slurm {slurm_commands.setting('SLURM_VERSION')}")
        for part in options.parts.split(","):
            {"trials": trials, "driver": driver, "array": array}[part](options)


# ---- starting trials


def trials(options: argparse.Namespace) -> None:
    """A warm worker against a job a trial."""
    Path("training_script.py").write_text(TRAINING_SCRIPT)
    Path("job.sh").write_text('#!/bin/bash\nexec "$1" training_script.py --lr "$2"\n')
    one = Resources(gres="gpu:1", cpus=1, mem="1G")
    begun = time.perf_counter()
    with SlurmWorkers(2, one, threads=1) as workers:
        workers.prepare("bench_trial_start.prepare", {"lr": 0.1})
        ready = time.perf_counter() - begun
        backend = PoolBackend("bench_trial_start.train", pool=workers, path="trials")
        seconds: dict[str, list[float]] = {"one sbatch per trial": [], "SlurmBackend": []}
        for k in range(options.trials):
            seconds["one sbatch per trial"].append(_job_trial(f"one-{k}", one))
            seconds["SlurmBackend"].append(one_trial(backend, {"lr": 0.01 * (k + 1)}))
        print(f"\ntwo workers were ready after {ready:.1f} s; seconds from a suggestion to the first training step, "
              f"one trial at a time, n = {options.trials} each, in turn")  # fmt: skip
        _print_ratio(seconds)
        rates = {
            "one sbatch per trial": _many_jobs(max(2, options.many // 10), one),
            "SlurmBackend": _many(backend, options.many),
        }
    print("trials a second, many at once on two workers or two jobs at a time, n = 1 run each")
    for name, rate in rates.items():
        print(f"  {name:22}{rate:9.2f}")
    print(f"  ratio {rates['SlurmBackend'] / rates['one sbatch per trial']:.0f}x")


def _submit_trial(name: str, one: Resources, array: str | None = None) -> str:
    options = [*one.options(), f"--output={name}{'-%a' if array else ''}.out", "--no-requeue"]
    options += [f"--array={array}"] if array else []
    return slurm_commands.submit(options, Path("job.sh"), sys.executable, "0.1")


def _job_trial(name: str, one: Resources) -> float:
    suggested = time.time()
    _submit_trial(name, one)
    return _first_report(Path(f"{name}.out")) - suggested


def _first_report(output: Path) -> float:
    """The time stamp in a training script's first report."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if output.exists():
            for line in output.read_text().splitlines():
                if line.startswith("[tune-metric]: ") and line.endswith("}"):
                    return json.loads(line.partition(": ")[2])["stepped"]
        time.sleep(0.005)
    raise SystemExit(f"no report in {output}: {output.read_text() if output.exists() else 'the job did not start'}")


def _many_jobs(count: int, one: Resources) -> float:
    begun = time.time()
    _submit_trial("many", one, f"0-{count - 1}%2")
    return count / (max(_first_report(Path(f"many-{k}.out")) for k in range(count)) - begun)


def _many(backend: Any, count: int) -> float:
    begun = time.time()
    waiting = [backend.start_trial({"lr": 0.1}).trial_id for _ in range(count)]
    last = begun
    while waiting:
        statuses, results = backend.fetch_status_results(waiting)
        last = max([last, *(result["stepped"] for _, result in results)])
        waiting = [k for k in waiting if statuses[k][1] == "InProgress"]
    return count / (last - begun)


def _print_ratio(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        print(f"  {name:22}median {statistics.median(values):8.4f} [{min(values):.4f}, {max(values):.4f}]")
    slow, fast = map(statistics.median, seconds.values())
    print(f"  ratio of medians {slow / fast:.0f}x")


# ---- driving many workers


STUB = """
import random
import time


def train(ctx):
    rng = random.Random(ctx.seed)
    epoch, quality = 0, rng.random()
    while epoch < ctx.config["epochs"]:
        until = time.monotonic() + ctx.settings["epoch_seconds"] * rng.uniform(0.8, 1.2)
        while time.monotonic() < until:
            if ctx.should_stop():
                return
            time.sleep(0.2)  # a batch
        epoch += 1
        score = quality * (1 - 0.9**epoch)
        losses = dict.fromkeys(("train_loss", "validation_loss"), 1 - score)
        scores = dict.fromkeys(("train_score", "validation_score", "test_score"), score)
        busy = dict.fromkeys(("startup", "warm_start", "train", "validate", "test", "checkpoint"), 0.1)
        ctx.report(epoch=epoch, **losses, **scores, flops={"train": 10**9}, peak_memory=10**9, busy=busy)
"""


def driver(options: argparse.Namespace) -> None:
    """CPU share and decision latency of one driver."""
    from syne_tune import StoppingCriterion, Tuner
    from syne_tune.config_space import uniform

    from harness.record import EventLog
    from harness.recorder import Budget, CellClock, Recorder
    from harness.schedulers import ASHA

    latencies: list[float] = []
    Path("stub_trial.py").write_text(STUB)

    class Timed(Recorder):
        def on_trial_result(self, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(trial, result)
            latencies.append(time.time() - result["st_worker_timestamp"])
            return decision

    begun = time.perf_counter()
    settings = {"epoch_seconds": options.epoch}
    with SlurmWorkers(options.workers, Resources(cpus=1, mem="500M", time="30"), threads=1, warm=()) as workers:
        while any(info["startup"] is None for info in workers.info()):
            workers.poll(0.2)
        ready = time.perf_counter() - begun
        backend = PoolBackend("stub_trial.train", pool=workers, settings=settings, path="driver")
        space = {"x": uniform(0, 1), "epochs": MAX_T}
        scheduler = ASHA(
            space, "validation_score", mode="max", max_t=MAX_T, resource_attr="epoch", max_resource_attr="epochs",
            type="stopping",
        )  # fmt: skip
        recorder = Timed(scheduler, EventLog("events.jsonl"), Budget(), CellClock(), lambda trial_id: {})
        tuner = Tuner(
            trial_backend=backend, scheduler=recorder, n_workers=options.workers, sleep_time=0.0, save_tuner=False,
            stop_criterion=StoppingCriterion(max_wallclock_time=options.seconds), print_update_interval=1e9,
            suffix_tuner_name=False, tuner_name="driver",
        )  # fmt: skip
        tuner.tuner_path = Path("tuner")
        before, wall = _cpu_seconds(), time.perf_counter()
        with open("tuner.log", "w") as log, _silenced(log):
            tuner.run()
        share = (_cpu_seconds() - before) / (time.perf_counter() - wall)
    ordered = sorted(latencies)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    rate = len(latencies) / options.seconds
    print(f"\nASHA with {options.workers} workers (ready after {ready:.0f} s), {options.epoch:g} s an epoch, "
          f"{options.seconds:g} s, n = 1 run: {len(latencies)} reports, {rate:.1f} a second")  # fmt: skip
    print(f"  driver's CPU share of one core {100 * share:.1f} %")
    print(f"  decision latency, ms: median {1e3 * statistics.median(ordered):.1f}, 99 % {1e3 * p99:.1f}, "
          f"largest {1e3 * ordered[-1]:.1f}")  # fmt: skip


def _silenced(log: Any) -> Any:
    logging.getLogger("syne_tune").setLevel(logging.ERROR)
    return contextlib.redirect_stdout(log)


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# ---- a job array


def array(options: argparse.Namespace) -> None:
    """Small cells as one job array, and the same on the login node, one after the other."""
    small = ["task.model=mlp", "ohgw=off", "budget.epochs=20", "n_workers=1", "backend.threads=1", "tracker=none"]
    seeds = f"seed=0..{options.cells - 1}"
    job = ["launch=slurm", "launch.gres=gpu:1", "launch.exclusive=false", "launch.cpus=1", "launch.mem=2G",
           "launch.report=false", f"launch.array_limit={os.cpu_count()}"]  # fmt: skip
    times = {
        "launch=slurm": _sweep([*small, seeds, *job, "name=array"]),
        "launch=local": _sweep([*small, seeds, "name=local"]),
    }
    inside = [json.loads(file.read_text())["wallclock"] for file in Path("results/array").glob("*/summary.json")]
    assert len(inside) == options.cells, "not all cells finished"
    print(f"\n{options.cells} cells of 20 epochs, n = 1 run each; a cell's own wall-clock: median "
          f"{statistics.median(inside):.2f} s [{min(inside):.2f}, {max(inside):.2f}]")  # fmt: skip
    for name, seconds in times.items():
        print(f"  {name:14}{seconds:7.1f} s, {60 * options.cells / seconds:7.1f} cells a minute")


def _sweep(words: Sequence[str]) -> float:
    begun = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "harness", *words], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
