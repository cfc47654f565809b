"""What every key of the command line may be: types, ranges and the one-line help, as a dataclass a group.

The YAML files in ``conf/`` say which keys a choice has and their values; these classes say what the values may be. A
key that a YAML has and no class here names (a new task's own key, say) takes the type of its value in the YAML.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from backends.context import UserError
from harness.ohgw.settings import Settings


def option(
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: str = "",
    ordered: bool = False,
) -> Any:
    """A key: its help line, inclusive bounds ``min`` and ``max``, exclusive ``above``, space-separated ``choices``;
    ``ordered``: the order of its list counts."""
    bounds = {"min": min, "max": max, "above": above}
    return field(metadata={"help": help, **bounds, "choices": tuple(choices.split()), "ordered": ordered})


@dataclass
class Experiment:
    """Keys that belong to no group."""

    seed: int = option("seed of everything random; the same seed pairs cells across variants", min=0)
    n_workers: int | None = option("trials trained at a time; null: one a GPU, else 2", min=1)
    name: str = option("folder of this study inside results_dir")
    results_dir: str = option("where records go (taken literally, ~ expanded)")
    save_model: str = option("which models to keep when a cell ends", choices="none best all")


@dataclass
class Budget:
    """What ends a cell: whichever limit is met first."""

    wallclock: float | None = option("seconds since the cell started, pauses between attempts excluded", above=0)
    gpu_hours: float | None = option("busy hours of all workers without test evaluation", above=0)
    trials: int | None = option("number of new configurations", min=1)
    epochs: int | None = option("epochs reported by all trials together", min=1)


@dataclass
class Scheduler:
    eta: float = option("reduction factor", min=2)
    grace_period: int = option("epochs before the first rung", min=1)
    brackets: int | None = option("number of brackets; null: all that max_epochs allows", min=1)
    type: str = option("pause and promote, or stop early", choices="promotion stopping")


@dataclass
class Task:
    model: str = option("architecture")
    batch_size: int = option("training batch", min=1)
    max_epochs: int = option("epochs of a fully trained trial", min=1)
    tau: float | None = option("target of T@tau, a test score (not part of a cell's identity)")
    taus: list[float] | None = option(  # noqa: RUF009
        "more targets, reported as well (not part of a cell's identity)"
    )
    space: str = option("search space, one of task.spaces")
    label_noise: float = option("share of training labels replaced at random", min=0, max=1)
    data_dir: str | None = option("folder of the data (taken literally, ~ expanded)")
    schedule: str = option("learning rate over a trial: constant, or half a cosine to 0", choices="constant cosine")
    precision: str = option("arithmetic of the training step", choices="auto fp32 bf16 fp16")
    image_size: int = option("imagenet: pixels of the images, either way", min=8)
    parts_per_pass: int = option("imagenet, language: epochs of a pass over the training data", min=1)
    validation_share: float = option("imagenet: share of the training images to validate on", above=0, max=0.5)
    loader_workers: int | None = option("imagenet: decoding processes of a worker; null: as many as its threads", min=0)
    data: str = option("uci, xgboost: a set that scikit-learn ships, a CSV or TSV file, or openml:NAME[:VERSION]")
    target: str | None = option("uci, xgboost: the target's column; null: the last one, or OpenML's default")
    kind: str = option("uci, xgboost: what the target asks for", choices="auto classification regression")
    header: bool = option("uci, xgboost: whether the file's first line names its columns (else: 0, 1, ...)")
    categorical: list[str] = option("uci, xgboost: columns of numbers that are codes of categories")  # noqa: RUF009
    metric: str = option("what task.tau and the scores are; uci, xgboost: accuracy, f1 (macro) or r2")
    rounds_per_epoch: int = option("xgboost: boosting rounds between two reports", min=1)
    warm_rounds: int | None = option(
        "xgboost: rounds before the loss that a warm start differentiates; null: those of one epoch", min=1
    )
    context: int = option("language: tokens of a training window", min=2)
    vocabulary: int = option("wikitext: number of words, the most frequent of the training part", min=3)
    environments: int = option("ppo: environments at a time", min=1)
    rollout: int = option("ppo: steps of every environment between two updates", min=1)
    updates_per_epoch: int = option("ppo: update blocks, each a rollout, in an epoch", min=1)
    episodes: int = option("ppo: last training episodes whose mean return is the validation score", min=1)
    evaluation_steps: int = option("ppo: steps of a test episode at most", min=1)
    game: str = option("atari_ppo: name of the game's ROM, as in pong or breakout")
    gpus_per_trial: int = option(
        "processes that train a trial together, each on a GPU of its own if there are any", min=1
    )
    text_file: str | None = option("text: any file, by bytes (literal, ~ expanded); null: Python's own help topics")


@dataclass
class Backend:
    threads: int | None = option("CPU threads of a worker; null: an equal share", min=1)
    max_retries: int = option("how often a trial survives the loss of its worker", min=0)
    stop_grace: float = option("seconds a worker has to stop a trial before it is killed", min=0)

    store: str | None = option(
        "simulated: file of the curve store (literal, ~ expanded); null: results_dir/curves.sqlite"
    )
    max_gib: float = option("simulated: checkpoints kept in the store, GiB", min=0)
    charge_decisions: bool = option("simulated: whether the scheduler's own time counts")
    processes: int | None = option("simulated: real workers for what the store lacks; null: one a GPU, else 2", min=1)

    partition: str | None = option("slurm: partition of the workers; null: the site's default")
    account: str | None = option("slurm: account of the workers")
    qos: str | None = option("slurm: quality of service of the workers")
    time: str | None = option("slurm: time limit of a worker, as in 4:00:00; one that ends is replaced")
    gres: str | None = option("slurm: GPUs of one worker, as in gpu:1")
    cpus: int | None = option("slurm: CPUs of one worker", min=1)
    mem: str | None = option("slurm: memory of one worker, as in 16G")
    extra: list[str] = option("slurm: further options of sbatch", ordered=True)  # noqa: RUF009
    setup: list[str] = option("slurm: lines of shell before a worker starts", ordered=True)  # noqa: RUF009
    host: str | None = option("slurm: address at which nodes reach the driver; null: its host name")
    port: int = option("slurm: port of the driver; 0: any that is free", min=0, max=65535)
    signal: str = option("slurm: signal before a worker's time limit", choices="USR1 USR2 TERM")
    signal_seconds: int = option("slurm: how long before the time limit", min=1, max=65535)


@dataclass
class Launch:
    partition: str | None = option("slurm: partition of the cells; null: the site's default")
    account: str | None = option("slurm: account of the cells")
    qos: str | None = option("slurm: quality of service of the cells")
    time: str | None = option("slurm: time limit of a cell, as in 12:00:00; one that needs more goes on in a new run")
    gres: str | None = option("slurm: GPUs of a cell, as in gpu:v100:4; their number is the default of n_workers")
    cpus: int | None = option("slurm: CPUs of a cell", min=1)
    mem: str | None = option("slurm: memory of a cell, as in 64G; 0: all of the node's")
    exclusive: bool = option("slurm: whether a cell has its node for itself")
    array_limit: int | None = option("slurm: how many cells run at a time", min=1)
    signal: str = option("slurm: signal before the time limit", choices="USR1 USR2")
    signal_seconds: int = option("slurm: how long before the time limit", min=1, max=65535)
    requeue: bool = option("slurm: whether a cell goes back into the queue when its job has to end")
    extra: list[str] = option("slurm: further options of sbatch", ordered=True)  # noqa: RUF009
    setup: list[str] = option("slurm: lines of shell before a cell starts", ordered=True)  # noqa: RUF009
    report: bool = option("slurm: whether a job makes the report when the cells have ended")
    watch: bool = option("slurm: whether the command waits for the cells and prints the summary")


@dataclass
class Tracker:
    project: str = option("W&B project or MLflow experiment")
    entity: str | None = option("W&B team or user; null: your default")
    uri: str | None = option("MLflow server or database; null: sqlite:///RESULTS_DIR/mlflow.db")
    interval: float = option("seconds between two updates of a run's history", min=0)


GROUPS: dict[str, type | None] = {  # in the order of --help; None: a group without keys
    "scheduler": Scheduler,
    "ohgw": Settings,
    "task": Task,
    "backend": Backend,
    "launch": Launch,
    "tracker": Tracker,
    "experiment": None,
}
LITERAL = frozenset({"name", "results_dir", "task.data_dir", "task.text_file", "backend.store"}) | frozenset(
    f"{group}.{key}"
    for group in ("backend", "launch")
    for key in ("partition", "account", "qos", "time", "gres", "mem")
)  # never parsed: commas, quotes, = are part of the value
# Not part of a cell's identity (the hash), so two values of one of these would be the same cell.
OUTSIDE_IDENTITY = (
    frozenset({"name", "results_dir", "save_model", "tracker", "launch"})
    | frozenset(f"task.{key}" for key in ("tau", "taus", "data_dir", "data_files", "fetch", "models", "loader_workers"))
    | frozenset(f"backend.{key}" for key in ("store", "max_gib", "processes"))
    | frozenset(f"backend.{key}" for key in ("partition", "account", "qos", "time", "gres", "cpus", "mem", "extra"))
    | frozenset(f"backend.{key}" for key in ("setup", "host", "port", "signal", "signal_seconds"))
)
FIXED = frozenset({"backend.name", "launch.name"})  # what a YAML is, not what it can be told


@dataclass(frozen=True)
class Key:
    """One dotted key: ``kind`` is int, float, bool, str, list, dict or object (anything); ``item`` that of a list's
    entries."""

    name: str
    kind: type
    help: str = ""
    nullable: bool = False
    item: type = object
    min: float | None = None
    max: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    ordered: bool = False

    @classmethod
    def of_field(cls, name: str, source: dataclasses.Field) -> "Key":
        kind: Any = source.type
        nullable = isinstance(kind, types.UnionType)
        kind = get_args(kind)[0] if nullable else kind
        origin = get_origin(kind)
        item = get_args(kind)[0] if origin in (list, tuple) else object
        outer: Any = {None: kind, Literal: str, tuple: list}.get(origin, origin)
        return cls(name, outer, nullable=nullable, item=item, **source.metadata)

    @classmethod
    def of_value(cls, name: str, value: Any) -> "Key":
        """The key that a YAML value implies; null may become anything."""
        return cls(name, object if value is None else type(value), nullable=value is None)

    @property
    def allowed(self) -> str:
        """What the key takes, in words: ``an integer >= 1 or null``."""
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        else:
            bounds = ((">=", self.min), (">", self.above), ("<=", self.max))
            limits = " and".join(f" {sign} {bound:g}" for sign, bound in bounds if bound is not None)
            words = _WORDS.get(self.kind, "a value") + limits
        return words + (" or null" if self.nullable else "")

    def parse(self, text: str) -> Any:
        """The value that ``text``, an element of the command line, stands for; UserError if it is not allowed."""
        if self.nullable and text == "null":
            return self.check(None)
        if self.kind is str:
            return self.check(unquoted(text))
        if self.kind is int and re.fullmatch(r"[+-]?\d{1,18}", text):
            return self.check(int(text))
        if self.kind is float and _is_number(text):
            return self.check(float(text))
        if self.kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if self.kind in (list, dict, object):
            value = _structure(text)
            if self.kind is object or isinstance(value, self.kind):
                return self.check(value)
        raise self._wrong(text)

    def check(self, value: Any) -> Any:
        """``value`` in the key's type (integers become floats where those are asked for); UserError if out of range."""
        if value is None and self.nullable:
            return [] if self.kind is list else None
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        right_type = isinstance(value, self.kind) and (self.kind in (bool, object) or not isinstance(value, bool))
        if not right_type or not self._in_range(value):
            raise self._wrong(value)
        if self.kind is list and self.item is not object:
            entry = Key(self.name, self.item)
            value = [entry.check(element) for element in value]
            return value if self.ordered else sorted(set(value))  # most lists are sets: [lr,wd] is [wd,lr]
        return value

    def _in_range(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        low = self.min is None or value >= self.min
        return low and (self.above is None or value > self.above) and (self.max is None or value <= self.max)

    def _wrong(self, value: Any) -> UserError:
        advice = ""
        if isinstance(value, str) and ".." in value and self.kind is int:
            advice = "; a range is written first..last or first..last..step, as in 0..49"
        elif self.choices and isinstance(value, str):
            advice = near(value, self.choices, listed=False)
        elif self.kind is list and isinstance(value, str) and value.startswith("["):
            advice = "; quote elements that have more than letters and digits, as in ['a=b','c']"
        elif self.kind is str and isinstance(value, (int, float)):
            advice = "; in a YAML file, write it in quotes"
        return UserError(f"{self.name} must be {self.allowed}, not {shown(value)}{advice}")


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list in brackets such as [a,b]",
    dict: "a mapping such as {a:1}",
}


def known_keys() -> dict[str, Key]:
    """Every key of the schemas by its dotted name, in the order of ``--help``."""
    sections: dict[str, type | None] = {"": Experiment, "budget.": Budget}
    sections |= {f"{group}.": schema for group, schema in GROUPS.items()}
    return {
        prefix + source.name: Key.of_field(prefix + source.name, source)
        for prefix, schema in sections.items()
        if schema is not None
        for source in dataclasses.fields(schema)
    }


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a composed config with every value in its schema's type; UserError names the first out of range."""
    keys = known_keys()

    def walk(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        checked = {}
        for name, value in node.items():
            path = f"{prefix}{name}"
            if path in keys:
                value = keys[path].check(value)
            elif isinstance(value, Mapping):
                value = walk(value, f"{path}.")
            checked[name] = value
        return checked

    return walk(config, "")


def near(word: str, possible: Iterable[str], *, listed: bool = True) -> str:
    """``; did you mean ...?`` for an error's end; if nothing is near, and ``listed``, what is possible."""
    import difflib

    names = [str(name) for name in possible]
    short = word.lower().rpartition(".")[2]
    matches = [name for name in names if name.lower().rpartition(".")[2] == short]  # eta: scheduler.eta, ohgw.eta
    folded = {name.lower(): name for name in names}
    matches = matches or [folded[match] for match in difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.65)]
    if matches:
        return f"; did you mean {' or '.join(matches[:3])}?"
    if not listed:
        return ""
    return f"; possible: {', '.join(names)}" if len(names) <= 20 else "; --help lists all keys"


def shown(value: Any) -> str:
    """A value as an error message shows it: as it was written, in quotes, shortened to 60 characters."""
    text = as_text(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def as_text(value: Any) -> str:
    """A value as the command line writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def unquoted(text: str) -> str:
    """``text`` without the one pair of quotes around it, if there is one."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _structure(text: str) -> Any:
    """A list, mapping or scalar in Hydra's grammar; ``text`` itself where it is none (the type check answers that)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text
