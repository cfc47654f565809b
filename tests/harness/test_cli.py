"""The command line as its users meet it: wrong lines, --help, --cfg, --dry-run."""

import json
import subprocess
import sys
import types

import pytest
import yaml

from harness.__main__ import main
from harness.schema import GROUPS, known_keys

WRONG = [  # arguments, what the message must say
    (["scheduler=asah"], "there is no scheduler 'asah'; did you mean asha"),
    (["scheduler=bogus"], "possible: asha"),
    (["task=cifar"], "did you mean cifar10"),
    (["ohgw=of"], "did you mean off"),
    (["experiment=nope"], "there is no experiment 'nope'"),
    (["tracker=null"], "there is no tracker 'null'"),
    (["scheduler=asha,pahsa"], "did you mean pasha"),
    (["scheduler=../scheduler/asha"], "there is no scheduler"),
    (["scheduler=[asha,pasha]"], "a list in brackets is one value"),
    (["scheduler=glob(x*)"], "names nothing"),
    (["schedular=asha"], "did you mean scheduler"),
    (["sceduler.eta=4"], "did you mean"),
    (["SEED=3"], "did you mean seed?"),
    (["eta=3"], "did you mean scheduler.eta or ohgw.eta?"),
    (["task.max_epoch=3"], "did you mean task.max_epochs"),
    (["ohgw.etaa=0.1"], "did you mean"),
    (["scheduler=random", "scheduler.eta=3"], "scheduler.eta is no key of scheduler=random"),
    (["ohgw=off", "ohgw.bogus=3"], "ohgw.bogus is no key of ohgw=off"),
    (["seed=5..1"], "empty range; write seed=1..5"),
    (["seed=0..x"], "a range is written first..last"),
    (["seed=0..9..0"], "the step of a range must be at least 1"),
    (["seed=0..99999999999"], "at most 100000"),
    (["seed=0..9999", "ohgw.eta=choice(1,2,3,4,5,6,7,8,9,10,11)"], "110000 cells"),
    (["seed=-1"], "seed must be an integer >= 0, not '-1'"),
    (["seed=1.5"], "seed must be an integer"),
    (["seed=true"], "seed must be an integer"),
    (["seed=[]"], "seed must be an integer"),
    (["seed=interval(0,1)"], "has no end"),
    (["seed=foo(3)"], "no such function"),
    (["seed="], "seed= has no value"),
    (["scheduler="], "scheduler= has no value"),
    (["results_dir="], "results_dir= has no value"),
    (["seed=1,,2"], "an element of the list is empty"),
    (["seed=1,"], "an element of the list is empty"),
    (["seed=1", "seed=2"], "seed is given twice; for several values write seed=1,2"),
    (["scheduler=asha", "scheduler=pasha"], "scheduler is given twice"),
    (["task.max_epochs=abc"], "task.max_epochs must be an integer >= 1, not 'abc'"),
    (["task.max_epochs=0"], "task.max_epochs must be"),
    (["task.batch_size=0"], "task.batch_size must be"),
    (["task.tau=2"], "task.tau is an accuracy"),
    (["task.tau=0.9,0.95"], "task.tau takes one value"),
    (["task.model=cn"], "did you mean cnn"),
    (["task.space=bogus"], "there is no space 'bogus'"),
    (["task.spaces.study5.lr.upper=1e-9"], "lower < upper"),
    (["task.spaces.study5={}"], "has no hyperparameters"),
    (["task.label_noise=1.5"], "must be a number >= 0 and <= 1"),
    (["task._target_=os.system"], "task._target_ is set by the YAML file"),
    (["task.data_dir=/no/such/folder"], "there is no folder /no/such/folder"),
    (["backend.name=other"], "backend.name is set by the YAML file"),
    (["budget.epochs=-5"], "budget.epochs must be an integer >= 1 or null, not '-5'"),
    (["budget.wallclock=0"], "budget.wallclock must be a number > 0"),
    (["budget.wallclock=nan"], "budget.wallclock must be a number > 0"),
    (["budget.epochs=null"], "a cell would never end"),
    (["budget=3"], "budget is a group of keys"),
    (["n_workers=0"], "n_workers must be an integer >= 1 or null"),
    (["n_workers=1e99"], "n_workers must be an integer"),
    (["name=../x"], "name must be a plain folder name"),
    (["name=a b"], "name must be a plain folder name"),
    (["name=.."], "name must be a plain folder name"),
    (["save_model=bset"], "did you mean best"),
    (["scheduler.eta=1"], "scheduler.eta must be a number >= 2"),
    (["scheduler.grace_period=100"], "is more than task.max_epochs"),
    (["scheduler.type=promote"], "did you mean promotion"),
    (["ohgw.mask=lr"], "ohgw.mask must be a list in brackets"),
    (["ohgw.mask=[lrr]"], "did you mean lr"),
    (["ohgw.mask=[lr"], "']' is missing"),
    (["ohgw.mask=lr]"], "closes a bracket that is not open"),
    (["ohgw.momentum_space=log1m", "task.spaces.study5.momentum.upper=1"], "upper bound of momentum below 1"),
    (["ohgw.eta=-0.1"], "ohgw.eta must be a number >= 0"),
    (["ohgw.eta=${seed}"], "interpolations"),
    (["task.model='cnn"], "is missing"),
    (["++foo=1"], "++ adds keys in Hydra"),
    (["+seed=3"], "write seed=3"),
    (["~seed"], "leave seed out"),
    (["~ohgw"], "~ removes keys in Hydra"),
    (["hydra.run.dir=x"], "Hydra's own settings have no effect"),
    (["hydra/launcher=joblib"], "Hydra's own settings have no effect"),
    (["scheduler@x=asha"], "is no key"),
    (["seed"], "'seed' is not key=value"),
    (["=5"], "is no key"),
    ([""], "is not key=value"),
    (["--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
    (["--config-name", "x=1"], "unknown option --config-name"),
    (["--cfg"], "expected one argument"),
    (["--cfg", "hydra"], "invalid choice: 'hydra'"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_command_line_gets_one_clear_sentence(arguments, message, here, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err
    assert "hydra." not in err.replace(" ".join(arguments), "")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["seed=5..1"], ["++foo=1"], ["scheduler=asah"], ["task.data_dir=/no/such/folder"], ["--cfg", "all"]],
    ids=str,
)
def test_the_process_says_it_too(arguments, harness, tmp_path):
    run = harness(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_group_choice_and_key(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for word in (*GROUPS, *known_keys(), "cifar10", "digits*", "pasha", "exit codes", "--dry-run"):
        assert word in page, word
    assert len(page.splitlines()) < 140


def test_help_of_a_task_shows_its_keys_and_values(capsys):
    assert main(["--help", "task=cifar10", "backend=simulated"]) == 0
    page = capsys.readouterr().out
    assert "keys of task=cifar10 backend=simulated:" in page
    assert "task.model=resnet20" in page
    assert "backend.charge_decisions=False" in page
    assert "backend.partition" not in page  # of another backend
    assert main(["--help", "task=nosuch"]) == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--dry-run", "seed=0..3", "ohgw=off,on"], ["--cfg", "job"]], ids=str
)
def test_planning_imports_neither_torch_nor_syne_tune(arguments, here, environment):
    code = (
        "import sys; from harness.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'syne_tune', 'pandas', 'sklearn'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")


def test_cfg_job_prints_a_config_that_is_yaml(here, capsys):
    assert main(["--cfg", "job", "seed=3,4", "ohgw=off"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["seed"], config["labels"]["variant"], config["ohgw"]) == (3, "off", {"estimator": "off"})
    assert list(here.iterdir()) == []


def test_dry_run_shows_the_plan_and_its_state(here, capsys):
    words = ["ohgw=off,on", "seed=0..1", "-m"]
    assert main(["--dry-run", "--json", *words]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["seed"], cell["variant"], cell["state"]) for cell in cells] == [
        (0, "off", "new"),
        (0, "on", "new"),
        (1, "off", "new"),
        (1, "on", "new"),
    ]
    for cell, file in zip(cells, ("summary.json", "events.jsonl"), strict=False):
        folder = here / "results" / "default" / cell["folder"]
        folder.mkdir(parents=True)
        (folder / file).write_text("")
    assert main(["--dry-run", *words]) == 0
    table = capsys.readouterr().out
    assert [line.split()[4] for line in table.splitlines()[1:5]] == ["finished", "interrupted", "new", "new"]
    assert "4 cells (1 finished, 1 interrupted, 2 new) in results/default" in table


def test_the_plan_goes_to_the_runner(here, monkeypatch):
    asked = []

    def run_sweep(plan, *, json_output, verbose):
        asked.append((len(plan.cells), json_output, verbose))
        return 1

    monkeypatch.setitem(sys.modules, "harness.runner", types.SimpleNamespace(run_sweep=run_sweep))
    assert main(["seed=0..4", "--json", "--multirun", "-v"]) == 1
    assert asked == [(5, True, True)]


def test_interrupted_while_running(here, monkeypatch, capsys):
    def interrupted(plan, *, json_output, verbose):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "harness.runner", types.SimpleNamespace(run_sweep=interrupted))
    assert main([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ohgw-harness ")


def test_a_closed_pipe_is_no_error(here, environment):
    command = f"{sys.executable} -m harness --dry-run seed=0..2000 | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert run.stderr == ""
    assert run.stdout.startswith("task")
