"""Cells fetched from W&B's offline runs and, through a stand-in for its server, from W&B."""

import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from harness.report import fetch as module
from harness.report.fetch import NOTE, RECORDS, fetch, read_offline_run
from harness.report.load import ResultsError, load_results
from harness.tracking import content
from tests.conftest import run_tracked
from tests.harness.wandb_server import serve

pytestmark = pytest.mark.slow  # real cells, real commands

VARIANTS = {"off", "on"}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two real cells, run with tracker=wandb and no account: the folder that the command ran in."""
    folder = tmp_path_factory.mktemp("study")
    run_tracked(folder, "ohgw=off,on", WANDB_MODE="offline", WANDB_DATA_DIR=str(folder / "data"))
    return folder


@pytest.fixture
def original(study) -> Path:
    return study / "results" / "default"


def quiet(line: str) -> None:
    pass


def offline_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("offline-run-*/run-*.wandb"))


def contents(folder: Path) -> dict[str, bytes]:
    """The record files below a folder of cells."""
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in folder.rglob("*") if p.name in RECORDS}


def assert_same_results(fetched: Path, original: Path) -> None:
    a, b = load_results(fetched), load_results(original)
    assert set(a.cells.variant) == VARIANTS
    for name in ("cells", "reports", "trials", "coordinates"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))
    assert (a.configs, a.meta, a.commands, a.corrupt, a.warnings) == (b.configs, b.meta, b.commands, {}, [])
    assert contents(fetched) == contents(original)


# ---- offline runs


def test_offline_runs_give_the_same_results(original, tmp_path):
    target = fetch(f"wandb:{original}", tmp_path / "copy", quiet)
    assert target == tmp_path / "copy"
    assert_same_results(target, original)
    assert {p.name for p in target.rglob("*") if p.is_file()} == {*RECORDS, NOTE}
    assert all(p.is_dir() for p in target.iterdir())


def test_default_target_is_named_after_the_folder(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetch(f"wandb:{original}", say=quiet) == Path("results/wandb-default")
    assert_same_results(tmp_path / "results/wandb-default", original)


def test_only_what_is_missing_or_changed_is_fetched_again(original, tmp_path):
    lines: list[str] = []
    target = fetch(f"wandb:{original}", tmp_path / "copy", quiet)
    first, second = sorted(target.iterdir())

    def again() -> list[bool]:
        before = [folder.stat().st_ino for folder in (first, second)]
        fetch(f"wandb:{original}", target, lines.append)
        assert_same_results(target, original)
        return [old != folder.stat().st_ino for old, folder in zip(before, (first, second), strict=True)]

    assert again() == [False, False]
    assert "0 of 2 cells fetched" in lines[-1]
    (first / "summary.json").unlink()
    assert again() == [True, False]
    note = json.loads((second / NOTE).read_text())
    (second / NOTE).write_text(json.dumps(note | {"digest": "of an older version"}))
    assert again() == [False, True]
    (target / ".fetching" / "left").mkdir(parents=True)  # by a call that was killed
    assert again() == [False, False]
    assert sorted(target.iterdir()) == [first, second]


def test_the_record_files_are_those_that_the_trackers_log():
    assert set(RECORDS) == set(content.FILES)


def test_the_command_reports_offline_runs(study, tmp_path, harness):
    done = harness(f"wandb:{study}", "--summary", module="harness.report")
    assert done.returncode == 0, done.stderr
    assert all(variant in done.stdout for variant in VARIANTS)
    assert "2 of 2 cells fetched" in done.stderr
    assert len(list((tmp_path / "results").glob("wandb-*/*/events.jsonl"))) == 2


def test_files_that_are_gone_are_named_in_one_sentence(original, study, tmp_path):
    shutil.copytree(original / "wandb", tmp_path / "wandb")
    hidden = study / "hidden"
    original.rename(hidden)
    try:
        with pytest.raises(ResultsError, match="files for `wandb sync` are gone") as error:
            fetch(f"wandb:{tmp_path / 'wandb'}", tmp_path / "copy", quiet)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "copy").exists()
    finally:
        hidden.rename(original)


# ---- offline run files, also hostile ones


def write_offline_run(path: Path, payloads: Iterable[bytes]) -> None:
    """A log as LevelDB's log_format.md describes it, after W&B's seven bytes."""
    data = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for payload in payloads:
        first, rest = True, payload
        while first or rest:
            if (space := 32768 - len(data) % 32768) < 7:
                data += bytes(space)
                space = 32768
            part, rest = rest[: space - 7], rest[space - 7 :]
            kind = {(True, False): 1, (True, True): 2, (False, True): 3, (False, False): 4}[first, bool(rest)]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def altered(original: Path, to: Path, change: Callable[[Any], None], name: str = "offline-run-2-b") -> Path:
    """A copy of the first offline run of ``original`` in a folder of its own, each record passed to ``change``."""
    file = offline_files(original)[0]
    records = list(read_offline_run(file))
    for record in records:
        change(record)
    write_offline_run(to / name / file.name, [record.SerializeToString() for record in records])
    return to


def test_the_reader_finds_what_wandb_wrote(original):
    for file in offline_files(original):
        kinds = [record.WhichOneof("record_type") for record in read_offline_run(file)]
        assert {"run", "history", "summary", "artifact", "exit"} <= set(kinds)


def test_wandbs_own_reader_finds_the_same(original, tmp_path):
    """``wandb leet inspect``, W&B's reader of these files since it has none in Python."""
    for file in offline_files(original):
        words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        theirs = [json.loads(line) for line in done.stdout.splitlines()]
        ours = list(read_offline_run(file))
        assert [item["type"] for item in theirs] == [record.WhichOneof("record_type") for record in ours]
        history = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                   for record in ours if record.HasField("history")]  # fmt: skip
        shown = [item["history"]["item"] for item in theirs if item["type"] == "history"]
        assert [row["incumbent/test_score"] for row in history[:-1]] == [
            row["incumbent/test_score"] for row in shown[:-1]
        ]
        digests = [{entry.path: entry.digest for entry in record.artifact.manifest.contents}
                   for record in ours if record.HasField("artifact")]  # fmt: skip
        assert digests == [
            {entry["path"]: entry["digest"] for entry in item["artifact"]["manifest"]["contents"]}
            for item in theirs
            if item["type"] == "artifact"
        ]


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.one_of(st.integers(0, 200), st.integers(32_700, 32_800), st.just(100_000)), max_size=8),
       cut=st.floats(0, 1))  # fmt: skip
def test_records_of_every_length_are_read_and_a_torn_file_ends_early(lengths, cut, tmp_path_factory):
    payloads = [Record(num=i + 1, uuid="x" * length).SerializeToString() for i, length in enumerate(lengths)]
    file = tmp_path_factory.mktemp("log") / "run-a.wandb"
    write_offline_run(file, payloads)
    assert [record.SerializeToString() for record in read_offline_run(file)] == payloads
    data = file.read_bytes()
    file.write_bytes(data[: 7 + int(cut * (len(data) - 7))])
    read = [record.SerializeToString() for record in read_offline_run(file)]
    assert read == payloads[: len(read)]


def test_a_damaged_file_is_left_out_with_its_place(original, tmp_path):
    shutil.copytree(original, tmp_path / "runs")
    file = offline_files(tmp_path / "runs")[0]
    data = bytearray(file.read_bytes())
    data[100] ^= 255
    file.write_bytes(data)
    lines: list[str] = []
    target = fetch(f"wandb:{tmp_path / 'runs'}", tmp_path / "copy", lines.append)
    assert len(list(target.iterdir())) == 1
    assert any(line.startswith(f"left out: {file}: damaged at byte") for line in lines)


def test_a_file_of_another_form_is_left_out(tmp_path):
    file = tmp_path / "runs" / "offline-run-1-a" / "run-a.wandb"
    write_offline_run(file, [b"\xff\xff"])
    with pytest.raises(ResultsError, match="holds a record of another form"):
        fetch(f"wandb:{tmp_path / 'runs'}", tmp_path / "copy", quiet)
    file.write_bytes(b"PK\x03\x04 no log")
    with pytest.raises(ResultsError, match="not a file of an offline run"):
        fetch(f"wandb:{tmp_path / 'runs'}", tmp_path / "copy", quiet)


def test_a_resumed_cell_counts_with_its_last_records(original, tmp_path):
    def later(artifact: bool, digest: str = "") -> Callable[[Any], None]:
        def change(record: Any) -> None:
            if record.HasField("run"):
                record.run.start_time.seconds += 60
            if record.HasField("artifact"):
                record.artifact.digest = digest
                record.artifact.type = "cell" if artifact else "other"

        return change

    runs = altered(original, tmp_path / "runs", lambda record: None, "offline-run-1-a")
    altered(original, runs, later(artifact=False))  # goes on, and has not ended
    (cell,) = fetch(f"wandb:{runs}", tmp_path / "copy", quiet).iterdir()
    assert json.loads((cell / NOTE).read_text())["digest"] != ""
    altered(original, runs, later(artifact=True, digest="newer"))
    (cell,) = fetch(f"wandb:{runs}", tmp_path / "copy", quiet).iterdir()
    assert json.loads((cell / NOTE).read_text())["digest"] == "newer"


def test_a_cell_of_two_studies_is_kept_twice_and_the_copy_is_named(original, tmp_path):
    def other_study(record: Any) -> None:
        if record.HasField("run"):
            record.run.run_id = "other"

    runs = altered(original, tmp_path / "runs", lambda record: None, "offline-run-1-a")
    altered(original, runs, other_study)
    results = load_results(fetch(f"wandb:{runs}", tmp_path / "copy", quiet))
    assert len(results.cells) == 1
    assert any("other repeats" in warning for warning in results.warnings)


def test_of_a_cell_that_was_run_again_the_newest_finished_run_counts(original, tmp_path):
    def run(name: str, later: int, finished: bool = True) -> Callable[[Any], None]:
        def change(record: Any) -> None:
            if record.HasField("run"):
                record.run.run_id = name
                record.run.start_time.seconds += later
            if record.HasField("artifact") and not finished:
                for i, entry in enumerate(record.artifact.manifest.contents):
                    if entry.path == "summary.json":
                        del record.artifact.manifest.contents[i]

        return change

    runs = altered(original, tmp_path / "runs", run("first", 0), "offline-run-1-a")
    altered(original, runs, run("second", 60), "offline-run-2-b")
    altered(original, runs, run("third", 120, finished=False), "offline-run-3-c")
    target = fetch(f"wandb:{runs}", tmp_path / "copy", quiet)
    cell = offline_files(original)[0]
    name = next(record.run.display_name for record in read_offline_run(cell) if record.HasField("run"))
    notes = {folder.name: json.loads((folder / NOTE).read_text())["run"] for folder in target.iterdir()}
    assert notes == {name: "second", f"{name}.first": "first", f"{name}.third": "third"}
    assert list(load_results(target).cells.cell) == [name]


def test_a_run_whose_record_has_been_replaced_is_left_out(original, tmp_path):
    def stale(record: Any) -> None:
        if record.HasField("run"):
            record.run.run_id = "stale"
        for entry in record.artifact.manifest.contents if record.HasField("artifact") else ():
            entry.digest = "of what was there before"

    runs = altered(original, tmp_path / "runs", stale)
    altered(original, runs, lambda record: None, "offline-run-3-c")
    lines: list[str] = []
    assert len(list(fetch(f"wandb:{runs}", tmp_path / "copy", lines.append).iterdir())) == 1
    assert any("run stale: " in line and "has been changed since" in line for line in lines)


HOSTILE = ["../../x", "/tmp/x", "..", ".", "", ".locks", "a/b", "a\\b", "a\nb", "a\0b", "x" * 300, "~", 5, None, ["a"]]


@pytest.mark.parametrize("folder", HOSTILE)
def test_a_hostile_name_of_a_cell_is_refused(folder, original, tmp_path):
    def change(record: Any) -> None:
        if record.HasField("artifact"):
            record.artifact.metadata = json.dumps({"folder": folder})

    runs = altered(original, tmp_path / "runs", change)
    with pytest.raises(ResultsError, match="cannot be a folder's"):
        fetch(f"wandb:{runs}", tmp_path / "deep" / "copy", quiet)
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}


def test_other_paths_in_an_artifact_are_never_written(original, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")

    def change(record: Any) -> None:
        if record.HasField("artifact"):
            for path in ("../../x", str(tmp_path / "y"), "sub/../../../z", "config.yaml/../../w", "payload.pkl"):
                record.artifact.manifest.contents.add(path=path, local_path=str(secret))

    runs = altered(original, tmp_path / "runs", change)
    target = fetch(f"wandb:{runs}", tmp_path / "copy", quiet)
    assert {p.name for p in target.rglob("*") if p.is_file()} == {*RECORDS, NOTE}
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "copy", "secret"}


def test_a_file_that_is_not_the_logged_one_is_refused(original, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")

    def change(record: Any) -> None:
        for entry in record.artifact.manifest.contents if record.HasField("artifact") else ():
            if entry.path == "config.yaml":
                entry.local_path = str(secret)

    runs = altered(original, tmp_path / "runs", change)
    with pytest.raises(ResultsError, match="has been changed since"):
        fetch(f"wandb:{runs}", tmp_path / "copy", quiet)
    assert list((tmp_path / "copy").rglob("*")) == []


def test_a_reference_in_an_artifact_is_refused(original, tmp_path):
    def change(record: Any) -> None:
        for entry in record.artifact.manifest.contents if record.HasField("artifact") else ():
            entry.ref = "file:///etc/passwd"

    with pytest.raises(ResultsError, match=r"refers to a \S+ elsewhere"):
        fetch(f"wandb:{altered(original, tmp_path / 'runs', change)}", tmp_path / "copy", quiet)


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_was_not_fetched_is_not_touched(kind, original, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / NOTE).write_text("{}")
    place = tmp_path / "copy" / sorted(contents(original))[0].split("/")[0]
    place.parent.mkdir()
    if kind == "link":
        place.symlink_to(tmp_path / "mine")
    elif kind == "file":
        place.write_text("mine")
    else:
        place.mkdir()
    with pytest.raises(ResultsError, match="was not fetched from W&B"):
        fetch(f"wandb:{original}", tmp_path / "copy", quiet)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [NOTE]
    assert os.path.lexists(place)


# ---- the server


class Calls:
    """Methods that check their arguments against the real method's signature before they answer."""

    def __init__(self, real: type, **answers: Callable[..., Any]):
        self._real, self._answers = real, answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answer = self._answers[name]

        def call(*arguments: Any, **named: Any) -> Any:
            inspect.signature(getattr(self._real, name)).bind(self, *arguments, **named)
            return answer(*arguments, **named)

        return call


class Stored(Calls):
    """A run, artifact or manifest entry: methods as in Calls, and attributes that the real class has as well."""

    def __init__(self, real: type, values: dict[str, Any], **answers: Callable[..., Any]):
        super().__init__(real, **answers)
        for name, value in values.items():
            assert isinstance(getattr(real, name, None), property) or name in getattr(real, "model_fields", {"id"})
            setattr(self, name, value)


def server(original: Path, deliver: Callable[[Path, Path], Any] = shutil.copyfile, **artifact: Any) -> Any:
    """A ``wandb.Api`` whose project holds what the offline runs of ``original`` would upload."""
    from wandb.apis.public import Run
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    def entry_of(logged: Any) -> Any:
        def download(root: str) -> str:
            deliver(Path(logged.local_path), Path(root) / logged.path)
            return str(Path(root) / logged.path)

        values = {"ref": logged.ref or None, "path": logged.path, "digest": logged.digest, "extra": {}}
        return Stored(ArtifactManifestEntry, values, download=download)

    def artifact_of(logged: Any, created: str, **changed: Any) -> Any:
        entries = {entry.path: entry_of(entry) for entry in logged.manifest.contents}
        values = {"type": logged.type, "name": logged.name, "digest": logged.digest, "state": "COMMITTED",
                  "created_at": created, "metadata": json.loads(logged.metadata or "{}"),
                  "manifest": SimpleNamespace(entries=entries), **changed}  # fmt: skip
        return Stored(wandb.Artifact, values, get_entry=entries.__getitem__)

    def run_of(file: Path) -> Any:
        records = list(read_offline_run(file))
        run = next(record.run for record in records if record.HasField("run"))
        logged = [record.artifact for record in records if record.HasField("artifact")]
        (cell,) = [one for one in logged if one.type == "cell"]
        answer = [artifact_of(cell, "2026-01-02T00:00:00Z", **artifact)]
        answer += [artifact_of(cell, "2026-01-01T00:00:00Z", digest="older", manifest=SimpleNamespace(entries={}))]
        answer += [artifact_of(cell, "2026-01-03T00:00:00Z", state="PENDING")]
        answer += [artifact_of(one, "2026-01-04T00:00:00Z") for one in logged if one.type != "cell"]
        return Stored(Run, {"id": run.run_id, "state": "finished"}, logged_artifacts=lambda: answer)

    return Calls(wandb.Api, runs=lambda path, per_page: [run_of(file) for file in offline_files(original)])


def test_a_project_on_the_server_gives_the_same_results(original, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_api", lambda: server(original))
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    target = fetch("wandb:team/ohgw", say=lines.append)
    assert target == Path("results/wandb-team-ohgw")
    assert_same_results(target, original)
    fetch("wandb:team/ohgw", say=lines.append)
    assert "2 of 2 cells fetched" in lines[1]
    assert "0 of 2 cells fetched" in lines[-1]


def test_an_artifact_on_the_server_cannot_lead_elsewhere(original, tmp_path, monkeypatch):
    def fails(message: str, *arguments: Any, **artifact: Any) -> None:
        monkeypatch.setattr(module, "open_api", lambda: server(original, *arguments, **artifact))
        with pytest.raises(ResultsError, match=message):
            fetch("wandb:team/ohgw", tmp_path / "copy", say.append)

    say: list[str] = []
    (tmp_path / "mine").write_text("mine")
    fails("no run has the records", metadata={"folder": "../../x"})
    assert any("'../../x' cannot be a folder's" in line for line in say)
    ref = {name: SimpleNamespace(ref="file:///etc/passwd") for name in RECORDS}
    fails("no run has the records", manifest=SimpleNamespace(entries=ref))
    assert any("refers to files elsewhere" in line for line in say)
    fails("did not deliver", lambda source, path: path.symlink_to(tmp_path / "mine"))
    fails("did not deliver", lambda source, path: None)
    fails("did not deliver", lambda source, path: path.write_text("not what was logged"))
    assert {p.name for p in tmp_path.iterdir()} <= {"mine", "copy"}
    assert list((tmp_path / "copy").rglob("*")) == []


def test_a_download_that_breaks_off_is_one_sentence_and_goes_on_later(original, tmp_path, monkeypatch):
    done: list[Path] = []

    def breaks(source: Path, path: Path) -> None:
        if path.name == "summary.json" and done:
            raise wandb.errors.CommError("HTTP 502 (Bad Gateway)\nand more")
        done.append(path)
        shutil.copyfile(source, path)

    monkeypatch.setattr(module, "AT_ONCE", 1)
    monkeypatch.setattr(module, "open_api", lambda: server(original, breaks))
    with pytest.raises(ResultsError, match=r"HTTP 502 \(Bad Gateway\); the same command goes on") as error:
        fetch("wandb:team/ohgw", tmp_path / "copy", quiet)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(module, "open_api", lambda: server(original))
    assert_same_results(fetch("wandb:team/ohgw", tmp_path / "copy", quiet), original)


def test_wandbs_own_client_fetches_a_project_over_http(original, tmp_path, environment):
    with serve(offline_files(original)) as (address, requests):
        account = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": address, "WANDB_CACHE_DIR": str(tmp_path / "cache")}
        done = command(tmp_path, environment, **account)
        assert done.returncode == 0, done.stderr
        assert all(variant in done.stdout for variant in VARIANTS)
        assert_same_results(tmp_path / "results" / "wandb-team-ohgw", original)
        downloads = [request for request in requests if request.startswith("/artifactsV2/")]
        assert {path.rpartition("/")[2] for path in downloads} == set(RECORDS)
        assert len(downloads) <= 2 * len(RECORDS)  # meta.json is the same in both, W&B's cache may spare the second one
        requests.clear()
        done = command(tmp_path, environment, **account)
        assert "0 of 2 cells fetched" in done.stderr
        assert not [request for request in requests if request.startswith("/artifactsV2/")]
        done = command(tmp_path, environment, project="team/other", **account)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: W&B has no project team/other")


# ---- the user's mistakes


@pytest.mark.parametrize("source", ["wandb:", "wandb:a", "wandb:a/b/c", "wandb:/no/such", "wandb:a/", "wandb:/b",
                                    "wandb:../b", "wandb:a/..", "wandb:~/b", "wandb:a/b?c", "wandb: /b"])  # fmt: skip
def test_a_malformed_source_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResultsError, match="neither a project nor a folder: expected wandb:ENTITY/PROJECT"):
        fetch(source, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_offline_runs_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="has no offline runs"):
        fetch(f"wandb:{tmp_path}", say=quiet)


def command(
    cwd: Path, environment: dict[str, str], project: str = "team/ohgw", **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness.report", f"wandb:{project}", "--summary"],
        cwd=cwd, env=environment | {"HOME": str(cwd)} | more, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_without_an_account_the_command_says_so(tmp_path, environment):
    done = command(tmp_path, environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: nobody is logged in at W&B")
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # W&B's client tries several times
def test_without_network_the_command_says_so(tmp_path, environment):
    done = command(
        tmp_path, environment, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_HTTP_TIMEOUT="2"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: W&B cannot be reached, or refuses the account")
    assert "Traceback" not in done.stderr


def test_without_the_package_the_command_says_so(tmp_path, environment):
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError('wandb')")
    done = command(tmp_path, environment)
    assert done.returncode == 2
    assert done.stderr == "error: wandb is not installed: `pip install wandb`\n"
