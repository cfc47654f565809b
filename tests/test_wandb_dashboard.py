"""The W&B dashboard's specification: its panels, and that the tracker logs every name in them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from harness.report.fetch import read_offline_run
from tests.conftest import ROOT, run_tracked

pytestmark = pytest.mark.slow  # real cells, real commands

SCRIPT = str(ROOT / "scripts" / "wandb_dashboard.py")
PLACE = ("team/ohgw", "--dry-run")
GROUPS = ("asha/digits", "pasha(eta=2,brackets=1)/digits 'and' \"x\" != <= \\n or in ü")


@pytest.fixture
def dashboard(tmp_path, environment):
    """``dashboard("ENTITY/PROJECT", ...)`` runs the script in an empty folder that is also the home."""

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = environment | {"HOME": str(tmp_path)} | more
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, Any]:
    """What the tracker logs of a real cell with a target, read back: {"history": keys, "summary": keys, "config"}."""
    folder = tmp_path_factory.mktemp("cell")
    run_tracked(folder, "task.tau=0.1", WANDB_MODE="offline", WANDB_DATA_DIR=str(folder / "data"))
    (file,) = folder.rglob("offline-run-*/run-*.wandb")
    found: dict[str, Any] = {"history": set(), "summary": set(), "config": {}}
    for record in read_offline_run(file):
        if record.HasField("history"):
            found["history"] |= {key(item) for item in record.history.item}
        if record.HasField("summary"):
            found["summary"] |= {key(item) for item in record.summary.update}
        for part in (record.run.config, record.config):
            found["config"] |= {item.key: json.loads(item.value_json) for item in part.update}
    return found


def key(item: Any) -> str:
    return item.key or item.nested_key[0]


def walk(tree: Any, name: str) -> Iterator[Any]:
    """Every value of the key ``name`` anywhere in ``tree``."""
    if isinstance(tree, dict):
        for other, value in tree.items():
            if other == name:
                yield value
            yield from walk(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from walk(value, name)


def panels(tree: Any, kind: str) -> list[dict[str, Any]]:
    """The configurations of the panels of one kind (W&B's viewType)."""
    if isinstance(tree, dict):
        own = [tree["config"]] if tree.get("viewType") == kind else []
        return own + [panel for value in tree.values() for panel in panels(value, kind)]
    return [panel for value in tree for panel in panels(value, kind)] if isinstance(tree, list) else []


@pytest.fixture(scope="module")
def specification(tmp_path_factory) -> dict[str, Any]:
    """The dry run for two groups: made with no home, account or network that could help it."""
    home = tmp_path_factory.mktemp("home")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    groups = [word for group in GROUPS for word in ("--group", group)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *PLACE, *groups], cwd=home, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_the_dry_run_holds_all_panels(specification):
    view, page = specification["workspace"], specification["report"]
    assert (view["entity"], view["project"]) == ("team", "ohgw")
    assert [section["name"] for section in view["spec"]["section"]["panelBankConfig"]["sections"]] == [
        "Time to target", "Anytime", "Hyperparameters", "Rungs", "Overhead"
    ]  # fmt: skip
    (runs,) = view["spec"]["section"]["runSets"]
    assert [group["name"] for group in runs["grouping"]] == ["group", "jobType"]
    for tree, parts in ((view, 1), (page, 2)):
        kinds = {kind: len(panels(tree, kind)) / parts for kind in ("Bar Chart", "Run History Line Plot")}
        assert kinds == {"Bar Chart": 7, "Run History Line Plot": 6}
        assert len(panels(tree, "Parallel Coordinates Plot")) == parts
    assert all(panel["groupBy"] == "jobType" for panel in panels(page, "Bar Chart"))
    assert all(panel["groupBy"] == "jobType" for panel in panels(page, "Run History Line Plot"))


def test_the_report_has_a_part_for_each_group_with_only_its_runs(specification):
    run_sets = [one for several in walk(specification["report"], "runSets") for one in several]
    conditions = [one["filters"]["filters"] for one in run_sets]
    expected = [
        [{"key": {"section": "run", "name": "group"}, "op": "=", "value": group, "disabled": False}]
        for group in GROUPS
        for _ in range(5)
    ]
    assert conditions == expected
    assert all([key["name"] for key in one["grouping"]] == ["jobType"] for one in run_sets)


def test_every_name_in_it_is_one_that_the_tracker_logs(specification, logged):
    history = {name for panel in panels(specification, "Run History Line Plot") for name in panel["metrics"]}
    axes = {panel["xAxis"] for panel in panels(specification, "Run History Line Plot")}
    assert axes == {"wallclock", "gpu_hours", "epochs"}
    assert history | axes <= logged["history"]
    bars = {name for panel in panels(specification, "Bar Chart") for name in panel["metrics"]}
    assert {"t_tau/wallclock", "busy/warm_start", "warm_start_share/flops"} <= bars <= logged["summary"]
    for pattern in walk(specification, "metricRegex"):
        assert len([name for name in logged["history"] if re.search(pattern, name)]) >= 3
    accessors = set(walk(specification, "accessor"))
    assert {"config:ohgw.value.eta", "summary:best_validation_score"} <= accessors
    for accessor in accessors:
        section, name = accessor.split(":")
        if section == "summary":
            assert name in logged["summary"]
        else:
            first, value, *rest = name.split(".")
            assert value == "value"
            tree = logged["config"][first]
            for step in rest:
                tree = tree[step]
    assert "trial_table" in json.dumps(specification)
    assert "trial_table" in logged["summary"]


def test_without_groups_the_report_has_one_part_for_all_runs(dashboard):
    done = dashboard(*PLACE)
    assert done.returncode == 0, done.stderr
    assert "All runs" in done.stdout
    assert len(panels(json.loads(done.stdout)["report"], "Parallel Coordinates Plot")) == 1


def test_help_imports_neither_wandb_nor_pandas(dashboard):
    done = dashboard("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "ENTITY/PROJECT" in done.stdout
    assert not re.search(r"\| +(wandb|pandas)", done.stderr)


@pytest.mark.parametrize("project", ["ohgw", "a/b/c", "/ohgw", "team/"])
def test_a_malformed_project_is_one_sentence(project, dashboard):
    done = dashboard(project, "--dry-run")
    assert done.returncode == 2
    assert done.stderr == f"error: {project!r} is no project: expected ENTITY/PROJECT\n"


def test_without_an_account_it_says_so(dashboard):
    done = dashboard("team/ohgw")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: nobody is logged in at W&B")
    assert "Traceback" not in done.stderr


def test_without_the_package_it_says_how_to_install_it(dashboard, tmp_path, environment):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "wandb_workspaces.py").write_text("raise ModuleNotFoundError('wandb_workspaces')")
    path = os.pathsep.join([str(tmp_path / "hide"), environment["PYTHONPATH"]])
    done = dashboard(*PLACE, PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr == "error: wandb-workspaces is not installed: `pip install 'ohgw-harness[dashboard]'`\n"


@pytest.mark.filterwarnings("ignore:Pydantic V1 style")
def test_it_saves_what_the_dry_run_shows(monkeypatch, capsys):
    """The requests that W&B's package sends: a view and a report, in the project's own groups."""
    import wandb
    from wandb_workspaces.reports.v2 import interface as reports
    from wandb_workspaces.workspaces import internal as workspaces

    from harness.report import fetch
    from scripts import wandb_dashboard

    sent: list[dict[str, Any]] = []
    saved = {"id": "1", "name": "nw-abc-v", "displayName": "d", "description": "", "type": "runs", "spec": "{}",
             "project": {"name": "ohgw", "entityName": "team", "id": "5"}, "user": {"username": "u", "name": "u",
             "photoUrl": "", "admin": False}, "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00",
             "previewUrl": None, "viewCount": 0, "locked": False, "starCount": 0}  # fmt: skip

    class Service:
        app_url = "https://wandb.example"

        def execute_graphql(self, query: Any, variables: dict[str, Any], **more: Any) -> dict[str, Any]:
            sent.append({"query": str(query), **variables})
            if "internalId" in str(query):
                return {"project": {"internalId": "5"}}
            return {"upsertView": {"view": saved}}

    class Server:
        def __init__(self) -> None:
            self._service_api = Service()

        def runs(self, path: str, per_page: int) -> list[Any]:
            assert path == "team/ohgw"
            return [SimpleNamespace(group=group) for group in (GROUPS[1], *GROUPS, None)]

        def projects(self, entity: str) -> list[Any]:
            return [SimpleNamespace(name="ohgw")]

    monkeypatch.setattr(fetch, "open_api", Server)
    monkeypatch.setattr(wandb, "Api", Server)
    assert reports.wandb is workspaces.wandb is wandb
    assert wandb_dashboard.main(["team/ohgw"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert output.count("https://wandb.example/team/ohgw") == 2
    view, page = (request for request in sent if "internalId" not in request["query"])
    assert view["entityName"] == page["entityName"] == "team"
    assert len(panels(json.loads(view["spec"]), "Bar Chart")) == 7
    assert len(panels(json.loads(page["spec"]), "Bar Chart")) == 2 * 7
    filters = [one["filters"]["filters"][0]["value"] for several in walk(json.loads(page["spec"]), "runSets")
               for one in several]  # fmt: skip
    assert filters == [group for group in GROUPS for _ in range(5)]
