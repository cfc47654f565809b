"""From the command line to a plan: the product of all lists as cells, their labels and their identity.

    plan = make_plan(["scheduler=asha,pasha", "ohgw=on,off", "seed=0..49"])

Cells are ordered seed by seed: all cells of the first seed come before those of the second, so that a sweep that is
stopped early leaves complete pairs.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.context import UserError
from backends.slurm_commands import gpu_count
from harness.compose import CONF, Composed, Conf, resolved
from harness.overrides import MAX_CELLS, Override, parse_override
from harness.schema import (
    FIXED,
    GROUPS,
    LITERAL,
    OUTSIDE_IDENTITY,
    Key,
    as_text,
    check_config,
    known_keys,
    near,
    shown,
    unquoted,
)
from harness.space import Categorical, Integer, Space, SpaceError

ONE_VALUE = OUTSIDE_IDENTITY | {"experiment"}  # an experiment is a study with its own folder
OFF = {"estimator": "off"}


# ---- cells


@dataclass(frozen=True)
class Cell:
    """One (task, scheduler, OHGW variant, seed, budget, workers, backend) experiment; ``config`` is fully resolved."""

    config: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def task(self) -> str:
        return self.config["labels"]["task"]

    @property
    def scheduler(self) -> str:
        return self.config["labels"]["scheduler"]

    @property
    def variant(self) -> str:
        return self.config["labels"]["variant"]

    @property
    def identity(self) -> str:
        """8 hex digits of the SHA-256 of everything that decides the results (see ``identity``)."""
        return self.config["labels"]["identity"]

    @property
    def folder(self) -> str:
        """Folder name: readable labels, then the identity."""
        words = (self.task, self.scheduler, self.variant, f"seed{self.seed}")
        slugs = [re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.")[:48] for word in words]
        return "_".join([*slugs, self.identity])


def identity(config: Mapping[str, Any]) -> str:
    """8 hex digits of what decides a cell's results: task, scheduler, OHGW, seed, budget, workers, backend.

    Of the task's spaces only the chosen one counts, in its order (the order of sampling); its name does not.
    """
    return _digest(deciding(config))


def setting(config: Mapping[str, Any]) -> str:
    """8 hex digits of the identity without OHGW and seed: cells of one setting may be compared, paired by seed."""
    return _digest({k: v for k, v in deciding(config).items() if k not in ("ohgw", "seed")})


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a cell's results, JSON-able: task (its space spelled out), scheduler, ohgw, seed, budget, ..."""
    task = {
        k: v for k, v in config["task"].items() if f"task.{k}" not in OUTSIDE_IDENTITY | {"task.spaces", "task.space"}
    }
    backend = {k: v for k, v in config["backend"].items() if f"backend.{k}" not in OUTSIDE_IDENTITY}
    space = _space(config["task"])
    domains = [[name, type(domain).__name__, dataclasses.asdict(domain)] for name, domain in space.domains.items()]
    task["space"] = [*domains, space.constants]
    rest = ("scheduler", "ohgw", "seed", "budget", "n_workers")
    return {"task": task, **{name: config[name] for name in rest}, "backend": backend}


def _digest(payload: Any) -> str:
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _label(choice: str, now: Mapping[str, Any], base: Mapping[str, Any], group: str) -> str:
    """``choice`` plus what differs from its YAML: ``normalized(eta=0.2)``."""
    changed = [
        f"{key}={_compact(value)}"
        for key, value in sorted(now.items())
        if value != base.get(key) and f"{group}.{key}" not in OUTSIDE_IDENTITY
    ]
    return f"{choice}({','.join(changed)})" if changed else choice


def _compact(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_compact, value))
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return _digest(value) if isinstance(value, Mapping) else as_text(value)


# ---- plan


@dataclass
class Plan:
    """What a command line asks for: the cells in the order they run, and notes to print before they do."""

    cells: list[Cell]
    notes: list[str] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """That of the study, ``results_dir/name``, as it was given."""
        return Path(self.cells[0].config["results_dir"]) / self.cells[0].config["name"]

    @property
    def root(self) -> Path:
        """The same, absolute."""
        return Path(os.path.abspath(self.folder))


def make_plan(overrides: Sequence[str], conf: Path = CONF) -> Plan:
    """The plan of ``key=value`` arguments. Reads YAML files only; UserError names the first thing that is wrong."""
    source = Conf(conf)
    given = _parse_all(overrides, source)
    experiment = given.pop("experiment", None)
    choice = experiment.texts[0] if experiment and experiment.texts[0] != "null" else None
    sweep = _Sweep(source, choice, set(given))
    cells: list[Cell] = []
    for words in source.sweep_lists(choice):
        try:
            listed = {k: v for k, v in _parse_all(words, source).items() if not _replaced(k, given)}
        except UserError as error:
            raise UserError(f"sweep of experiment={choice}: {error}") from None
        cells += sweep.cells({**listed, **given})
    sweep.check_applied(given)
    plan = Plan(_in_order(_merged(cells)), argv=list(overrides))
    if len(plan.cells) < len(cells):
        plan.notes.append(f"{len(cells) - len(plan.cells)} duplicate cells merged")
    plan.notes += sweep.notes() + _missing_off(plan)
    return plan


def group_choices(overrides: Sequence[str], source: Conf) -> dict[str, str]:
    """The first choice of each group that a command line names. Errors: UserError for a wrong word."""
    return {key: override.texts[0] for key, override in _parse_all(overrides, source).items() if key in GROUPS}


def check_data(plan: Plan) -> None:
    """UserError if a task's data are not there, with the command that fetches them. Called only before a run."""
    for task in {json.dumps(cell.config["task"]): cell.config["task"] for cell in plan.cells}.values():
        folder, files, fetch = task.get("data_dir"), task.get("data_files") or [], task.get("fetch")
        advice = f"; fetch it with: {fetch.replace('{data_dir}', shlex.quote(folder or 'data'))}" if fetch else ""
        if folder is None and files:
            raise UserError(f"this task needs task.data_dir, the folder with {files[0]}{advice}")
        if folder is not None and not os.path.isdir(folder):
            raise UserError(f"task.data_dir: there is no folder {folder}{advice}")
        for file in files:
            if not os.path.exists(os.path.join(folder, file)):
                raise UserError(f"task.data_dir={folder} has no {file}{advice}")


def _parse_all(words: Sequence[str], source: Conf) -> dict[str, Override]:
    """Overrides by key; every group choice and every value of a known key checked."""
    keys = known_keys()
    found: dict[str, Override] = {}
    for word in words:
        override = parse_override(word, source.choices)
        key = override.key
        if key in found:
            both = ",".join(dict.fromkeys(found[key].texts[:1] + override.texts[:1]))
            advice = "" if key in ONE_VALUE else f"; for several values write {key}={both}"
            raise UserError(f"{key} is given twice{advice}")
        if key in GROUPS:
            override = Override(key, tuple(_choice(key, text, source) for text in override.texts))
        elif key in keys:
            for text in override.texts:
                _parse_value(keys[key], text)
        if len(set(override.texts)) > 1 and (key in ONE_VALUE or key.split(".")[0] in ("tracker", "launch")):
            raise UserError(
                f"{key} takes one value, not {len(override.texts)}: no cell differs by it; use several commands"
            )
        found[key] = override
    return found


def _choice(group: str, text: str, source: Conf) -> str:
    possible = source.choices(group)
    choice = unquoted(text)
    if group == "experiment" and choice == "null":
        return choice
    if choice not in possible:
        advice = "; a list in brackets is one value, a sweep is written without them" if text.startswith("[") else ""
        raise UserError(f"there is no {group} {shown(choice)}{advice or near(choice, possible)}")
    return choice


def _parse_value(key: Key, text: str) -> Any:
    """A value of the command line in the key's type; ``~`` expanded in paths."""
    if key.name == "name":
        return _folder_name(text)
    if key.name in LITERAL:
        return None if key.nullable and text == "null" else os.path.expanduser(text)
    return key.parse(text)


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]{0,99}", text):
        possible = "a plain folder name (letters, digits, . + - _)"
        raise UserError(f"name must be {possible}, not {shown(text)}; results_dir says where it lies")
    return text


def _key(name: str, composed: Composed) -> Key:
    """The schema of a key; a key that no schema names takes the type of its value in the YAML."""
    if name.startswith("task.spaces."):  # Space checks these: 1 and 1.0 are both bounds
        return Key(name, object)
    return known_keys().get(name) or Key.of_value(name, composed.get(name)[1])


def _replaced(key: str, given: Iterable[str]) -> bool:
    """Whether the command line overrides a key of an experiment's list: itself, or the group it belongs to."""
    return key in given or key.split(".")[0] in given


class _Sweep:
    """Turns merged overrides into cells and remembers which keys found a place."""

    def __init__(self, source: Conf, experiment: str | None, given: set[str]):
        self.source, self.experiment, self.given = source, experiment, given
        self.applied: set[str] = set()
        self.ignored: set[str] = set()
        self.used: list[Composed] = []
        self._workers_here: dict[int, int] = {}  # by GPUs of a trial

    def cells(self, overrides: Mapping[str, Override]) -> list[Cell]:
        count = math.prod(len(override.texts) for override in overrides.values())
        if count > MAX_CELLS:
            raise UserError(f"this sweep has {count} cells; at most {MAX_CELLS} are possible")
        groups = {key: override.texts for key, override in overrides.items() if key in GROUPS}
        values = {key: override.texts for key, override in overrides.items() if key not in GROUPS}
        cells = []
        for combination in itertools.product(*groups.values()):
            chosen = dict(zip(groups, combination, strict=True))
            if self.experiment:
                chosen["experiment"] = self.experiment
            composed = self.source.compose(chosen)
            self.used.append(composed)
            applicable = {key: texts for key, texts in values.items() if self._applies(key, composed)}
            cells += self._cells_of(composed, applicable)
        unplaced = set(values) - self.applied - self.ignored - self.given
        if unplaced:
            self._no_place(sorted(unplaced)[0], overrides)
        return cells

    def _applies(self, key: str, composed: Composed) -> bool:
        exists, value = composed.get(key)
        if key.split(".")[-1].startswith("_") or key in FIXED:
            group = key.split(".")[0]
            possible = "|".join(self.source.choices(group))
            raise UserError(f"{key} is set by the YAML file; choose another one with {group}={possible}")
        if "." not in key and exists and isinstance(value, Mapping):
            keys = [k for k in known_keys() if k.startswith(f"{key}.")]
            raise UserError(f"{key} is a group of keys: set one of {', '.join(keys)}")
        if key.startswith("ohgw.") and composed.get("ohgw.estimator")[1] == "off" and (exists or key in known_keys()):
            self.ignored.add(key)
            return False
        if exists:
            self.applied.add(key)
        return exists

    def _cells_of(self, composed: Composed, values: Mapping[str, tuple[str, ...]]) -> list[Cell]:
        texts = values.get("seed", (str(composed.get("seed")[1]),))
        seeds = [known_keys()["seed"].parse(text) for text in texts]
        others = {key: texts for key, texts in values.items() if key != "seed"}
        cells = []
        for combination in itertools.product(*others.values()):
            config = self._config(composed, dict(zip(others, combination, strict=True)))
            for seed in seeds:
                seeded = deepcopy(config) | {"seed": seed}
                seeded["labels"]["identity"] = identity(seeded)
                cells.append(Cell(seeded))
        return cells

    def _config(self, composed: Composed, texts: Mapping[str, str]) -> dict[str, Any]:
        """The resolved, checked and labelled config, without its seed (a YAML cannot refer to ``${seed}``)."""
        from omegaconf import OmegaConf

        tree = composed.tree.copy()
        literals = {}
        for key, text in texts.items():
            value = _parse_value(_key(key, composed), text)
            if key in LITERAL:
                literals[key] = value
            else:
                OmegaConf.update(tree, key, value, merge=False)
        tree.seed = "???"  # missing: a YAML that refers to ${seed} is refused, not silently given one cell's seed
        config = check_config(resolved(tree) | {"seed": 0})
        for key, value in literals.items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        config["n_workers"] = config["n_workers"] or self._default_n_workers(config)
        return _finish(config, composed.choices, self._base(composed))

    def _default_n_workers(self, config: Mapping[str, Any]) -> int:
        """One for every ``gpus_per_trial`` GPUs of where the cell will run, else 2."""
        each = gpus_per_trial(config)
        if config["launch"].get("name") == "slurm":
            return gpu_count(config["launch"]["gres"]) // each or 2
        each = 1 if config["backend"]["name"] == "slurm" else each
        if each not in self._workers_here:
            from backends.gpus import default_n_workers

            self._workers_here[each] = default_n_workers(each)
        return self._workers_here[each]

    def _base(self, composed: Composed) -> dict[str, Any]:
        """What the chosen YAML files say by themselves, without the experiment and the command line."""
        base = {}
        for group in ("task", "scheduler", "ohgw"):
            pure = self.source.compose({group: composed.choices[group]}) if self.experiment else composed
            base[group] = resolved(pure.tree)[group]
        return check_config(base)

    def check_applied(self, given: Mapping[str, Override]) -> None:
        for key in given:
            if key not in GROUPS and key not in self.applied and key not in self.ignored:
                self._no_place(key, given)

    def _no_place(self, key: str, overrides: Mapping[str, Override]) -> None:
        """A key that none of the choices has."""
        group = key.split(".")[0]
        possible = list(dict.fromkeys([*GROUPS, *(k for composed in self.used for k in composed.keys)]))
        if group in GROUPS and "." in key:
            chosen = ",".join(dict.fromkeys(composed.choices[group] for composed in self.used))
            own = [k for k in possible if k.startswith(f"{group}.") and k.count(".") <= max(1, key.count("."))]
            raise UserError(f"{key} is no key of {group}={chosen}{near(key, own) if own else '; it has no keys'}")
        shallow = [k for k in possible if k.count(".") <= 1 or "." in key]
        raise UserError(f"there is no key {shown(key)}{near(key, shallow)}")

    def notes(self) -> list[str]:
        idle = sorted(self.ignored - self.applied)
        return [f"ohgw=off ignores {', '.join(idle)}"] if idle else []


def gpus_per_trial(config: Mapping[str, Any]) -> int:
    """Processes that train a trial of the cell with this config; 1 for tasks that know nothing else."""
    return config["task"].get("gpus_per_trial", 1)


def _finish(config: dict[str, Any], choices: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, Any]:
    """Cross-checks, then labels. ``base`` is what the chosen YAML files say by themselves."""
    preset = choices["ohgw"]
    if config["ohgw"]["estimator"] == "off":
        preset, config["ohgw"] = "off", dict(OFF)
        base = {**base, "ohgw": OFF}
    _cross_check(config)
    _folder_name(config["name"])  # may come from an experiment's YAML
    config["results_dir"] = os.path.expanduser(config["results_dir"])
    if config["backend"]["name"] == "simulated":
        store = config["backend"]["store"] or os.path.join(config["results_dir"], "curves.sqlite")
        config["backend"]["store"] = os.path.abspath(os.path.expanduser(store))
    for key in ("data_dir", "text_file"):
        if config["task"].get(key) is not None:  # workers may have another working directory
            config["task"][key] = os.path.abspath(os.path.expanduser(config["task"][key]))
    labels = {group: _label(choices[group], config[group], base[group], group) for group in ("task", "scheduler")}
    variant = _label(preset, config["ohgw"], base["ohgw"], "ohgw")
    config["labels"] = {**labels, "variant": variant, "preset": preset, "setting": setting(config)}
    return config


def _cross_check(config: Mapping[str, Any]) -> None:
    """Values that are each possible and together are not."""
    task, scheduler = config["task"], config["scheduler"]
    if config["backend"]["name"] == "simulated" and config["save_model"] != "none":
        raise UserError(
            "save_model must be none with backend=simulated: a trial found in the store is not trained again"
        )
    if config["launch"].get("name") == "slurm":
        _check_shared_files(config)
    if all(limit is None for limit in config["budget"].values()):
        names = ", ".join(f"budget.{name}" for name in config["budget"])
        raise UserError(f"a cell would never end: set at least one of {names}, as in budget.wallclock=3600")
    if scheduler.get("grace_period", 1) > task["max_epochs"]:
        grace_period, max_epochs = scheduler["grace_period"], task["max_epochs"]
        raise UserError(f"scheduler.grace_period={grace_period} is more than task.max_epochs={max_epochs}")
    if task.get("models"):
        Key("task.model", str, choices=tuple(task["models"])).check(task["model"])
    if task.get("metric") == "accuracy":
        for target in [task.get("tau"), *(task.get("taus") or [])]:
            if target is not None and not 0 <= target <= 1:
                raise UserError(f"task.tau is an accuracy: it must be >= 0 and <= 1, not {target:g}")
    space = _space(task)
    for name in config["ohgw"].get("mask") or []:
        if name not in space.continuous:
            advice = near(name, space.continuous)
            raise UserError(f"ohgw.mask: {shown(name)} is no continuous hyperparameter of {task['space']}{advice}")
    _check_gpus_per_trial(config, space)
    momentum = space.continuous.get("momentum")
    if config["ohgw"].get("momentum_space") == "log1m" and momentum and momentum.upper >= 1:
        raise UserError(f"ohgw.momentum_space=log1m needs an upper bound of momentum below 1, not {momentum.upper:g}")


def _check_gpus_per_trial(config: Mapping[str, Any], space: Space) -> None:
    """A trial's processes have equal shares of every batch, and its worker needs a GPU for each."""
    k = gpus_per_trial(config)
    if k == 1:
        return
    for place in ("backend", "launch"):
        gres = config[place].get("gres")
        if 0 < gpu_count(gres) < k:
            raise UserError(f"task.gpus_per_trial={k} needs as many GPUs, {place}.gres={gres} asks for fewer: "
                            f"give {place}.gres=gpu:{k}")  # fmt: skip
    sizes = {"task.batch_size": [config["task"]["batch_size"]]}
    if config["ohgw"]["estimator"] != "off":
        sizes["ohgw.batch_size"] = [config["ohgw"]["batch_size"]]
    domain = space.domains.get("batch_size")
    if isinstance(domain, Categorical):
        sizes["the hyperparameter batch_size"] = list(domain.choices)
    elif isinstance(domain, Integer):
        sizes["the hyperparameter batch_size"] = list(range(domain.lower, domain.upper + 1))
    elif "batch_size" in space.constants:
        sizes["the hyperparameter batch_size"] = [space.constants["batch_size"]]
    for name, values in sizes.items():
        for value in values:
            if value % k:
                raise UserError(f"{name} must be a multiple of task.gpus_per_trial={k}, which {value} is not")


def _check_shared_files(config: Mapping[str, Any]) -> None:
    """SQLite files by default lie in results_dir, and several nodes that write one file of a shared disk damage it."""
    if config["backend"]["name"] == "simulated" and config["backend"]["store"] is None:
        raise UserError(
            "backend=simulated with launch=slurm needs a curve store that only one node writes to, not the default in "
            "results_dir: name a file on the nodes' own disks, as in backend.store=/tmp/curves.sqlite, or leave "
            "launch=slurm out"
        )
    if "uri" in config["tracker"] and config["tracker"]["uri"] is None:
        raise UserError(
            "tracker=mlflow with launch=slurm needs a server, because several nodes cannot write the default file in "
            "results_dir: give tracker.uri=http://..., or choose another tracker"
        )


def _space(task: Mapping[str, Any]) -> Space:
    if task["space"] not in task["spaces"]:
        raise UserError(f"task.space: there is no space {shown(task['space'])}{near(task['space'], task['spaces'])}")
    try:
        space = Space.from_spec(task["spaces"][task["space"]])
    except (SpaceError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"task.spaces.{task['space']}: {reason}") from None
    if not len(space):
        raise UserError(f"task.spaces.{task['space']} has no hyperparameters")
    return space


def _merged(cells: Iterable[Cell]) -> list[Cell]:
    unique: dict[str, Cell] = {}
    for cell in cells:
        unique.setdefault(cell.identity, cell)
    return list(unique.values())


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Seed by seed, in the order the seeds were given."""
    rank = {seed: i for i, seed in enumerate(dict.fromkeys(cell.seed for cell in cells))}
    return sorted(cells, key=lambda cell: rank[cell.seed])


def _missing_off(plan: Plan) -> list[str]:
    """Pairs without an ``off`` cell, neither in the plan nor finished before, and the command that adds them."""
    from harness.record import CellPaths

    here = {cell.identity for cell in plan.cells}
    missing = set()
    for cell in plan.cells:
        labels = {**cell.config["labels"], "variant": "off", "preset": "off"}
        config = {**cell.config, "ohgw": OFF, "labels": labels}
        labels["identity"] = identity(config)
        finished = CellPaths.of_cell(Cell(config)).summary.exists()
        if labels["identity"] not in here and not finished:
            missing.add(labels["identity"])
    if not missing:
        return []
    command = off_command(plan.argv)
    return [f"{len(missing)} cells have no ohgw=off cell to be compared with; add them with: {command}"]


def off_command(argv: Sequence[str]) -> str:
    """The command that runs the ``off`` cells belonging to those of a command with the arguments ``argv``."""
    words = [word for word in argv if not word.startswith(("ohgw=", "ohgw.", "-"))]  # "-": options
    return shlex.join(["python", "-m", "harness", *words, "ohgw=off"])


def as_json(plan: Plan, states: Sequence[str]) -> dict[str, Any]:
    """The plan as ``--dry-run --json`` prints it."""
    rows = [
        {"folder": cell.folder, "seed": cell.seed, "state": state, **cell.config["labels"]}
        for cell, state in zip(plan.cells, states, strict=True)
    ]
    return {"cells": rows, "notes": plan.notes}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, their columns aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
