"""The README's commands work: each one is run, small."""

import re
import shlex

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "-m harness " in line
]
SMALLER = ["task.model=mlp", "budget.epochs=6"]


def test_commands_are_found():
    assert "uv run python -m harness scheduler=pasha ohgw=on seed=0..49" in COMMANDS
    assert "uv run pytest" in README


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, harness):
    words = shlex.split(command)[shlex.split(command).index("harness") + 1 :]
    plain = "--help" in words or "--dry-run" in words
    elsewhere = ("experiment=paper", "=slurm", "experiment=transfer", "experiment=ablation")
    if any(part in command for part in elsewhere):  # tests/slurm and test_studies.py run such ones
        words = [w for w in words if "data_dir" not in w] + ["--dry-run"]
    elif not plain and "experiment=smoke" not in words:
        words = [re.sub(r"seed=0\.\.\d+", "seed=0..1", w) for w in words]
        words += SMALLER if not any(w.startswith("task=") for w in words) else SMALLER[1:]
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_the_report_command_stands_after_the_sweep_it_reads():
    assert "uv run python -m harness.report results/default" in README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_python_imports():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
