"""Hydra's ``_target_`` convention without Hydra (worker processes need not import it)."""

import importlib
from collections.abc import Mapping
from typing import Any


def locate(dotted: str) -> Any:
    """The object with the dotted name ``package.module.name``."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def instantiate(spec: Mapping[str, Any], **extra: Any) -> Any:
    """Call ``spec["_target_"]`` with the other entries of ``spec`` and ``extra``."""
    arguments = {key: value for key, value in spec.items() if key != "_target_"}
    return locate(spec["_target_"])(**arguments, **extra)
