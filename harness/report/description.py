"""What was run, in words: the experiment's description, and where the results come from."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from harness.record import plain
from harness.report.compare import OFF, ranges
from harness.report.document import Section, Table, ordered
from harness.report.study import Condition, Study
from harness.report.tables import counted, number
from harness.space import Categorical, Float, Space

_BUDGET = {"wallclock": "{:g} s of wall-clock", "gpu_hours": "{:g} GPU-hours", "trials": "{:g} configurations",
           "epochs": "{:g} epochs"}  # fmt: skip


def description(study: Study) -> list[str]:
    """The experiment in sentences (tasks, schedulers, variants, seeds, budget, workers), for terminal and page."""
    if study.results.cells.empty:
        return []
    return [*_tasks(study), *_schedulers(study), _variants(study), _seeds(study), *_conditions(study)]


def section(study: Study) -> Section:
    """The description, and a table of the space."""
    text = [counted(study.results), *description(study)]
    return Section("experiment", "The experiment", text, tables=[_spaces(study)] if study.conditions else [])


def provenance(study: Study) -> Section:
    """Commands, commits, versions and hardware, from the cells' meta.json; what could not be used."""
    section = Section("provenance", "Where the results come from")
    meta = study.results.meta
    for title, values in _sources(meta, study.results.commands).items():
        rows = [{title: value, "cells": len(cells)} for value, cells in values.items()]
        section.tables.append(Table(f"provenance_{title}", f"{title} of the cells", pd.DataFrame(rows)))
    lacking = [cell for cell in study.results.configs if cell not in meta]
    if lacking:
        section.notes.append(f"{len(lacking)} cells have no readable meta.json")
    changed = sum(bool(entry.get("diff")) for entry in meta.values())
    if changed:
        section.notes.append(
            f"{changed} cells ran with uncommitted changes; the difference to their commit is in their meta.json"
        )
    section.notes += [f"{cell} is corrupt and left out: {why}" for cell, why in study.results.corrupt.items()]
    section.notes += list(dict.fromkeys(study.results.warnings))
    return section


def _sources(
    meta: Mapping[str, Mapping[str, Any]], commands: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, list[str]]]:
    """For each kind of source its values, each with its cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell, entry in meta.items():
        gpus = entry.get("gpus") or []
        hardware = [entry.get("cpu"), f"{entry['cores']} cores" if "cores" in entry else None,
                    f"{entry['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in entry else None,
                    ", ".join(gpus) or "no GPU" if "gpus" in entry else None]  # fmt: skip
        packages = {"python": entry.get("python"), **entry.get("packages", {})}
        sources = {
            "command": _command(entry.get("command"), commands.get(cell)),
            "commit": entry.get("commit"),
            "versions": ", ".join(f"{name} {version}" for name, version in packages.items() if version),
            "hardware": ", ".join(filter(None, hardware)),
            "system": " on ".join(filter(None, (entry.get("platform"), entry.get("host")))),
        }  # fmt: skip
        for title, value in sources.items():
            found.setdefault(title, {}).setdefault(value or "not recorded", []).append(cell)
    return found


def _command(typed: Any, arguments: Sequence[str] | None) -> str | None:
    """What was typed: ``python -m harness`` with its arguments, or another program, which called the harness."""
    if arguments is not None:
        return f"python -m harness {shlex.join(arguments)}".strip()
    return shlex.join(map(str, typed)) if isinstance(typed, list) and typed else None


def _tasks(study: Study) -> list[str]:
    lines: list[str] = []
    for task, conditions in _by(study, "task").items():
        lines += dict.fromkeys(_task(task, condition, conditions) for condition in conditions)
    return lines


def _task(task: str, condition: Condition, conditions: Sequence[Condition]) -> str:
    """Of one condition; the targets are those of all ``conditions`` of the task."""
    config = condition.config["task"]
    words = [f"model {config['model']}"] if "model" in config else []
    words += [f"batches of {config['batch_size']}"] if "batch_size" in config else []
    words += [f"at most {config['max_epochs']} epochs a trial"] if "max_epochs" in config else []
    words += [f"label noise {config['label_noise']:g}"] if config.get("label_noise") else []
    targets = sorted({number(c.tau, 4) for c in conditions if c.tau == c.tau})
    goal = "at most" if condition.mode == "min" else "at least"
    aim = f"target: test {condition.metric} {goal} {' or '.join(targets)}" if targets else "no target set"
    size = f"{len(condition.space)} hyperparameters ({100 * condition.discrete_share:.0f} % discrete)"
    return f"Task {task} (family {condition.family}): {'; '.join([*words, size, aim])}."


def _schedulers(study: Study) -> list[str]:
    lines = []
    for scheduler, conditions in _by(study, "scheduler").items():
        words = " or ".join(dict.fromkeys(_scheduler(condition.config["scheduler"]) for condition in conditions))
        lines.append(f"Scheduler {scheduler}: {words}.")
    return lines


def _scheduler(config: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in config.items() if not k.startswith("_") and v is not None)
    return f"{config.get('_target_', '')}{f' ({options})' if options else ''}"


def _variants(study: Study) -> str:
    cells = study.results.cells
    parts = []
    for variant in ordered(list(cells["variant"].unique())):
        cell = cells[cells["variant"] == variant].iloc[0]["cell"]
        config = {k: v for k, v in study.results.configs[cell]["ohgw"].items() if not k.startswith("_")}
        keys = ("estimator", "step", "eta", "n_steps", "batch_size", "mask", "momentum_space", "probe")
        shown = ", ".join(f"{key} {config[key]}" for key in keys if config.get(key) not in (None, []))
        parts.append(f"{variant} ({'vanilla' if variant == OFF else shown})")
    return f"OHGW variants: {'; '.join(parts)}."


def _seeds(study: Study) -> str:
    cells = study.results.cells
    by_seeds: dict[str, list[str]] = {}
    for variant in ordered(list(cells["variant"].unique())):
        seeds = sorted({int(seed) for seed in cells[cells["variant"] == variant]["seed"]})
        by_seeds.setdefault(ranges(seeds), []).append(variant)
    if len(by_seeds) == 1:
        return f"Seeds: {next(iter(by_seeds))}."
    return "Seeds: " + "; ".join(f"{', '.join(names)}: {seeds}" for seeds, names in by_seeds.items()) + "."


def _conditions(study: Study) -> list[str]:
    """Budget, workers and backend, once for all conditions that share them."""
    by_words: dict[str, list[str]] = {}
    for condition in study.conditions:
        config = condition.config
        limits = [_BUDGET[k].format(v) for k, v in config["budget"].items() if v is not None and k in _BUDGET]
        backend = config["backend"].get("name") or config["backend"].get("kind")
        time = "virtual time" if backend == "simulated" else "real time"
        words = (
            f"budget {', '.join(limits) or 'none'} a cell; {config['n_workers']} workers; backend {backend} ({time})"
        )
        by_words.setdefault(words, []).append(condition.label)
    if len(by_words) == 1:
        return [f"{next(iter(by_words)).capitalize()}."]
    return [f"{'; '.join(labels)}: {words}." for words, labels in by_words.items()]


def _spaces(study: Study) -> Table:
    rows = []
    for task, conditions in _by(study, "task").items():
        spaces = {repr(condition.space.domains): condition for condition in reversed(conditions)}
        for condition in reversed(spaces.values()):
            label = task if len(spaces) == 1 else condition.label
            for name, domain in condition.space.domains.items():
                rows.append({"task": label, "hyperparameter": name, **_domain(condition.space, name),
                             "OHGW": "moves" if isinstance(domain, Float) else "never moves"})  # fmt: skip
    return Table("spaces_all", "Search spaces. Log: searched, and moved, in the natural logarithm.", pd.DataFrame(rows))


def _domain(space: Space, name: str) -> dict[str, Any]:
    domain = space[name]
    if isinstance(domain, Categorical):
        return {"kind": "categorical", "lower": None, "upper": None, "choices": json.dumps(plain(list(domain.choices)))}
    kind = ("continuous" if isinstance(domain, Float) else "integer") + (", log" if domain.log else "")
    return {"kind": kind, "lower": domain.lower, "upper": domain.upper, "choices": None}


def _by(study: Study, attribute: str) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for condition in study.conditions:
        groups.setdefault(getattr(condition, attribute), []).append(condition)
    return groups
