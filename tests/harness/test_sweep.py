"""Override grammar, composition, identity and order of cells; every YAML file of ``conf/`` loads."""

import copy
import dataclasses
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.context import UserError
from harness.compose import CONF, Conf
from harness.overrides import parse_override
from harness.schema import GROUPS, Key, check_config, known_keys
from harness.sweep import check_data, identity, make_plan

FILES = {
    "config.yaml": """
        defaults:
          - _self_
          - scheduler: asha
          - ohgw: "on"
          - task: toy
          - backend: pool
          - launch: local
          - tracker: none
          - experiment: null
        seed: 0
        n_workers: 2
        name: default
        results_dir: results
        save_model: none
        budget: {wallclock: null, gpu_hours: null, trials: null, epochs: 20}
        """,
    "scheduler/asha.yaml": "{_target_: s.ASHA, eta: 3, grace_period: 1, brackets: 1, type: promotion}",
    "scheduler/pasha.yaml": "{_target_: s.PASHA, eta: 3, grace_period: 1}",
    "scheduler/random.yaml": "{_target_: s.Random}",
    "ohgw/off.yaml": '{estimator: "off"}',
    "ohgw/on.yaml": "{estimator: lookahead, step: raw, eta: 1e-3, mask: []}",
    "ohgw/random.yaml": "{estimator: random, step: normalized, eta: 0.1, mask: []}",
    "task/toy.yaml": """
        _target_: t.Toy
        model: mlp
        models: [mlp, cnn]
        batch_size: 32
        max_epochs: 9
        tau: 0.9
        taus: null
        hidden: 16
        space: two
        spaces:
          two: {lr: {lower: 1e-3, upper: 1, log: true}, wd: {lower: 0, upper: 0.5}}
          other: {lr: {lower: 0.1, upper: 0.5}, depth: {lower: 1, upper: 3, integer: true}}
        metric: accuracy
        mode: max
        data_dir: null
        data_files: []
        fetch: null
        """,
    "task/stored.yaml": """
        defaults: [toy]
        data_dir: data
        data_files: [a/train.bin, a/test.bin]
        fetch: "python fetch.py {data_dir}"
        """,
    "backend/pool.yaml": "{name: pool, threads: null}",
    "launch/local.yaml": "{name: local}",
    "tracker/none.yaml": "{_target_: t.NoTracker}",
    "tracker/wandb.yaml": "{_target_: t.WandbTracker, project: p}",
    "experiment/small.yaml": """
        # @package _global_
        defaults:
          - override /scheduler: pasha
        name: small
        task: {batch_size: 64}
        sweep:
          - ["ohgw=off,on", "ohgw.eta=0.5", "seed=0..2"]
          - ["ohgw=random", "ohgw.eta=0.5", "seed=0..2"]
        """,
    "experiment/broken.yaml": """
        # @package _global_
        sweep: ["seed=0..2"]
        """,
}


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip())
    return folder


@pytest.fixture
def plan(conf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *words: make_plan(words, conf)


def one(plan, *words):
    (cell,) = plan(*words).cells
    return cell


# ---- grammar


@settings(deadline=None)
@given(st.integers(-1000, 1000), st.integers(0, 40), st.integers(1, 7))
def test_a_range_includes_its_ends(first, span, step):
    last = first + span
    assert parse_override(f"seed={first}..{last}..{step}").texts == tuple(map(str, range(first, last + 1, step)))
    if step == 1:
        assert parse_override(f"seed={first}..{last}").texts == parse_override(f"seed={first}..{last}..1").texts


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=5))
def test_a_list_may_mix_ranges_and_numbers(parts):
    text = ",".join(f"{a}..{a + b}" if b else str(a) for a, b in parts)
    assert parse_override(f"seed={text}").texts == tuple(str(i) for a, b in parts for i in range(a, a + b + 1))


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 100))
def test_a_range_that_goes_down_is_refused(last, gap):
    with pytest.raises(UserError, match="empty range"):
        parse_override(f"seed={last + gap}..{last}")


@settings(deadline=None)
@given(
    st.lists(st.from_regex(r"\A[a-z]{1,5}\Z"), min_size=1, max_size=4),
    st.sampled_from(["[{}]", "'{}'", '"{}"', "{{{}}}"]),
)
def test_what_stands_in_brackets_or_quotes_is_one_value(words, around):
    value = around.format(",".join(words))
    assert parse_override(f"task.x={value}").texts == (value,)
    assert parse_override(f"task.x={value},{value}").texts == (value, value)


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_paths_are_taken_literally(text):
    assert parse_override(f"results_dir={text}").texts == (text,)
    assert parse_override(f"task.data_dir={text}").texts == (text,)


@pytest.mark.parametrize("text", ["0..x", "0...5", "1..2..", "..5", "a0..4", "'0..4'", "0..4x", "1.0..2.0", "0 .. 4"])
def test_only_a_whole_integer_range_is_a_range(text):
    assert parse_override(f"task.x={text}").texts == (text,)


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("choice(3,1)", ("3", "1")),
        ("range(0,6,2)", ("0", "2", "4")),
        ("glob(*a)", ("asha", "pasha")),
        ("sort(3,1,2)", ("1", "2", "3")),
        ("choice(true,2),5", ("true", "2", "5")),
    ],
)
def test_hydras_sweep_functions(text, texts):
    assert parse_override(f"task.x={text}", lambda group: ["asha", "pasha", "random"]).texts == texts


# ---- values


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "+7", 7),
        ("n_workers", "null", None),
        ("ohgw.eta", "1e-3", 0.001),
        ("ohgw.eta", "1", 1.0),
        ("ohgw.mask", "[wd,lr,lr]", ["lr", "wd"]),
        ("ohgw.mask", "[]", []),
        ("task.taus", "[0.9, .8]", [0.8, 0.9]),
        ("task.taus", "null", []),
        ("scheduler.type", "'stopping'", "stopping"),
        ("task.model", "123", "123"),
    ],
)
def test_values_get_the_type_of_their_key(key, text, value):
    parsed = known_keys()[key].parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seed", "true"),
        ("seed", "1e3"),
        ("ohgw.eta", "nan"),
        ("ohgw.eta", "inf"),
        ("ohgw.eta", "1_0"),
        ("task.taus", "[a]"),
        ("task.label_noise", "1.01"),
        ("budget.gpu_hours", "0"),
        ("ohgw.mask", "{a:1}"),
        ("seed", "9" * 30),
    ],
)
def test_values_out_of_type_or_range_are_refused(key, text):
    with pytest.raises(UserError, match=re.escape(key)):
        known_keys()[key].parse(text)


def test_a_key_without_a_schema_takes_the_type_of_its_yaml_value(plan):
    assert one(plan, "task.hidden=32").config["task"]["hidden"] == 32
    with pytest.raises(UserError, match=r"task\.hidden must be an integer"):
        plan("task.hidden=wide")
    assert Key.of_value("x", None).parse("[1,a]") == [1, "a"]


def test_yaml_values_are_checked_as_well():
    with pytest.raises(UserError, match=r"ohgw\.eta must be a number >= 0"):
        check_config({"ohgw": {"eta": -1}})


def test_the_schema_of_ohgw_has_the_limits_of_its_settings():
    from harness.ohgw import Settings

    names = {field.name for field in dataclasses.fields(Settings)}
    assert {f"ohgw.{name}" for name in names} == {name for name in known_keys() if name.startswith("ohgw.")}
    for field in dataclasses.fields(Settings):
        key = known_keys()[f"ohgw.{field.name}"]
        limits: dict[str, Any] = {"choices": (), "min": None, "max": None} | dict(field.metadata)
        assert (set(key.choices), key.min, key.max) == (set(limits["choices"]), limits["min"], limits["max"]), key.name


# ---- cells


def test_a_sweep_is_the_product_of_all_lists_seed_by_seed(plan):
    cells = plan("scheduler=asha,pasha", "ohgw=off,on", "seed=3,1").cells
    assert [(c.seed, c.scheduler, c.variant) for c in cells] == [
        (seed, scheduler, variant) for seed in (3, 1) for scheduler in ("asha", "pasha") for variant in ("off", "on")
    ]
    assert len({cell.folder for cell in cells}) == 8


def test_hydra_composes_once_for_each_combination_of_groups(conf, monkeypatch):
    calls = []
    compose = Conf._compose

    def counted(self, chosen):
        calls.append(chosen)
        return compose(self, chosen)

    monkeypatch.setattr(Conf, "_compose", counted)
    assert (
        len(make_plan(["scheduler=asha,pasha", "ohgw=off,on", "seed=0..49", "task.batch_size=32,64"], conf).cells)
        == 400
    )
    assert len(calls) == 4


def test_a_key_applies_where_it_exists(plan):
    cells = plan("scheduler=asha,pasha,random", "scheduler.eta=2,4").cells
    assert [c.scheduler for c in cells] == [
        "asha(eta=2)",
        "asha(eta=4)",
        "pasha(eta=2)",
        "pasha(eta=4)",
        "random",
    ]
    with pytest.raises(UserError, match=r"scheduler\.eta is no key of scheduler=random"):
        plan("scheduler=random", "scheduler.eta=2")


def test_labels_are_the_choice_plus_what_was_changed(plan):
    assert one(plan).variant == "on"
    assert one(plan, "ohgw.eta=0.2", "ohgw.mask=[wd,lr]").variant == "on(eta=0.2,mask=lr+wd)"
    assert one(plan, "ohgw.eta=1e-3").variant == "on"
    cell = one(plan, "task.batch_size=64", "task.tau=0.5", "scheduler.eta=2")
    assert (cell.task, cell.scheduler) == ("toy(batch_size=64)", "asha(eta=2)")
    assert cell.config["labels"]["preset"] == "on"


def test_folders_are_plain_names(plan):
    folder = one(plan, "ohgw.eta=0.2", "task.spaces.two.lr={lower: 0.1, upper: 0.2}").folder
    assert re.fullmatch(r"[A-Za-z0-9._-]+", folder)
    assert folder.endswith(one(plan, "ohgw.eta=0.2", "task.spaces.two.lr={lower: 0.1, upper: 0.2}").identity)


def test_off_ignores_the_keys_of_ohgw_and_is_one_cell(plan):
    both = plan("ohgw=off,on", "ohgw.eta=0.1,0.2")
    assert [cell.variant for cell in both.cells] == ["off", "on(eta=0.1)", "on(eta=0.2)"]
    alone = plan("ohgw=off", "ohgw.eta=0.1")
    assert alone.cells[0].config["ohgw"] == {"estimator": "off"}
    assert alone.notes == ["ohgw=off ignores ohgw.eta"]
    assert alone.cells[0].identity == both.cells[0].identity
    switched_off = one(plan, "ohgw=on", "ohgw.estimator=off")
    assert (switched_off.variant, switched_off.identity) == ("off", alone.cells[0].identity)


def test_equal_cells_are_merged(plan):
    merged = plan("ohgw=on", "ohgw.mask=[lr,wd],[wd,lr]", "seed=1,1")
    assert len(merged.cells) == 1
    assert "3 duplicate cells merged" in merged.notes


def test_the_number_of_workers_is_resolved(plan, monkeypatch):
    import backends.gpus

    monkeypatch.setattr(backends.gpus, "default_n_workers", lambda each: 5 // each)
    assert one(plan, "n_workers=null").config["n_workers"] == 5
    assert one(plan, "n_workers=3").config["n_workers"] == 3


@pytest.mark.parametrize(
    "path", ["with space", "a,b", "a=b", "~weird", "$x", "${seed}", "[x", "it's", "ünïcode", "{a:1}", "0..4"]
)
def test_paths_with_odd_characters(plan, path):
    config = one(plan, f"results_dir=/r/{path}", f"task.data_dir=/d/{path}").config
    assert config["results_dir"] == f"/r/{path}"
    assert config["task"]["data_dir"] == f"/d/{path}"


def test_the_tilde_is_the_home_directory(plan, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = one(plan, "results_dir=~/r", "task.data_dir=~/d").config
    assert (config["results_dir"], config["task"]["data_dir"]) == ("/home/me/r", "/home/me/d")


# ---- identity

FROZEN: dict[str, Any] = {
    "task": {
        "_target_": "t.Toy",
        "model": "mlp",
        "batch_size": 32,
        "tau": 0.9,
        "data_dir": None,
        "space": "two",
        "spaces": {"two": {"lr": {"lower": 1e-3, "upper": 1, "log": True}, "wd": {"lower": 0, "upper": 0.5}}, "x": {}},
    },
    "scheduler": {"_target_": "s.ASHA", "eta": 3.0},
    "ohgw": {"estimator": "lookahead", "eta": 0.001},
    "seed": 0,
    "budget": {"wallclock": None, "gpu_hours": None, "trials": None, "epochs": 110},
    "n_workers": 2,
    "backend": {"name": "pool", "threads": None},
    "name": "default",
    "results_dir": "results",
    "save_model": "none",
    "tracker": {},
    "launch": {},
}


def changed(path, value):
    config = copy.deepcopy(FROZEN)
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return identity(config)


def test_identities_never_change_between_versions():
    """A changed hash makes every finished cell of every user run again: change these only on purpose."""
    assert identity(FROZEN) == "3d51769b"
    assert changed("ohgw", {"estimator": "off"}) == "ac0abdd0"
    assert changed("seed", 49) == "195135a8"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "x"),
        ("results_dir", "x"),
        ("save_model", "all"),
        ("tracker", {"a": 1}),
        ("launch", {"a": 1}),
        ("task.tau", 0.5),
        ("task.data_dir", "/x"),
        ("task.fetch", "x"),
        ("task.spaces.x", {"lr": {"lower": 1, "upper": 2}}),
        ("labels", {}),
        ("task.spaces.two.wd.lower", 0.0),
        ("task.models", ["mlp"]),
    ],
)
def test_identity_does_not_cover(path, value):
    assert changed(path, value) == identity(FROZEN)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("n_workers", 3),
        ("budget.epochs", 111),
        ("backend.name", "local"),
        ("task.batch_size", 64),
        ("scheduler.eta", 4.0),
        ("ohgw.eta", 0.002),
        ("task.spaces.two.wd.upper", 0.6),
        ("task.spaces.two.c", 1),
    ],
)
def test_identity_covers(path, value):
    assert changed(path, value) != identity(FROZEN)


def test_the_order_of_a_space_is_the_order_of_sampling_and_so_part_of_the_identity():
    reordered = dict(reversed(FROZEN["task"]["spaces"]["two"].items()))
    assert changed("task.spaces.two", reordered) != identity(FROZEN)


@settings(deadline=None, max_examples=15)
@given(st.permutations(["ohgw.eta=0.2", "seed=4", "task.batch_size=8", "scheduler=pasha", "budget.trials=3"]))
def test_identity_does_not_depend_on_the_order_of_overrides(conf, words):
    (cell,), (reference,) = make_plan(words, conf).cells, make_plan(sorted(words), conf).cells
    assert cell == reference


def test_a_setting_is_what_paired_cells_share(plan):
    cells = plan("ohgw=off,on", "seed=0,1", "n_workers=1,2").cells
    assert {c.config["labels"]["setting"] for c in cells if c.config["n_workers"] == 1} != {
        c.config["labels"]["setting"] for c in cells if c.config["n_workers"] == 2
    }
    assert len({c.config["labels"]["setting"] for c in cells}) == 2


# ---- experiments


def test_an_experiment_carries_its_own_sweep(plan):
    cells = plan("experiment=small").cells
    assert {(c.scheduler, c.task, c.config["name"]) for c in cells} == {("pasha", "toy(batch_size=64)", "small")}
    assert [c.variant for c in cells[:3]] == ["off", "on(eta=0.5)", "random(eta=0.5)"]
    assert [c.seed for c in cells] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_command_line_wins_over_an_experiment(plan):
    cells = plan(
        "experiment=small", "seed=7", "ohgw.eta=0.25", "task.batch_size=16", "name=mine", "scheduler=asha"
    ).cells
    assert [c.variant for c in cells] == ["off", "on(eta=0.25)", "random(eta=0.25)"]
    assert {(c.seed, c.task, c.config["name"], c.scheduler) for c in cells} == {
        (7, "toy(batch_size=16)", "mine", "asha")
    }


def test_a_group_on_the_command_line_replaces_the_group_and_its_keys_in_every_list(plan):
    assert [cell.variant for cell in plan("experiment=small", "ohgw=on", "seed=0").cells] == ["on"]


def test_experiment_null_is_no_experiment(plan):
    assert plan("experiment=null").cells == plan().cells


def test_a_malformed_sweep_is_named(plan):
    with pytest.raises(UserError, match=r"broken\.yaml: sweep must be a list of lists"):
        plan("experiment=broken")


def test_yaml_files_that_do_not_compose_are_the_users_to_mend(conf, tmp_path):
    shutil.copytree(conf, tmp_path / "conf")
    (tmp_path / "conf" / "task" / "toy.yaml").write_text("a: [")
    with pytest.raises(UserError, match="do not compose"):
        make_plan([], tmp_path / "conf")


def test_a_wrong_override_in_a_sweep_is_named_with_its_experiment(conf, tmp_path):
    shutil.copytree(conf, tmp_path / "conf")
    (tmp_path / "conf" / "experiment" / "broken.yaml").write_text('# @package _global_\nsweep: [["seed=5..1"]]\n')
    with pytest.raises(UserError, match=r"sweep of experiment=broken: seed=5\.\.1 is an empty range"):
        make_plan(["experiment=broken"], tmp_path / "conf")


@pytest.mark.parametrize("value", ["${seed}", "${nothing}"])
def test_a_yaml_that_refers_to_the_seed_or_to_nothing_is_refused(conf, tmp_path, value):
    shutil.copytree(conf, tmp_path / "conf")
    (tmp_path / "conf" / "scheduler" / "asha.yaml").write_text(f"eta: {value}")
    with pytest.raises(UserError, match="do not compose"):
        make_plan([], tmp_path / "conf")


# ---- notes and data


def test_missing_off_cells_are_pointed_out_with_the_command_that_adds_them(plan):
    alone = plan("scheduler=pasha", "ohgw=on", "ohgw.eta=0.2", "seed=0..1", "results_dir=a b")
    command = "python -m harness scheduler=pasha seed=0..1 'results_dir=a b' ohgw=off"
    assert alone.notes == [f"2 cells have no ohgw=off cell to be compared with; add them with: {command}"]
    assert plan("ohgw=on,off", "seed=0..1").notes == []


def test_finished_off_cells_count(plan):
    off = one(plan, "ohgw=off")
    folder = Path("results/default") / off.folder
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    assert plan("ohgw=on").notes == []
    assert len(plan("ohgw=on", "seed=0,1").notes) == 1


def test_missing_data_are_answered_with_the_command_that_fetches_them(plan, tmp_path):
    stored = plan("task=stored", "ohgw=off")
    with pytest.raises(UserError, match=r"there is no folder .*data; fetch it with: python fetch.py .*data$"):
        check_data(stored)
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "train.bin").touch()
    with pytest.raises(UserError, match=r"has no a/test\.bin; fetch"):
        check_data(stored)
    (tmp_path / "data" / "a" / "test.bin").touch()
    check_data(stored)
    with pytest.raises(UserError, match=r"needs task\.data_dir"):
        check_data(plan("task=stored", "task.data_dir=null"))


# ---- the real conf/


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_choices(group):
    assert Conf().choices(group)


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group in GROUPS if group != "experiment" for choice in Conf().choices(group)],
)
def test_every_preset_loads_and_validates(group, choice):
    (cell,) = make_plan([f"{group}={choice}", "budget.trials=1"]).cells
    labels = cell.config["labels"]
    assert {"task": labels["task"], "scheduler": labels["scheduler"], "ohgw": labels["preset"]}.get(
        group, choice
    ) == choice


@pytest.mark.parametrize("experiment", Conf().choices("experiment"))
def test_every_experiment_loads_and_has_its_controls(experiment):
    cells = make_plan([f"experiment={experiment}"]).cells
    assert {cell.config["name"] for cell in cells} == {experiment}
    assert "off" in {cell.variant for cell in cells}


def test_words_that_yaml_reads_as_booleans_are_quoted():
    """``on``, ``off``, ``yes`` and ``no`` without quotes are booleans in YAML 1.1."""
    for file in CONF.rglob("*.yaml"):
        for line in file.read_text().splitlines():
            assert not re.search(r"[:,\[-]\s+(on|off|yes|no)\s*(#.*|,.*|\].*)?$", line, re.IGNORECASE), (
                f"{file}: {line}"
            )


def test_a_composed_config_survives_yaml():
    (cell,) = make_plan(["ohgw=off"]).cells
    assert yaml.safe_load(yaml.safe_dump(cell.config)) == cell.config


def test_the_paper_is_the_study():
    cells = make_plan(["experiment=paper", "seed=0"]).cells
    variants = {cell.variant for cell in cells}
    assert {"off", "on", "direct"} <= variants
    (random,) = [cell for cell in cells if cell.config["labels"]["preset"] == "random" and cell.scheduler == "asha"]
    assert (random.config["ohgw"]["step"], random.config["ohgw"]["eta"]) == ("raw", 1e-3)
    config = cells[0].config
    assert (config["n_workers"], config["budget"]["wallclock"], config["task"]["batch_size"]) == (4, 43200.0, 128)
    assert len(make_plan(["experiment=paper"]).cells) == 50 * len(cells)
