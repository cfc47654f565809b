"""launch=slurm without a cluster: options of sbatch, splitting, snapshots, and what is made of Slurm's answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backends import slurm_commands
from backends.context import UserError
from backends.slurm_commands import Incarnation, Job, SlurmError, gpu_count
from harness.leaving import Leaving, leaving_on
from harness.ownership import cell_lock
from harness.record import CellPaths
from harness.slurm import snapshot, submissions
from harness.slurm import submit as slurm_submit
from harness.slurm.status import Board, counted, watch
from harness.slurm.submissions import Submission
from harness.slurm.submit import array_options, resources
from harness.sweep import make_plan
from tests.conftest import ROOT


def launch(*words: str) -> dict:
    return make_plan(["launch=slurm", *words]).cells[0].config["launch"]


# ---- the command line


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:4", 4),
        ("gpu:v100:4", 4),
        ("gpu", 1),
        ("gpu:v100", 1),
        ("gpu:a100_1g.5gb:7", 7),
        ("gpu:2,shard:8", 2),
        ("gpu:a100:2,gpu:v100:1", 3),
        ("gres/gpu:3", 3),
        ("gpu:4(S:0-1)", 4),
        ("shard:8", 0),
        (None, 0),
    ],
)
def test_gpus_are_counted(gres, count):
    assert gpu_count(gres) == count


def test_a_cell_has_a_worker_a_gpu_of_its_node_not_of_this_machine():
    def workers(*words):
        return make_plan(["launch=slurm", *words]).cells[0].config["n_workers"]

    assert workers() == 4
    assert workers("launch.gres=gpu:v100:8") == 8
    assert workers("launch.gres=null") == 2
    assert workers("n_workers=3") == 3


def test_values_for_sbatch_are_taken_literally():
    nasty = "a;b $(touch x),'c' \"${HOME}\""
    assert launch(f"launch.partition={nasty}")["partition"] == nasty
    assert launch("launch.gres=gpu:2,shard:3", "launch.time=12:00:00", "launch.mem=0")["gres"] == "gpu:2,shard:3"
    assert launch("launch.account=null")["account"] is None
    (option,) = [word for word in resources(launch(f"launch.partition={nasty}")).options() if "partition" in word]
    assert option == f"--partition={nasty}"


def test_the_order_of_options_and_setup_is_kept_that_of_targets_is_not():
    assert launch("launch.setup=[b,a,b]")["setup"] == ["b", "a", "b"]
    assert launch("launch.extra=['--constraint=v100','--begin=now']")["extra"] == ["--constraint=v100", "--begin=now"]
    assert make_plan(["task.taus=[0.95,0.9,0.95]"]).cells[0].config["task"]["taus"] == [0.9, 0.95]


def test_launch_is_no_part_of_a_cell():
    one, other = (make_plan(["n_workers=4", *words]).cells[0] for words in ([], ["launch=slurm", "launch.time=1:00"]))
    assert one.folder == other.folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.partition=gpu"], "launch.partition is no key of launch=local"),
        (["launch=slurm", "launch.partiton=gpu"], "did you mean launch.partition?"),
        (["launch=slurm", "launch.signal=TERM"], "launch.signal must be one of USR1, USR2"),
        (["launch=slurm", "launch.array_limit=0"], "launch.array_limit must be an integer >= 1"),
        (["launch=slurm", "launch.extra=--hold"], "launch.extra must be a list in brackets"),
        (["launch=slurm", "launch.setup=[a=b]"], "quote elements that have more"),
        (["launch=slurm", "launch.cpus=4,8"], "launch.cpus takes one value"),
        (["launch=slurm", "backend=simulated"], "only one node writes to"),
        (["launch=slurm", "tracker=mlflow"], "tracker.uri"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        make_plan(words)


def test_files_that_only_one_node_writes_are_accepted(tmp_path):
    make_plan(["launch=slurm", "backend=simulated", f"backend.store={tmp_path}/x", "tracker=none"])
    make_plan(["launch=slurm", "tracker=mlflow", "tracker.uri='http://localhost:5000'"])


def test_a_number_in_the_yaml_gets_advice():
    from harness.schema import known_keys

    with pytest.raises(UserError, match="in a YAML file, write it in quotes"):
        known_keys()["launch.time"].check(43200)  # what YAML makes of 12:00:00


# ---- jobs


def test_options_of_an_array():
    submission = Submission(Path("/r/100%, sure/study/.slurm/20260101T000000Z-abcd"))
    options = array_options(submission, launch("launch.array_limit=5"), 10, 3, ["7"])
    assert options == [
        "--job-name=ohgw-study",
        "--comment=ohgw:20260101T000000Z-abcd:10",
        "--output=/r/100%%, sure/study/.slurm/20260101T000000Z-abcd/logs/%A_%a.log",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks=1",
        "--dependency=afterany:7",
        "--array=0-2%5",
        "--requeue",
        "--signal=B:USR1@120",
    ]
    later = array_options(submission, launch("launch.requeue=false", "launch.signal=USR2"), 0, 1)
    assert later[-3:] == ["--array=0-0", "--no-requeue", "--signal=B:USR2@120"]
    assert submissions.of_comment("ohgw:20260101T000000Z-abcd:10") == ("20260101T000000Z-abcd", "10")
    assert submissions.of_comment("ohgw-workers:x") is None


def test_a_driver_asks_for_no_gpu_and_no_node_of_its_own():
    asked = resources(launch("launch.cpus=2"), driver=True).options()
    assert asked == ["--cpus-per-task=2"]
    assert "--gres=gpu:4" in resources(launch()).options()
    assert "--exclusive" in resources(launch()).options()


def test_inside_of_a_job_what_is_not_set_is_as_there(monkeypatch):
    for key, value in (("PARTITION", "day"), ("ACCOUNT", "us"), ("QOS", "high")):
        monkeypatch.setenv(f"SLURM_JOB_{key}", value)

    def completed(*words):
        return [slurm_submit._completed(launch(*words))[key] for key in ("partition", "account", "qos")]

    assert completed() == ["day", "us", "high"]
    assert completed("launch.partition=night") == ["night", "us", None]
    assert completed("launch.account=them", "launch.qos=low") == ["day", "them", "low"]


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A queue that takes any array of at most ``largest`` tasks while there is ``room``; ``sent`` has the options."""

    class Queue:
        largest, room, refusal = 1000, 10**6, "QOSMaxSubmitJobPerUserLimit"
        sent: list[dict[str, str]]
        jobs: dict[str, Job]

        def __init__(self):
            self.sent, self.jobs = [], {}

        def submit(self, options, script, *arguments):
            values = dict(word.removeprefix("--").partition("=")[::2] for word in options)
            count = int(values.get("array", "0-0").partition("%")[0].partition("-")[2]) + 1
            if count > self.room:
                raise SlurmError(f"sbatch failed: {self.refusal}")
            self.room -= count
            self.sent.append(values | {"first": arguments[-1]})
            return str(100 + len(self.sent))

    queue = Queue()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_commands, "submit", queue.submit)
    monkeypatch.setattr(slurm_commands, "jobs", lambda: queue.jobs)
    monkeypatch.setattr(slurm_commands, "accounting", lambda ids: [])
    monkeypatch.setattr(slurm_commands, "largest_array", lambda: queue.largest)
    monkeypatch.setattr(slurm_commands, "setting", lambda name: "30" if name == "KillWait" else None)
    return queue


def submit(*words, said=None):
    return slurm_submit.submit(make_plan(["launch=slurm", *words]), (said if said is not None else []).append)


def test_many_cells_are_split_into_arrays_one_after_the_other_where_there_is_a_limit(slurm):
    slurm.largest = 4
    submission = submit("seed=0..9", "launch.array_limit=3")
    arrays, report = slurm.sent[:-1], slurm.sent[-1]
    assert [sent["array"] for sent in arrays] == ["0-3%3", "0-3%3", "0-1%3"]
    assert [sent["first"] for sent in arrays] == ["0", "4", "8"]
    assert [sent.get("dependency") for sent in arrays] == [None, "afterany:101", "afterany:102"]
    assert (report["first"], report["dependency"]) == ("report", "afterany:101:102:103")
    assert [cell.seed for cell in submission.cells] == list(range(10))
    assert [job["cells"] for job in submission.noted_jobs()] == [4, 4, 2, 0]


def test_the_limit_holds_together_with_what_is_in_the_queue(slurm):
    first = submit("seed=0", "launch.array_limit=3")
    slurm.jobs["101_0"] = Job("101_0", "RUNNING", "None", "", first.comment(0))
    submit("seed=0,1", "launch.array_limit=3", "launch.report=false")
    assert slurm.sent[-1]["dependency"] == "afterany:101"
    slurm.jobs["101_0"] = Job("101_0", "COMPLETED", "None", "", first.comment(0))
    submit("seed=2", "launch.array_limit=3", "launch.report=false")
    assert "dependency" not in slurm.sent[-1]


def test_without_a_limit_arrays_do_not_wait_for_each_other(slurm):
    slurm.largest = 4
    submit("seed=0..9", "launch.report=false")
    assert [sent.get("dependency") for sent in slurm.sent] == [None, None, None]


def test_cells_that_ask_for_different_resources_are_in_different_arrays(slurm):
    submit("seed=0..2", "backend=slurm,pool", "launch.report=false")
    pool, drivers = slurm.sent
    assert (pool["array"], pool["gres"], "exclusive" in pool) == ("0-2", "gpu:4", True)
    assert (drivers["array"], drivers.get("gres"), "exclusive" in drivers) == ("0-2", None, False)


def test_what_a_limit_of_the_site_refuses_is_submitted_by_the_same_command_later(slurm):
    said: list[str] = []
    slurm.room = 7
    assert submit("seed=0..9", said=said) is not None
    assert sum(int(sent["array"].partition("-")[2]) + 1 for sent in slurm.sent) == 7
    assert "7 of 10 cells were submitted, Slurm refused the rest" in said[0]
    assert any("no job will make the report" in line for line in said)
    slurm.room = 100
    for k, sent in enumerate(slurm.sent):
        for task in range(int(sent["array"].partition("-")[2]) + 1):
            slurm.jobs[f"{101 + k}_{task}"] = Job(f"{101 + k}_{task}", "PENDING", "Priority", "", sent["comment"])
    submission = submit("seed=0..9")
    assert [cell.seed for cell in submission.cells] == [7, 8, 9]


@pytest.mark.parametrize("refusal", ["invalid partition specified: x", "QOSMaxSubmitJobPerUserLimit"])
def test_a_refusal_of_everything_leaves_nothing_behind(slurm, refusal, tmp_path):
    slurm.room, slurm.refusal = 0, refusal
    with pytest.raises(UserError, match=f"nothing was submitted: .*{refusal}"):
        submit("seed=0..9")
    assert submissions.of_study(tmp_path / "results" / "default") == []


def test_a_job_that_slurm_took_without_an_answer_is_ours(slurm, monkeypatch):
    take = slurm.submit

    def submit_without_answer(options, script, *arguments):
        job = take(options, script, *arguments)
        if arguments[-1] != "report":
            slurm.jobs[f"{job}_0"] = Job(f"{job}_0", "PENDING", "", "", slurm.sent[-1]["comment"])
            raise SlurmError("sbatch failed: Socket timed out on send/recv operation")
        return job

    monkeypatch.setattr(slurm_commands, "submit", submit_without_answer)
    submission = submit("seed=0")
    assert [job["job"] for job in submission.noted_jobs()] == ["101", "102"]


def test_without_any_answer_the_submission_stays_for_the_job_that_may_come(slurm, monkeypatch, tmp_path):
    def silent(*arguments):
        raise SlurmError("sbatch did not answer within 60 s")

    def submit_and_go_away(*arguments):
        monkeypatch.setattr(slurm_commands, "jobs", silent)
        silent()

    monkeypatch.setattr(slurm_commands, "submit", submit_and_go_away)
    with pytest.raises(UserError, match=r"did not answer within 60 s; what was submitted all the same: .*--status"):
        submit("seed=0")
    assert len(submissions.of_study(tmp_path / "results" / "default")) == 1


def test_two_commands_do_not_submit_the_same_cells(slurm, tmp_path):
    lock = tmp_path / "results" / "default" / ".slurm" / "submit.lock"
    with cell_lock(lock), pytest.raises(UserError, match="another command is submitting"):
        submit()
    assert slurm.sent == []


def test_a_folder_that_cannot_be_written(slurm, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UserError, match="cannot write results to"):
        submit()
    with pytest.raises(UserError, match="a path with a colon"):
        submit(f"results_dir={tmp_path}/a:b")


# ---- what is kept


def test_a_submission_has_code_configs_and_versions(slurm, tmp_path):
    submission = submit("seed=3", "launch.setup=[module load cuda,'export A=1']")
    assert submission.setup.read_text() == "module load cuda\nexport A=1\n"
    content = json.loads(submission.plan.read_bytes())
    assert content["argv"] == ["launch=slurm", "seed=3", "launch.setup=[module load cuda,'export A=1']"]
    assert content["cells"][0]["results_dir"] == str(tmp_path / "results")
    assert (content["interpreter"], content["kill_wait"]) == (sys.executable, 30.0)
    assert content["environment"]["numpy"] == __import__("numpy").__version__
    assert submission.script.read_text() == (ROOT / "slurm" / "sweep.sbatch").read_text()
    code = "from harness.provenance import commit_and_diff, ROOT; print(ROOT, commit_and_diff())"
    env = {**os.environ, "PYTHONPATH": str(submission.code)}
    said = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"{submission.code} {snapshot.commit_and_diff()}"


def test_a_changed_environment_is_told():
    now = snapshot.environment()
    snapshot.check_environment(now)
    with pytest.raises(UserError, match=r"numpy 1.0 -> [\d.]+, gone 2.0 -> not installed; submit the cells again"):
        snapshot.check_environment({**now, "numpy": "1.0", "gone": "2.0"})


def test_a_new_package_is_no_change():
    now = snapshot.environment()
    del now["numpy"]
    snapshot.check_environment(now)


# ---- how cells stand


@pytest.fixture
def one_cell(slurm):
    """A submitted cell; ``look()`` is its state when Slurm's queue has these values for its task."""
    submission = submit("seed=0")
    plan = make_plan(["launch=slurm", "seed=0"])

    class OneCell:
        paths = CellPaths.of_cell(plan.cells[0])
        log = submission.log("101_0")
        jobs = submission.jobs
        ours = submission.comment(0)

        def look(self, state=None, *, end=None, restarts=0, comment=ours, reason="None"):
            job = Job("101_0", state, reason, "node7", comment, "101", restarts, None, end) if state else None
            slurm.jobs = {"101_0": job} if job else {}
            (seen,) = self.board().look(locks=True)
            return seen.name, seen.why

        def say(self, state, reason="", restart=0):
            words = {"state": state, "reason": reason, "task": "101_0", "restart": restart}
            submission.status_file(0).write_text(json.dumps(words))

        def board(self) -> Board:
            return Board(plan)

    return OneCell()


def test_states_of_a_cell_in_the_queue(one_cell):
    assert one_cell.look("PENDING", reason="Resources") == ("pending", "Resources")
    assert one_cell.look("RUNNING") == ("running", "on node7")
    assert one_cell.look("COMPLETING")[0] == "running"


def test_a_job_that_got_an_old_id_again_is_not_ours(one_cell):
    assert one_cell.look("RUNNING", comment="somebody else's")[0] == "interrupted"
    other = "ohgw:20200101T000000Z-0000:0"
    assert one_cell.look("RUNNING", comment=other)[0] == "interrupted"


def test_a_finished_cell_is_finished_whatever_slurm_says(one_cell):
    one_cell.paths.root.mkdir(parents=True)
    one_cell.paths.events.touch()
    one_cell.paths.summary.touch()
    assert one_cell.look() == ("finished", "")
    assert one_cell.look("COMPLETING") == ("finished", "")


def test_the_words_of_a_task_count_before_those_of_slurm(one_cell):
    one_cell.say("failed", "20 trials in a row failed")
    assert one_cell.look("FAILED") == ("failed", "20 trials in a row failed")
    one_cell.say("interrupted", "the time limit was near")
    assert one_cell.look("FAILED") == ("interrupted", "the time limit was near")
    assert one_cell.look("CANCELLED") == ("interrupted", "cancelled")


def test_the_words_of_an_earlier_run_do_not(one_cell):
    one_cell.say("interrupted", "the time limit was near", restart=0)
    assert one_cell.look("NODE_FAIL", restarts=1) == ("failed", "NODE_FAIL on node7")


def test_what_slurm_did_to_a_task(one_cell):
    one_cell.say("running")
    one_cell.log.write_text("epoch 1\nslurmstepd: error: DUE TO TIME LIMIT\n\n")
    assert one_cell.look("TIMEOUT") == ("failed", "TIMEOUT on node7: slurmstepd: error: DUE TO TIME LIMIT")
    assert one_cell.look("OUT_OF_MEMORY")[1].startswith("OUT_OF_MEMORY on node7")
    assert one_cell.look("PREEMPTED")[0] == "interrupted"
    assert one_cell.look("CANCELLED") == ("interrupted", "cancelled")


def test_a_record_that_is_not_visible_yet_is_waited_for_but_not_for_ever(one_cell):
    assert one_cell.look("COMPLETED", end=time.time() - 5)[0] == "running"
    assert one_cell.look("COMPLETED", end=time.time() - 500)[0] == "interrupted"


def test_when_the_queue_has_forgotten_accounting_knows(one_cell, monkeypatch):
    row = Incarnation("101_0", "101", "OUT_OF_MEMORY", 9, 4, 8, "node3", None, None)
    monkeypatch.setattr(slurm_commands, "accounting", lambda ids: [row])
    assert one_cell.look() == ("failed", "OUT_OF_MEMORY on node3")

    def none(ids):
        raise SlurmError("no accounting here")

    monkeypatch.setattr(slurm_commands, "accounting", none)
    assert one_cell.look() == ("interrupted", "cancelled before it started")


def test_a_cell_that_a_local_command_runs_is_left_alone(one_cell, slurm):
    said: list[str] = []
    with cell_lock(one_cell.paths.lock):
        assert one_cell.look() == ("running", f"process {os.getpid()} on {os.uname().nodename}, no task of this study")
        assert submit("seed=0", said=said) is None
    assert said == ["1 of 1 cells are left alone: 1 running"]


def test_a_torn_line_about_a_job_costs_nothing_else(one_cell):
    with open(one_cell.jobs, "a") as file:
        file.write('{"job": "1')
    assert one_cell.look("RUNNING") == ("running", "on node7")


def test_watching_survives_a_controller_that_is_down(one_cell, monkeypatch):
    answers = [SlurmError("squeue failed: Unable to contact slurm controller"), {}]

    def jobs():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    board = one_cell.board()
    monkeypatch.setattr(slurm_commands, "jobs", jobs)
    monkeypatch.setattr("harness.slurm.status.time.sleep", lambda seconds: None)
    said: list[str] = []
    assert counted(watch(board, said.append)) == "1 interrupted"
    assert "Unable to contact slurm controller; running jobs are not affected" in said[0]


def test_status_and_cancel_without_slurm_and_without_a_submission(harness, environment):
    environment["PATH"] = "/nowhere"
    shown = harness("seed=0,1", "--status")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "2 cells (2 not submitted)" in shown.stdout
    assert "none of these cells was given to Slurm" in shown.stdout
    cells = json.loads(harness("seed=0,1", "--status", "--json").stdout)
    assert cells["counts"] == {"not submitted": 2}
    done = harness("seed=0,1", "--cancel")
    assert (done.returncode, done.stdout.split(";")[0]) == (0, "cancelled 0 tasks")


def test_no_slurm_on_path_is_said_in_one_sentence(harness, environment, tmp_path):
    environment["PATH"] = "/nowhere"
    done = harness("launch=slurm", "ohgw=off", "seed=0,1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "on PATH: this needs Slurm's commands" in done.stderr
    assert not list((tmp_path / "results" / "default" / ".slurm").glob("2*"))


# ---- inside of a job


def test_the_first_signal_ends_the_work_later_ones_do_not_disturb_the_end():
    with leaving_on({signal.SIGUSR1: 100.0, signal.SIGTERM: 2.0}) as notice:
        assert notice.arrived is None
        with pytest.raises(Leaving) as left:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert (left.value.grace, notice.arrived) == (100.0, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(left.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_task_outside_of_an_array_says_so(harness):
    done = harness("/nowhere", "0", module="harness.slurm.array_task")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: this runs in a task of a job array")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": "0"}, "leave --array out"),
        ({}, "start sbatch in the project's folder"),
    ],
)
def test_the_batch_script_says_what_is_wrong(variables, message, tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), **variables}
    script = ROOT / "slurm" / "sweep.sbatch"
    done = subprocess.run(["bash", script, "seed=0"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_submission_is_no_cell_of_a_report(slurm, tmp_path):
    from harness.report.load import ResultsError, load_results

    submit()
    with pytest.raises(ResultsError, match="has no cells in it"):
        load_results(tmp_path / "results" / "default")
