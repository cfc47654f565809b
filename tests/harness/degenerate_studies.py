"""Small results folders of every odd kind that a section of the report must cope with."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fake_results import FakeCell, curve

# Any warning fails the test, save those of other tests' garbage that happens to be collected while it runs.
warnings_fail = pytest.mark.filterwarnings(
    "error", "default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"
)

NEVER = [(0.5, 0.4), (0.6, 0.5), (0.6, 0.5)]


@dataclasses.dataclass(frozen=True)
class OtherCell(FakeCell):
    """A cell of a task that differs in ``entries`` of its configuration; a failed trial at the end if ``fails``."""

    entries: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fails: bool = False

    def config(self, results_dir: Path, name: str) -> dict[str, Any]:
        config = super().config(results_dir, name)
        return config | {"task": config["task"] | dict(self.entries)}

    def events(self) -> list[dict[str, Any]]:
        events = super().events()
        if not self.fails:
            return events
        failed = {"e": "start", "t": 1.0, "trial": 99, "config": {"lr": 0.1}}, {"e": "error", "t": 1.0, "trial": 99}
        return [*events[:1], *failed, *events[1:]]


def _pairs(folder: Path, variants: tuple[str, ...] = ("off", "on"), seeds: int = 3, **more: Any) -> None:
    for variant in variants:
        for seed in range(seeds):
            OtherCell(curve(seed, variant), variant=variant, seed=seed, **more).write(folder)


def _running(folder: Path) -> None:
    _pairs(folder, ("off",))
    FakeCell(curve(0, "on"), variant="on", seed=0).write(folder)
    FakeCell(curve(1, "on")[:4], variant="on", seed=1, close=None).write(folder)
    FakeCell((), variant="on", seed=2, close=None).write(folder)


def _nothing_yet(folder: Path) -> None:
    for variant in ("off", "on"):
        FakeCell((), variant=variant, close=None).write(folder)


def _all_censored(folder: Path) -> None:
    for variant in ("off", "on"):
        for seed in range(3):
            FakeCell(NEVER, variant=variant, seed=seed).write(folder)


def _lower_is_better(folder: Path) -> None:
    space = {"lr": {"lower": 0.1, "upper": 1.0}, "depth": {"lower": 1, "upper": 4, "integer": True},
             "kind": {"choices": ["a", "b"]}}  # fmt: skip
    entries = {"mode": "min", "tau": 0.2, "metric": "error", "spaces": {"one": space}}
    for variant in ("off", "on"):
        for seed in range(3):
            scores = [(1 - v, 1 - t) for v, t in curve(seed, variant)]
            OtherCell(scores, variant=variant, seed=seed, entries=entries).write(folder)


def _unknown_scores(folder: Path) -> None:
    for seed in range(3):
        FakeCell([(math.nan, math.nan), *curve(seed, "off")], seed=seed).write(folder)
        FakeCell([(math.nan, math.nan)] * 3, variant="on", seed=seed).write(folder)


def _no_scores(folder: Path) -> None:
    for variant in ("off", "on"):
        FakeCell([(math.nan, math.nan)] * 3, variant=variant).write(folder)


def _equal_scores(folder: Path) -> None:
    for variant in ("off", "on"):
        for seed in range(3):
            FakeCell([(0.95, 0.95)] * 3, variant=variant, seed=seed).write(folder)


def _two_settings(folder: Path) -> None:
    _pairs(folder, n_workers=2)
    for seed in range(3, 5):  # in folders of their own
        FakeCell(curve(seed, "on"), variant="on", seed=seed, n_workers=4, scheduler="asha").write(folder)
        FakeCell(curve(seed, "on"), variant="on", seed=seed, n_workers=4).write(folder)


def _no_shared_seeds(folder: Path) -> None:
    for seed, variant in enumerate(("off", "off", "on", "on")):
        FakeCell(curve(seed, variant), variant=variant, seed=seed).write(folder)


STUDIES: dict[str, Callable[[Path], None]] = {
    "running": _running,
    "nothing yet": _nothing_yet,
    "one seed": lambda folder: _pairs(folder, seeds=1),
    "one variant": lambda folder: _pairs(folder, ("off",)),
    "no off": lambda folder: _pairs(folder, ("on", "random")),
    "all censored": _all_censored,
    "no tau": lambda folder: _pairs(folder, entries={"tau": None}),
    "lower is better": _lower_is_better,
    "unknown scores": _unknown_scores,
    "no scores": _no_scores,
    "equal scores": _equal_scores,
    "failed trials": lambda folder: _pairs(folder, fails=True),
    "two settings": _two_settings,
    "no shared seeds": _no_shared_seeds,
}


def write(name: str, results_dir: Path) -> Path:
    """Write the study ``name`` of STUDIES and return its folder of cells."""
    STUDIES[name](results_dir)
    return results_dir / "default"
