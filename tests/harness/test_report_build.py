"""The whole report, by its command."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from harness.report import Study, build, description, load_results, write_report
from harness.report import __main__ as command
from harness.report.document import Figure, Section
from tests.conftest import ROOT
from tests.harness import degenerate_studies
from tests.harness.fake_results import FakeCell, write_study


def small(monkeypatch, *titles):
    """Only these sections: the drawing of the others takes many seconds."""
    monkeypatch.setattr(build, "SECTIONS", {title: build.SECTIONS[title] for title in titles})


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_command_writes_the_report_and_prints_the_verdict(tmp_path, monkeypatch, capsys):
    small(monkeypatch, "The verdict", "The experiment", "Overhead")
    path = write_study(tmp_path, ("off", "on"), range(7))
    assert command.main([str(path)]) == 0
    out = capsys.readouterr().out
    verdict = json.loads((path / "report" / "verdict.json").read_text())
    assert verdict["sentence"] in out.splitlines()
    assert f"report: {path / 'report' / 'index.html'} (beside it 1 figure" in out.splitlines()[-1]
    names = {file.stem for file in (path / "report" / "tables").iterdir()}
    assert {"verdict_all", "verdict_splits", "spaces_all", "overhead-shares_all"} <= names
    for stem in names:
        assert {f"{stem}.{ending}" for ending in ("csv", "md", "tex")} <= set(os.listdir(path / "report" / "tables"))
    with open(path / "report" / "tables" / "verdict_all.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["variant"], row["pairs"]) == ("on", "7")


def test_the_same_command_again_gives_the_same_bytes_and_leaves_nothing_old(tmp_path, monkeypatch):
    small(monkeypatch, "The verdict", "Overhead")
    path = write_study(tmp_path, ("off", "on"), range(3))
    study = Study(load_results(path))
    report = write_report(study, path / "report")
    before = contents(report.folder)
    (report.folder / "figures" / "old_figure.png").write_text("of an earlier report")
    (report.folder / "notes.txt").write_text("a user's own")
    write_report(Study(load_results(path)), path / "report")
    assert contents(report.folder) == before | {"notes.txt": b"a user's own"}


def test_a_report_elsewhere_and_of_another_target(tmp_path, monkeypatch, capsys):
    small(monkeypatch, "The verdict")
    path = write_study(tmp_path, ("off", "on"), range(7))
    assert command.main([str(path), "--out", str(tmp_path / "x" / "y"), "--tau", "0.999"]) == 0
    assert not (path / "report").exists()
    assert (tmp_path / "x" / "y" / "index.html").exists()
    assert "at least 0.9990" in capsys.readouterr().out


def test_where_the_report_cannot_be_written_one_sentence_says_so(tmp_path, monkeypatch, capsys):
    small(monkeypatch, "The verdict")
    path = write_study(tmp_path, ("off",), range(1))
    (path / "report").write_text("in the way")
    assert command.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write the report to {path / 'report'}: ")
    assert "--out DIR" in error
    assert len(error.splitlines()) == 1


def broken(study):
    raise RuntimeError("a mistake of ours")


def broken_drawing():
    raise RuntimeError("cannot be drawn")


def test_a_broken_part_costs_only_itself_and_is_named(tmp_path, monkeypatch, capsys):
    sections = {
        "The verdict": build.SECTIONS["The verdict"],
        "Overhead": broken,
        "Rungs": lambda study: Section("rungs", "Rungs", figures=[Figure("bad_all", "c", broken_drawing, {})]),
    }
    monkeypatch.setattr(build, "SECTIONS", sections)
    path = write_study(tmp_path, ("off",), range(1))
    assert command.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert "a mistake of ours" in err
    assert "cannot be drawn" in err
    assert "report: " in out
    page = (path / "report" / "index.html").read_text()
    assert "This section is missing: the report failed at it (RuntimeError: a mistake of ours)." in page
    assert "The figure bad_all is missing" in page


@pytest.mark.slow
def test_an_interrupt_leaves_the_earlier_report_as_it_was(tmp_path, environment):
    path = write_study(tmp_path, ("off", "on"), range(2))
    (path / "report").mkdir()
    (path / "report" / "index.html").write_text("the earlier one")
    words = [sys.executable, "-m", "harness.report", str(path)]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((path / "report").glob(".new-*/figures/*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error == "interrupted; an earlier report is as it was\n"
    assert (path / "report" / "index.html").read_text() == "the earlier one"
    assert os.listdir(path / "report") == ["index.html"]


@pytest.mark.slow
@pytest.mark.parametrize("name", degenerate_studies.STUDIES)
def test_a_study_of_any_kind_gives_a_whole_report(tmp_path, name):
    path = degenerate_studies.write(name, tmp_path)
    study = Study(load_results(path))
    report = write_report(study, path / "report")
    assert report.broken == {}
    assert {section.title for section in report.sections} == set(build.SECTIONS)
    for kind in ("tables", "figures"):  # no two parts in one file
        names = [part.name for section in report.sections for part in getattr(section, kind)]
        assert len(names) == len(set(names))
    for section in report.sections:  # sound output, or a sentence why not
        assert section.tables or section.figures or section.notes or section.text
        for figure in section.figures:
            assert (report.folder / "figures" / f"{figure.name}.pdf").stat().st_size > 1000
    verdict = json.loads((report.folder / "verdict.json").read_text(), parse_constant=pytest.fail)
    assert verdict["answer"] in ("yes", "no", "undecided")


def test_reading_only_needs_no_drawing_library(tmp_path, environment):
    path = write_study(tmp_path, ("off", "on"), range(2))
    code = (
        "import sys; from harness.report.__main__ import main; main([sys.argv[1], '--summary']); "
        "print([m for m in ('torch', 'matplotlib', 'scikit_posthocs', 'wandb', 'syne_tune') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_conditions_whose_names_differ_in_a_sign_only_have_files_of_their_own(tmp_path, monkeypatch):
    small(monkeypatch, "Hyperparameters")
    for noise, task in enumerate(("digits(shift=0.1)", "digits(shift=-0.1)")):
        for variant in ("off", "on"):
            FakeCell(variant=variant, task=task, keys={"task.shift": noise}).write(tmp_path)
    report = write_report(Study(load_results(tmp_path / "default")), tmp_path / "out")
    names = [figure.name for figure in report.sections[0].figures]
    assert names == ["hyperparameters_digits-shift-0.1-pasha", "hyperparameters_digits-shift-0.1-pasha-2"]
    for name in names:
        assert (tmp_path / "out" / "figures" / f"{name}.pdf").exists()
    assert "digits(shift=0.1)" in (tmp_path / "out" / "tables" / f"{names[1]}.md").read_text()


def test_folders_of_a_user_are_not_replaced(tmp_path, monkeypatch, capsys):
    small(monkeypatch, "The verdict")
    path = write_study(tmp_path, ("off",), range(1))
    own = tmp_path / "paper" / "figures" / "own.pdf"
    own.parent.mkdir(parents=True)
    own.write_text("drawn by hand")
    assert command.main([str(path), "--out", str(tmp_path / "paper")]) == 2
    assert "not of an earlier report" in capsys.readouterr().err
    assert own.read_text() == "drawn by hand"
    assert os.listdir(tmp_path / "paper") == ["figures"]


def test_one_cell_is_reported_from_within_its_folder(tmp_path, monkeypatch):
    small(monkeypatch, "The verdict", "Where the results come from")
    paths = FakeCell().write(tmp_path)
    monkeypatch.chdir(paths.root)
    assert command.main(["."]) == 0
    assert (paths.root / "report" / "index.html").exists()


def test_the_command_is_what_was_typed_and_copies_are_not_counted(tmp_path):
    FakeCell(seed=0, command=["/x/harness/__main__.py", "task=digits"]).write(tmp_path)
    FakeCell(seed=1, command=["/x/study.py", "--fast"]).write(tmp_path)
    shutil.copytree(tmp_path / "default" / FakeCell(seed=1).folder, tmp_path / "default" / "z-copy")
    section = description.provenance(Study(load_results(tmp_path / "default")))
    table = next(table for table in section.tables if table.name == "provenance_command")
    assert dict(zip(table.frame["command"], table.frame["cells"], strict=True)) == {
        "python -m harness task=digits": 1, "/x/study.py --fast": 1,
    }  # fmt: skip


def test_two_settings_under_one_label_are_both_described(tmp_path):
    space = {"lr": {"lower": 0.1, "upper": 2.0}}
    FakeCell().write(tmp_path)
    FakeCell(variant="on", space=space, keys={"task.batch_size": 64, "scheduler.eta": 4}).write(tmp_path)
    section = description.section(Study(load_results(tmp_path / "default")))
    text = "\n".join(section.text)
    assert "batches of 64" in text
    assert "(eta=3)" in text
    assert "(eta=4)" in text
    assert sorted(section.tables[0].frame["upper"]) == [1.0, 2.0]
