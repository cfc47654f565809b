"""Builds this project's scheduler for an oracle case; import it from anywhere: ``check_case(path, factory)``."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

if importlib.util.find_spec("harness") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness.schedulers import ASHA, PASHA, BaseScheduler, Hyperband


class GivenConfigs:
    """A searcher that returns the configurations of a case."""

    def __init__(self, suggest_config: Callable[[], dict[str, Any] | None]):
        self.suggest = suggest_config


def factory(
    inp: dict[str, Any], suggest_config: Callable[[], dict[str, Any] | None], next_bracket: Callable[[], int]
) -> BaseScheduler:
    """``inp``: the case's input line; ``suggest_config``: its configurations in order, then None;
    ``next_bracket``: the bracket that the published scheduler drew for this ``suggest`` (asynchronous kinds)."""
    common: dict[str, Any] = {
        "config_space": {},
        "metric": inp["metric"],
        "mode": inp["mode"],
        "max_t": inp["max_t"],
        "resource_attr": inp["resource_attr"],
        "max_resource_attr": "epochs",
        "grace_period": inp["grace"],
        "eta": inp["eta"],
        "brackets": inp["brackets"],
        "searcher": GivenConfigs(suggest_config),
    }
    kind = inp["scheduler"]
    if kind == "sync_hyperband":
        return Hyperband(**common)
    if kind == "pasha":
        return PASHA(**common, draw_bracket=next_bracket)
    types: dict[str, Literal["promotion", "stopping"]] = {"asha_promotion": "promotion", "asha_stopping": "stopping"}
    per_bracket = bool(inp.get("rung_system_per_bracket"))
    return ASHA(**common, type=types[kind], rung_system_per_bracket=per_bracket, draw_bracket=next_bracket)
