"""Cells as tasks of job arrays on a real Slurm: every cell is finished once, whatever happens to its jobs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends import slurm_commands
from tests.backends.conftest import wait_until
from tests.conftest import ROOT, read_lines
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

SMALL = ["task.model=mlp", "backend.threads=1", "n_workers=1", "tracker=none", "launch=slurm", "launch.gres=gpu:1"]
SMALL += ["launch.exclusive=false", "launch.mem=500M"]
LONG = "budget.epochs=250"  # seconds of training


class Study:
    """``study(...)``: the command with small cells; its records, and the tasks that run them."""

    def __init__(self, harness: Callable[..., Any], folder: Path):
        self._harness, self.folder = harness, folder / "results" / "default"

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        given = {word.split("=")[0] for word in words}
        small = [word for word in SMALL if word.split("=")[0] not in given]
        return self._harness(*small, *words, timeout=300)

    def submit(self, *words: str) -> str:
        done = self(*words, "launch.watch=false")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def states(self, *words: str) -> dict[tuple[int, str], dict[str, Any]]:
        """What --status says, by seed and variant."""
        done = self(*words, "--status", "--json")
        assert done.returncode == 0, done.stderr
        return {(cell["seed"], cell["variant"]): cell for cell in json.loads(done.stdout)["cells"]}

    @property
    def cells(self) -> list[Path]:
        return sorted(file.parent for file in self.folder.glob("*/config.yaml"))

    def reports(self, seed: int = 0) -> int:
        files = self.folder.glob(f"*_seed{seed}_*/events.jsonl")
        return sum(event["e"] == "report" for file in files for event in read_lines(file))

    @property
    def submissions(self) -> list[Path]:
        return sorted(self.folder.glob(".slurm/*/plan.json"))


@pytest.fixture
def study(cluster, harness, tmp_path) -> Study:
    return Study(harness, tmp_path)


def tasks(*states: str) -> list[str]:
    """Ids of the array tasks of cells in these states of Slurm."""
    shown = slurm_commands.jobs().values()
    return sorted(job.id for job in shown if job.comment.startswith("ohgw:") and "_" in job.id and job.state in states)


def nothing_active() -> bool:
    return not any(job.active for job in slurm_commands.jobs().values())


def check_finished_once(study: Study, cells: int, epochs: int | None = None) -> None:
    """Every cell is finished, has each epoch once, and was never started again afterwards."""
    assert len(study.cells) == cells
    for cell in study.cells:
        events = read_lines(cell / "events.jsonl")
        assert (cell / "summary.json").exists()
        assert (events[-1]["e"], events[-1]["why"]) == ("close", "epochs" if epochs else "wallclock")
        seen = Counter((event["trial"], event["result"]["epoch"]) for event in events if event["e"] == "report")
        assert set(seen.values()) == {1}
        assert epochs in (None, len(seen))


def test_eight_cells_two_at_a_time_some_cancelled_all_finished_once(cluster, study):
    words = ["ohgw=off,on", "seed=0..3", "launch.array_limit=2", "budget.epochs=40"]
    said = study.submit(*words)
    assert "submitted 8 cells as job" in said
    wait_until(lambda: len(tasks("RUNNING")) == 2, 60)
    assert len(tasks("PENDING")) == 6
    assert "8 of 8 cells are left alone" in study.submit(*words)  # none is submitted twice
    running, waiting = tasks("RUNNING")[0], tasks("PENDING")[-1]
    slurm_commands.cancel([running, waiting])
    most = 0
    while tasks("PENDING", "RUNNING", "COMPLETING"):
        most = max(most, len(tasks("RUNNING")))
        time.sleep(0.2)
    assert most == 2
    states = Counter(state["state"] for state in study.states(*words).values())
    assert states in ({"finished": 6, "interrupted": 2}, {"finished": 7, "interrupted": 1})  # it may have been done
    left = states["interrupted"]
    done = study(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{8 - left} of 8 cells are left alone: {8 - left} finished" in done.stdout
    assert f"submitted {left} cell" in done.stdout
    assert "8 finished" in done.stdout
    assert "time to target, wall-clock" in done.stdout  # the paired summary
    check_finished_once(study, 8, 40)
    again = study(*words)
    assert again.returncode == 0
    assert "submitted" not in again.stdout
    assert len(study.submissions) == 2
    wait_until(nothing_active, 120)
    assert (study.folder / "report" / "index.html").exists()  # by the dependent job


def checkout(folder: Path) -> Path:
    """A copy of the project with a commit of its own and this environment."""
    for part in ("harness", "backends", "conf", "slurm"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".gitignore").write_text("__pycache__\n.venv\nresults\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    commit(folder, "submitted")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, message: str) -> None:
    git(folder, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-a", "-m", message)


def test_sbatch_by_hand_and_the_submitted_code_runs_though_the_checkout_changes(cluster, tmp_path, environment):
    project = checkout(tmp_path / "project")
    submitted = git(project, "rev-parse", "HEAD")
    (project / "conf" / "config.yaml").open("a").write("# not committed\n")
    environment.pop("PYTHONPATH")
    words = [word for word in SMALL if word != "launch=slurm"] + ["seed=0", "ohgw=off,on", "budget.epochs=6"]
    command = ["sbatch", "--parsable", "--mem=500M", "slurm/sweep.sbatch", *words, "launch.extra=['--hold']"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planner = done.stdout.strip()
    wait_until(lambda: not slurm_commands.jobs()[planner].active, 60)
    assert "submitted 2 cells as job" in (project / f"slurm-{planner}.out").read_text()
    for file in [*project.glob("harness/*.py"), *project.glob("backends/*.py"), *project.glob("slurm/*")]:
        file.write_text("raise SystemExit('the checkout runs')\n")
    shutil.rmtree(project / "conf")
    commit(project, "later")
    array = tasks("PENDING")[0].partition("_")[0]
    cluster.run("scontrol", "release", array)
    wait_until(nothing_active, 120)
    study = Study(lambda: None, project)
    check_finished_once(study, 2, 6)
    for cell in study.cells:
        meta = json.loads((cell / "meta.json").read_text())
        assert meta["commit"] == submitted
        assert "+# not committed" in meta["diff"]
        assert meta["command"][1:] == [*words, "launch.extra=['--hold']", "launch=slurm", "launch.watch=false"]
    assert (study.folder / "report" / "index.html").exists()


def test_the_batch_script_finds_partition_and_account_of_its_own_job(cluster, tmp_path, environment):
    project = checkout(tmp_path / "project")
    words = [word for word in SMALL if word != "launch=slurm"] + ["launch.extra=['--hold']", "launch.report=false"]
    command = ["sbatch", "--parsable", "--mem=500M", "--partition=short", "slurm/sweep.sbatch", *words]
    planner = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True).stdout.strip()
    wait_until(lambda: tasks("PENDING") or not slurm_commands.jobs()[planner].active, 60)
    (task,) = tasks("PENDING")
    assert "Partition=short" in cluster.run("scontrol", "show", "job", task)


def test_status_and_cancel_are_about_the_cells_of_the_command(cluster, study):
    words = ["ohgw=off", "budget.epochs=5000", "launch.array_limit=2"]  # none ends before the test does
    study.submit(*words, "seed=0..4")
    wait_until(lambda: study.reports(0) > 0 and study.reports(1) > 0, 90)
    states = study.states(*words, "seed=0..5")
    kinds = Counter(state["state"] for state in states.values())
    assert kinds == {"running": 2, "pending": 3, "not submitted": 1}
    assert states[0, "off"]["why"].startswith("on node")
    assert states[4, "off"]["why"] == "JobArrayTaskLimit"
    table = study(*words, "seed=0..5", "--status").stdout
    assert "6 cells (2 running, 3 pending (JobArrayTaskLimit), 1 not submitted)" in table
    done = study(*words, "seed=0,4", "--cancel")
    assert (done.returncode, done.stdout.split(";")[0]) == (0, "cancelled 2 tasks")
    wait_until(lambda: study.states(*words, "seed=0")[0, "off"]["state"] == "interrupted", 60)
    states = study.states(*words, "seed=0..4")
    assert (states[0, "off"]["why"], states[4, "off"]["why"]) == ("cancelled", "cancelled before it started")
    assert states[1, "off"]["state"] in ("running", "finished")
    assert states[2, "off"]["state"] in ("running", "pending")
    assert any(job.active and job.id.isdigit() for job in slurm_commands.jobs().values())  # the report's
    done = study(*words, "seed=0..4", "--cancel")
    assert "and 1 job that would make the report" in done.stdout
    wait_until(nothing_active, 60)
    assert not (study.folder / "report").exists()


def test_ctrl_c_only_ends_the_watching(cluster, start_harness, study):
    words = ["seed=0", "ohgw=off", "budget.epochs=6", "launch.report=false"]
    process = start_harness(*SMALL, *words)
    wait_until(lambda: "running" in process.stdout.readline(), 60)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the jobs go on" in output
    assert "seed=0 ohgw=off budget.epochs=6 launch.report=false --status" in output
    assert "Traceback" not in output
    wait_until(nothing_active, 60)
    check_finished_once(study, 1, 6)


def test_failures_are_shown_with_reason_and_log(cluster, study):
    done = study("seed=0", "ohgw=off", "launch.setup=['echo before','no-such-command']", "budget.epochs=6")
    assert done.returncode == 1
    assert "failed. FAILED on node" in done.stdout
    state = study.states("seed=0", "ohgw=off", "budget.epochs=6")[0, "off"]
    assert state["state"] == "failed"
    assert state["why"].endswith("error: a command of launch.setup failed")
    assert Path(state["log"]).read_text().startswith("before\n")
    assert state["log"] in study("seed=0", "ohgw=off", "budget.epochs=6", "--status").stdout
    assert study("seed=0", "ohgw=off", "budget.epochs=6").returncode == 0  # failed ones are submitted again


def test_a_changed_environment_is_no_silent_change_of_results(cluster, study):
    study.submit("seed=0", "ohgw=off", "launch.extra=['--hold']", "launch.report=false")
    (file,) = study.submissions
    plan = json.loads(file.read_text())
    plan["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(plan))
    cluster.run("scontrol", "release", tasks("PENDING")[0].partition("_")[0])
    wait_until(nothing_active, 60)
    state = study.states("seed=0", "ohgw=off")[0, "off"]
    assert state["state"] == "failed"
    assert "the environment has changed since the submission: torch 1.0 -> " in state["why"]
    assert study.cells == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.partition=a;b $(touch x) 'c'"], "Invalid partition name specified"),
        (["launch.time=1:00", "launch.partition=nowhere"], "invalid partition specified: nowhere"),
        (["launch.extra=['--no-such-option']"], "unrecognized option '--no-such-option'"),
        (["launch.extra=['touch x']"], "'touch x' is no option of sbatch"),
        (["launch.gres=tpu:1"], "Invalid generic resource"),
    ],
)
def test_what_slurm_refuses_is_said_in_one_sentence(cluster, study, tmp_path, words, message):
    done = study("seed=0,1", "ohgw=off", *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert study.submissions == []
    assert not list(tmp_path.rglob("x"))


def test_no_sbatch_on_path(cluster, study, environment):
    environment["PATH"] = "/nowhere"
    done = study("seed=0", "ohgw=off")
    assert (done.returncode, done.stdout) == (2, "")
    assert "on PATH: this needs Slurm's commands" in done.stderr


def test_a_path_with_spaces_and_signs(cluster, study, tmp_path):
    folder = tmp_path / "100% sure, $HOME 'x'"
    done = study("seed=0", "ohgw=off", "budget.epochs=6", f"results_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    (log,) = (folder / "default").glob(".slurm/*/logs/*_0.log")
    assert "1/1 cells" in log.read_text()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a tiny disk")
def test_a_full_disk(cluster, tmp_path, environment):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} -m harness seed=0,1 ohgw=off launch=slurm results_dir={disk}"
    script = (
        f"mount -t tmpfs -o size=600k tmpfs {disk} || exit 77; {command}; code=$?; find {disk} -name code; exit $code"
    )
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("may not mount a tmpfs here")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot write the submission to")
    assert "No space left on device; make room" in done.stderr
    assert done.stderr.count("\n") == 1
    assert nothing_active()


# ---- jobs that have to end


def decisions(cell: Path) -> list[dict[str, Any]]:
    """The events of a cell without clocks and without where it was interrupted."""
    kept = []
    for event in read_lines(cell / "events.jsonl"):
        if event["e"] in ("start", "resume", "report", "error", "complete"):
            kept.append(without_clocks(event))
    return kept


def without_clocks(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    measured = ("t", "busy", "seconds", "peak_memory")
    return {key: without_clocks(entry) for key, entry in value.items() if key not in measured}


def check_same_as_uninterrupted(study: Study, harness: Callable[..., Any], tmp_path: Path) -> None:
    """The cell of the study is as one that a local command runs in one piece."""
    plain = [word for word in SMALL if not word.startswith("launch")]
    done = harness(*plain, "seed=0", "ohgw=on", LONG, f"results_dir={tmp_path / 'local'}")
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = study.cells
    assert decisions(cell) == decisions(tmp_path / "local" / "default" / cell.name)
    assert (cell / "summary.json").exists()


def again(cluster: Cluster, task: str) -> None:
    """Slurm lets a job wait for two minutes that was queued again; not here."""
    wait_until(lambda: slurm_commands.jobs()[task].state == "PENDING", 90)
    time.sleep(2.0)  # a node refuses a job that begins in the second in which it was killed there
    cluster.run("scontrol", "update", f"jobid={task}", "StartTime=now")


def interrupted(study: Study) -> list[dict[str, Any]]:
    (cell,) = study.cells
    return [event for event in read_lines(cell / "events.jsonl") if event.get("why") == "interrupted"]


def test_the_signal_before_the_time_limit_queues_the_cell_again_with_the_same_records(
    cluster, study, harness, tmp_path
):
    study.submit("seed=0", "ohgw=on", LONG, "launch.report=false")
    wait_until(lambda: study.reports() > 30, 90)
    (task,) = tasks("RUNNING")
    cluster.run("scancel", "--batch", "--signal=USR1", task)
    again(cluster, task)
    state = study.states("seed=0", "ohgw=on", LONG)[0, "on"]
    assert (state["state"], state["task"]) in (("pending", task), ("running", task))
    wait_until(nothing_active, 120)
    assert slurm_commands.jobs()[task].restarts == 1
    assert len(interrupted(study)) == 1
    assert "queued again" in Path(study.submissions[0].parent / "logs" / f"{task}.log").read_text()
    check_same_as_uninterrupted(study, harness, tmp_path)


def test_where_jobs_may_not_be_queued_again_the_next_command_submits_the_cell(cluster, study, harness, tmp_path):
    words = ["seed=0", "ohgw=on", LONG, "launch.report=false", "launch.requeue=false", "launch.signal=USR2"]
    study.submit(*words)
    wait_until(lambda: study.reports() > 30, 90)
    (task,) = tasks("RUNNING")
    cluster.run("scancel", "--batch", "--signal=USR2", task)
    wait_until(nothing_active, 60)
    state = study.states(*words)[0, "on"]
    assert (state["state"], state["why"]) == ("interrupted", "the time limit was near")
    assert study(*words).returncode == 0
    check_same_as_uninterrupted(study, harness, tmp_path)


def test_a_preempted_cell_goes_on(cluster, study):
    study.submit("seed=0", "ohgw=on", "budget.epochs=null", "budget.wallclock=25", "launch.report=false")
    wait_until(lambda: study.reports() > 30, 90)
    (task,) = tasks("RUNNING")
    for node in cluster.nodes:  # nowhere else to go
        cluster.run("sbatch", "-p", "high", "--exclusive", "-w", node, "-o", "/dev/null", "--wrap", "sleep 5")
    again(cluster, task)
    wait_until(nothing_active, 200)
    assert slurm_commands.jobs()[task].restarts >= 1
    assert len(interrupted(study)) == 1
    check_finished_once(study, 1)


def test_a_run_that_slurm_has_given_up_leaves_the_cell_to_the_next(cluster, study):
    words = ["seed=0", "ohgw=on", "budget.epochs=null", "budget.wallclock=55"]
    study.submit(*words, "launch.report=false")
    wait_until(lambda: study.reports() > 30, 90)
    (task,) = tasks("RUNNING")
    cluster.hang(slurm_commands.jobs()[task].node)  # the cell runs on there
    again(cluster, task)
    wait_until(nothing_active, 200)
    check_finished_once(study, 1)
    (cell,) = study.cells
    opened = [event["run"] for event in read_lines(cell / "events.jsonl") if event["e"] == "open"]
    assert opened == [1, 2]
    assert study.states(*words)[0, "on"]["state"] == "finished"


def test_a_real_time_limit(cluster, study, harness, tmp_path):
    words = ["seed=0", "ohgw=on", "budget.epochs=100000", "launch.report=false", "launch.time=1"]
    study.submit(*words, "launch.signal_seconds=30")
    wait_until(lambda: tasks("RUNNING"), 60)
    (task,) = tasks("RUNNING")
    wait_until(lambda: "PENDING" in slurm_commands.jobs()[task].state, 100)
    assert len(interrupted(study)) == 1
    assert study(*words, "--cancel").returncode == 0


# ---- limits of the site


@pytest.fixture(scope="module")
def small_limits(running_cluster, tmp_path_factory):
    """Another cluster: arrays of at most three tasks, and a limit on jobs that the test chooses."""
    folder = Path("/tmp") / f"slurm-limits-{os.getpid()}"
    small = Cluster(folder, extra="MaxArraySize=3\nAccountingStorageEnforce=limits\n")
    try:
        small.up()
        small.run("sacctmgr", "-i", "-Q", "add", "account", "all", "cluster=testcluster")
        small.run("sacctmgr", "-i", "-Q", "add", "user", "root", "account=all", "cluster=testcluster")
        yield small
    finally:
        small.down()


@pytest.fixture
def limited_study(small_limits, monkeypatch, harness, environment, tmp_path):
    monkeypatch.setenv("SLURM_CONF", str(small_limits.conf))
    environment["SLURM_CONF"] = str(small_limits.conf)
    yield Study(harness, tmp_path)
    small_limits.clear()  # the reports' jobs count as well


def test_large_sweeps_are_split(small_limits, limited_study):
    words = ["seed=0..3", "ohgw=off", "budget.epochs=6", "launch.array_limit=2"]
    limited_study.submit(*words)
    wait_until(nothing_active, 120)
    check_finished_once(limited_study, 4, 6)
    jobs = read_lines(limited_study.submissions[0].parent / "jobs.jsonl")
    assert [job["cells"] for job in jobs] == [3, 1, 0]


def test_what_the_site_refuses_is_submitted_later(small_limits, limited_study):
    words = ["seed=0..2", "ohgw=off", "budget.epochs=6"]
    wait_until(nothing_active, 120)
    limit = ("sacctmgr", "-i", "-Q", "modify", "user", "root", "set")
    small_limits.run(*limit, "maxsubmitjobs=2")
    try:
        said = limited_study.submit(*words)
        assert "2 of 3 cells were submitted, Slurm refused the rest" in said
        wait_until(nothing_active, 120)
    finally:
        small_limits.run(*limit, "maxsubmitjobs=-1")
    limited_study.submit(*words)
    wait_until(nothing_active, 120)
    check_finished_once(limited_study, 3, 6)
