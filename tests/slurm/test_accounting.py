"""Slurm's account of cells that ran in its jobs, and whom it gives up, as a real Slurm has it."""

import json
import sys

import pytest

from backends import slurm_commands
from backends.slurm_commands import SlurmError
from harness.ownership import given_up_by_slurm, own_slurm
from harness.slurm.accounting import account
from tests.backends.conftest import wait_until
from tests.conftest import ROOT, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SMALL = ["scheduler=asha", "ohgw=off", "task.model=mlp", "backend.threads=1", "n_workers=1", "tracker=none"]


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """``submit("seed=0", ...)``: the command in a job with two GPUs; its id."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, options: tuple[str, ...] = ()) -> str:
        script = tmp_path / "job.sh"
        command = " ".join([sys.executable, "-m", "harness", *SMALL, *words])
        script.write_text(f"#!/bin/bash\nexport PYTHONPATH={ROOT}\nexec {command}\n")
        log = f"--output={tmp_path}/job-%j.log"
        return slurm_commands.submit(["--gres=gpu:2", "--mem=2000M", log, "--open-mode=append", *options], script)

    return run


def ended(job: str) -> bool:
    return not slurm_commands.jobs()[job].active


def check_adds_up(found: dict) -> None:
    assert "missing" not in found
    assert sum(found["gpu_seconds"].values()) == pytest.approx(found["gpu_hours"] * 3600)
    assert min(seconds for seconds in found["gpu_seconds"].values()) >= 0


def test_two_cells_of_one_job_share_what_slurm_charges(submit, tmp_path):
    job = submit("seed=0..1", "budget.epochs=30")
    wait_until(lambda: ended(job), 120)
    found = account(tmp_path / "results" / "default", wait_seconds=60)
    assert len(found) == 2, (tmp_path / f"job-{job}.log").read_text()
    for cell, content in found.items():
        check_adds_up(content)
        assert json.loads((tmp_path / "results" / "default" / cell / "slurm.json").read_text()) == content
        opened = read_lines(tmp_path / "results" / "default" / cell / "events.jsonl")[0]
        assert {"job": job, "restart": 0, "gpus": 2}.items() <= opened["slurm"].items()
        assert content["runs"][0]["max_rss"] > 10**8
        assert content["gpu_seconds"]["outside"] > 0, "Python and the workers had to start"
    (run,) = slurm_commands.accounting([job])
    assert sum(content["gpu_hours"] for content in found.values()) == pytest.approx(2 * run.elapsed / 3600)


def test_a_requeued_job_goes_on_with_its_cell_and_both_runs_are_accounted_for(submit, cluster, tmp_path):
    job = submit("seed=0", "budget.epochs=400", options=("--requeue",))
    root = tmp_path / "results" / "default"

    def reports() -> int:
        return sum(e["e"] == "report" for path in root.glob("*/events.jsonl") for e in read_lines(path))

    wait_until(lambda: reports() >= 20, 120)
    slurm_commands.requeue(job)

    wait_until(lambda: slurm_commands.jobs()[job].state == "PENDING", 90)
    cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")  # else Slurm lets it wait for two minutes
    wait_until(lambda: ended(job), 200)
    ((cell, found),) = account(root, wait_seconds=60).items()
    log = (tmp_path / f"job-{job}.log").read_text()
    assert (root / cell / "summary.json").exists(), log
    check_adds_up(found)
    assert [run["state"] for run in found["runs"]] == ["REQUEUED", "COMPLETED"]
    assert found["attempts"] == 2
    opens = [e["slurm"]["restart"] for e in read_lines(root / cell / "events.jsonl") if e["e"] == "open"]
    assert opens == [0, 1]
    runs = slurm_commands.accounting([job])
    assert found["gpu_hours"] == pytest.approx(2 * sum(run.elapsed for run in runs) / 3600)


def test_slurm_gives_up_jobs_that_have_ended_and_no_others(cluster, tmp_path):
    script = tmp_path / "holder.sh"
    script.write_text(
        f"#!/bin/bash\nPYTHONPATH={ROOT} {sys.executable} -c '"
        f'import json; from harness.ownership import own_slurm; print(json.dumps(own_slurm()))\' > {tmp_path}/who-$1\n'
        "sleep 600\n"
    )  # fmt: skip
    first, second = (
        slurm_commands.submit(["--mem=500M", "--output=/dev/null"], script, name) for name in ("first", "second")
    )
    files = {name: tmp_path / f"who-{name}" for name in ("first", "second")}
    wait_until(lambda: all(file.exists() and file.read_text() for file in files.values()), 60)
    holders = {name: {"slurm": json.loads(file.read_text())} for name, file in files.items()}
    assert own_slurm() is None
    assert holders["first"]["slurm"]["job"] == first
    slurm_commands.cancel([first])
    wait_until(lambda: given_up_by_slurm(holders["first"]), 60)
    assert not given_up_by_slurm(holders["second"])
    with pytest.raises(SlurmError, match="knows nothing of job 4000000"):
        given_up_by_slurm({"slurm": {**holders["second"]["slurm"], "job": "4000000"}})
    with pytest.raises(SlurmError, match="of another cluster, elsewhere"):
        given_up_by_slurm({"slurm": {**holders["second"]["slurm"], "cluster": "elsewhere"}})
    slurm_commands.cancel([second])
