"""Drivers that die, and drivers of strangers: real programs in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.conftest import FUNCTIONS, is_alive, wait_until

ROOT = Path(__file__).resolve().parents[2]

DRIVER = f"""
import sys, time
from backends.{{module}} import {{backend}}
b = {{backend}}("{FUNCTIONS}.stubborn", path=sys.argv[1], {{options}})
trials = [b.start_trial({{{{}}}}).trial_id for _ in range(2)]
seen = []
while len(seen) < 2:
    seen += b.fetch_status_results(trials)[1]
print(*[pid for _, r in seen for pid in (r["pid"], r["child"])], flush=True)
{{end}}
"""


def start(tmp_path: Path, local: bool, end: str = "time.sleep(600)") -> subprocess.Popen[str]:
    script = DRIVER.format(
        module="local" if local else "pool",
        backend="LocalTrialBackend" if local else "PoolBackend",
        options="" if local else "n_workers=2",
        end=end,
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("local", [False, True])
def test_workers_die_with_a_killed_driver(tmp_path, local):
    driver = start(tmp_path, local)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 4, driver.communicate()[1]
    driver.kill()
    driver.communicate()
    workers, children = pids[::2], pids[1::2]
    wait_until(lambda: not any(map(is_alive, workers)), 5)
    wait_until(lambda: not any(map(is_alive, children)), 5)


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "raise RuntimeError", "del b; import gc; gc.collect(); time.sleep(600)"]
)
def test_workers_go_with_their_owner(tmp_path, end):
    driver = start(tmp_path, local=False, end=end)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 4, driver.communicate()[1]
    wait_until(lambda: not any(map(is_alive, pids)), 10)
    driver.kill()
    driver.communicate()


def test_ctrl_c_reaches_the_driver_only(tmp_path):
    """Ctrl-C goes to the whole foreground group; workers are not in it, and ignore it anyway."""
    end = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("alive", b.busy_trial_ids(), flush=True)
"""
    driver = start(tmp_path, local=False, end=end)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert driver.stdout.readline() == "ready\n", driver.communicate()[1]
    for pid in [*pids[::2], driver.pid]:
        os.kill(pid, signal.SIGINT)
    assert driver.communicate(timeout=20)[0] == "alive [(0, 'InProgress'), (1, 'InProgress')]\n"


STRANGER = """
from syne_tune import StoppingCriterion, Tuner
from syne_tune.config_space import uniform
from syne_tune.optimizer.baselines import RandomSearch
from backends.pool import PoolBackend

if __name__ == "__main__":
    backend = PoolBackend("my_module.train", n_workers=2)
    tuner = Tuner(
        trial_backend=backend,
        scheduler=RandomSearch({"x": uniform(0, 1), "epochs": 3}, metrics=["loss"], do_minimize=True, random_seed=1),
        stop_criterion=StoppingCriterion(max_num_trials_completed=6),
        n_workers=2,
        sleep_time=0,
        results_update_interval=0.01,
    )
    tuner.run()
    print("path", tuner.tuner_path)
    print("epochs", sorted(len(t.metrics) for t in backend._trial_dict.values())[-6:])
"""

MY_MODULE = """
def train(ctx):
    for epoch in range(ctx.config["epochs"]):
        ctx.report(epoch=epoch, loss=ctx.config["x"] ** 2)
"""


def test_a_stranger_with_a_plain_syne_tune_script(tmp_path):
    """A module beside the script, Tuner's defaults (it saves itself with dill), a home directory with a space."""
    (tmp_path / "run.py").write_text(STRANGER)
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "my home")}
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epochs [3, 3, 3, 3, 3, 3]" in done.stdout
    path = Path(done.stdout.partition("path ")[2].splitlines()[0])
    assert path.name.startswith("my-module")
    assert (path / "tuner.dill").exists()
    assert (path / "trials" / "0").is_dir()
