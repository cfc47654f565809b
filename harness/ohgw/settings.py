"""What a warm-start variant is made of. No torch here: the command line reads it, too."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Estimator = Literal["off", "direct", "lookahead", "finite_difference", "random"]
Rule = Literal["raw", "unit", "normalized", "sign"]
Momentum = Literal["impulse", "first_step"]
MomentumSpace = Literal["linear", "log1m"]
Probe = Literal["train", "val"]


def _key(help: str, **limits: Any) -> dict[str, Any]:
    return {"help": help, **limits}


@dataclass(frozen=True)
class Settings:
    """A warm-start variant. Raises ValueError, naming what is possible, for values out of range.

    ``step`` (``step.py``): raw: -eta * gradient; unit: the same in unit coordinates; normalized: length eta there;
    sign: eta each. ``momentum`` (``estimators.py``): all that one gradient moves the weights (impulse), or the first
    step. ``momentum_space``: psi of momentum is itself, or log(1 - momentum). All steps start from the same weights.
    """

    estimator: Estimator = field(
        default="lookahead",
        metadata=_key("where the hyper-gradient comes from", choices=get_args(Estimator)),
    )
    step: Rule = field(
        default="raw",
        metadata=_key(
            "rule that turns the gradient into a move",
            choices=get_args(Rule),
        ),
    )
    eta: float = field(default=1e-3, metadata=_key("step size", min=0.0, max=1e6))
    n_steps: int = field(default=1, metadata=_key("steps, each on a fresh pair of batches", min=1, max=1000))
    mask: tuple[str, ...] = field(default=(), metadata=_key("hyperparameters that must not move, as [lr,wd]"))
    probe: Probe = field(
        default="train", metadata=_key("where lookahead's second batch comes from", choices=get_args(Probe))
    )
    momentum: Momentum = field(
        default="impulse",
        metadata=_key(
            "how one gradient moves the weights under momentum",
            choices=get_args(Momentum),
        ),
    )
    momentum_space: MomentumSpace = field(
        default="linear", metadata=_key("coordinate of momentum", choices=get_args(MomentumSpace))
    )
    batch_size: int = field(default=128, metadata=_key("examples of one estimate", min=1, max=1_000_000))

    def __post_init__(self) -> None:
        if isinstance(self.mask, str) or not all(isinstance(name, str) for name in self.mask):
            raise ValueError(f"mask must be a list of hyperparameter names, got {self.mask!r}")
        object.__setattr__(self, "mask", tuple(self.mask))
        for item in dataclasses.fields(self):
            _check(item.name, getattr(self, item.name), type(item.default), item.metadata)


def _check(name: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> None:
    if "choices" in metadata and value not in metadata["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(metadata['choices'])}; got {value!r}")
    if "min" in metadata:
        number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not (number and metadata["min"] <= value <= metadata["max"]):
            what = "a number" if kind is float else "an integer"
            raise ValueError(f"{name} must be {what} in [{metadata['min']}, {metadata['max']}], got {value!r}")
