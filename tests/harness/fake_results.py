"""Results folders as the harness writes them, without training: for tests and speed measurements of the report."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.record import CellPaths, EventLog, summarize, write_config, write_json
from harness.seeds import rng
from harness.sweep import Cell, setting


@dataclasses.dataclass(frozen=True)
class FakeCell:
    """One cell: ``scores`` are (validation, test) of its reports, one every ``seconds`` (wall-clock and busy).

    Trials run one after the other, of ``epochs_per_trial`` epochs (each as many, or as listed). x, x_prime, gradients:
    of each trial; if empty, all trials have lr 0.1, which a warm start moves to 0.11 without a recorded gradient.
    """

    scores: Sequence[tuple[float, float]] = ((0.5, 0.4), (0.8, 0.7), (0.95, 0.93))
    seconds: float = 2.0
    warm_seconds: float = 0.0  # busy seconds of each warm start; 0 for vanilla cells
    warm_peak: int = 5_000_000  # bytes at most during a warm start; training takes 4 MB
    fallback: str | None = None
    task: str = "digits"
    scheduler: str = "pasha"
    variant: str = "off"
    seed: int = 0
    tau: float = 0.9
    epochs_per_trial: int | Sequence[int] = 3
    budget: dict[str, float | None] = dataclasses.field(default_factory=dict)
    close: str | None = "finished"  # None: killed
    n_workers: int = 2
    command: Sequence[str] | None = None  # sys.argv in meta.json
    planned: Cell | None = None  # a plan's cell: its config and folder instead of the ones made up here
    x: Sequence[dict[str, Any]] = ()
    x_prime: Sequence[dict[str, Any]] = ()
    gradients: Sequence[dict[str, float] | None] = ()
    decisions: Sequence[str] = ()  # of each report; if empty all CONTINUE
    space: dict[str, Any] = dataclasses.field(default_factory=lambda: {"lr": {"lower": 0.1, "upper": 1.0}})
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)  # changed in the config: {"task.max_epochs": 27}

    @property
    def folder(self) -> str:
        if self.planned:
            return self.planned.folder
        return f"{self.task}-{self.scheduler}-{self.variant}-{self.seed}-0123abcd"

    def config(self, results_dir: Path, name: str) -> dict[str, Any]:
        if self.planned:
            return self.planned.config
        budget = {"wallclock": None, "gpu_hours": None, "trials": None, "epochs": 110, **self.budget}
        labels = {"task": self.task, "scheduler": self.scheduler, "variant": self.variant,
                  "preset": self.variant.split("(")[0], "identity": "0123abcd"}  # fmt: skip
        preset = self.task.split("(")[0]
        config: dict[str, Any] = {
            "scheduler": {"_target_": f"harness.schedulers.{self.scheduler}", "eta": 3},
            "ohgw": {"estimator": "off" if self.variant == "off" else "lookahead"},
            "task": {"_target_": f"harness.tasks.{preset}", "tau": self.tau, "taus": [0.6], "mode": "max",
                     "metric": "accuracy", "space": "one", "spaces": {"one": self.space}},
            "backend": {"kind": "pool"},
            "budget": budget,
            "seed": self.seed,
            "n_workers": self.n_workers,
            "name": name,
            "results_dir": str(results_dir),
            "labels": labels,
        }  # fmt: skip
        for name, value in self.keys.items():
            group, _, key = name.rpartition(".")
            (config[group] if group else config)[key] = value
        labels["setting"] = setting(config)
        return config

    def events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = [{"e": "open", "t": 0.0, "run": 1, "time": 1.7e9, "commit": "0" * 40}]
        now = 0.0
        for i, ((trial, epoch), (validation, test)) in enumerate(zip(self._epochs(), self.scores, strict=False)):
            if epoch == 0:
                config = self.x[trial] if self.x else {"lr": 0.1, "wd": 1e-4}
                events.append({"e": "start", "t": now, "trial": trial, "config": config})
            now += self.seconds
            result = self._result(epoch + 1, validation, test)
            if "warm_start" in result:
                result["warm_start"] |= self._moves(trial)
            decision = self.decisions[i] if self.decisions else "CONTINUE"
            events.append({"e": "report", "t": now, "trial": trial, "decision": decision, "result": result})
        if self.close:
            events.append({"e": "close", "t": now, "why": self.close})
        return events

    def write(self, results_dir: Path, name: str = "default") -> CellPaths:
        """Write the cell as the harness does and return its paths."""
        paths = CellPaths(results_dir, name, self.folder)
        paths.root.mkdir(parents=True)
        config = self.config(results_dir, name)
        write_config(paths, config)
        write_json(paths.meta, {"commit": "0" * 40, **({"command": self.command} if self.command else {})})
        events = self.events()
        with EventLog(paths.events) as log:
            for event in events:
                log.append(event)
        if self.close == "finished":
            write_json(paths.summary, summarize(config, events))
        return paths

    def _epochs(self) -> Iterator[tuple[int, int]]:
        """(trial, epoch from 0) of the reports."""
        if isinstance(self.epochs_per_trial, int):
            yield from (divmod(i, self.epochs_per_trial) for i in range(len(self.scores)))
        else:
            yield from ((trial, i) for trial, length in enumerate(self.epochs_per_trial) for i in range(length))

    def _moves(self, trial: int) -> dict[str, Any]:
        """What a warm start's record says of the listed trials."""
        moves = {"x": self.x, "x_prime": self.x_prime, "gradient": self.gradients}
        return {name: values[trial] for name, values in moves.items() if values}

    def _result(self, epoch: int, validation: float, test: float) -> dict[str, Any]:
        warm = self.warm_seconds if epoch == 1 else 0.0
        busy = {"startup": 0.0, "warm_start": warm, "train": self.seconds - warm, "validate": 0.0, "test": 0.5,
                "checkpoint": 0.0}  # fmt: skip
        result: dict[str, Any] = {
            "epoch": epoch, "train_loss": 1.0, "train_score": validation, "validation_loss": 1.0,
            "validation_score": validation, "test_score": test, "busy": busy,
            "flops": {"train": 1000, "warm_start": 50 if warm else 0}, "peak_memory": 4_000_000,
        }  # fmt: skip
        if warm:
            result["warm_start"] = {
                "requested": "lookahead", "estimator": "none" if self.fallback else "lookahead",
                "fallback": self.fallback,
                "x": {"lr": 0.1}, "x_prime": {"lr": 0.11}, "seconds": warm, "flops": 50, "peak_memory": self.warm_peak,
            }  # fmt: skip
        return result


def curve(seed: int, variant: str, steps: int = 12, gain: float = 0.0) -> list[tuple[float, float]]:
    """Scores that rise towards 1 with noise that is shared by the variants of a seed; ``gain`` speeds them up."""
    shared, own = rng(seed, "curve"), rng(seed, "curve", variant)
    rate = 0.25 * (1 + gain) * np.exp(0.3 * shared.normal() + 0.1 * own.normal())
    validation = 1 - np.exp(-rate * np.arange(1, steps + 1)) + 0.005 * own.normal(size=steps)
    return [(float(v), float(v) - 0.01) for v in validation]


def write_study(
    results_dir: Path,
    variants: Sequence[str] = ("off", "on"),
    seeds: Sequence[int] = range(5),
    name: str = "default",
    steps: int = 12,
    scheduler: str = "pasha",
) -> Path:
    """A paired study of ``variants`` over ``seeds``; all but off learn 20 % faster. Returns the folder of cells."""
    for variant in variants:
        for seed in seeds:
            vanilla = variant == "off"
            scores = curve(seed, variant, steps, gain=0.0 if vanilla else 0.2)
            warm_seconds = 0.0 if vanilla else 0.1
            FakeCell(scores, variant=variant, seed=seed, warm_seconds=warm_seconds, scheduler=scheduler).write(
                results_dir, name
            )
    return results_dir / name
