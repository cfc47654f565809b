"""``OHGW(scheduler)``: any Syne Tune scheduler, learning on the configurations that warm starts arrive at."""

import dataclasses
from typing import Any

from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.scheduler import TrialScheduler, TrialSuggestion

RECORD = "warm_start"  # key under which a trial's report carries WarmStart.record()


class OHGW(TrialScheduler):
    """A one-line wrapper around a ``TrialScheduler``, which it does not change and whose attributes it shows.

    From the first result that carries ``warm_start`` on, the trial's configuration is x' for the wrapped scheduler and
    its searcher, and a resumed trial is sent x'. Only the hyperparameters that the warm start moved are replaced: what
    else a configuration holds (constants, the milestone under ``max_resource_attr``) stays the scheduler's business.
    The ``Trial`` objects of the backend are not touched, so ``Tuner.best_config`` tells x; ``configuration(trial_id)``
    tells x'.
    """

    def __init__(self, scheduler: TrialScheduler):
        super().__init__(random_seed=getattr(scheduler, "random_seed", 0))
        self.scheduler = scheduler
        self._configs: dict[int, dict[str, Any]] = {}
        self._moved: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def configuration(self, trial_id: int) -> dict[str, Any]:
        """What the trial trains with: x' once its warm start was reported, x before."""
        return {**self._configs[trial_id], **self._moved.get(trial_id, {})}

    def suggest(self) -> TrialSuggestion | None:
        suggestion = self.scheduler.suggest()
        if suggestion is None or suggestion.spawn_new_trial_id or suggestion.checkpoint_trial_id not in self._moved:
            return suggestion
        trial_id = suggestion.checkpoint_trial_id
        if suggestion.config is not None:
            self._configs[trial_id] = dict(suggestion.config)
        return dataclasses.replace(suggestion, config=self.configuration(trial_id))

    def on_trial_add(self, trial: Trial) -> None:
        self._configs[trial.trial_id] = dict(trial.config)
        self.scheduler.on_trial_add(trial)

    def on_trial_result(self, trial: Trial, result: dict[str, Any]) -> str:
        if RECORD in result:
            self._learn(trial, result[RECORD])
        return self.scheduler.on_trial_result(self._warmed(trial), result)

    def on_trial_complete(self, trial: Trial, result: dict[str, Any]) -> None:
        self.scheduler.on_trial_complete(self._warmed(trial), result)

    def on_trial_error(self, trial: Trial) -> None:
        self.scheduler.on_trial_error(self._warmed(trial))

    def on_trial_remove(self, trial: Trial) -> None:
        self.scheduler.on_trial_remove(self._warmed(trial))

    def metric_names(self) -> list[str]:
        return self.scheduler.metric_names()

    def metric_mode(self) -> str:
        return self.scheduler.metric_mode()

    def metadata(self) -> dict[str, Any]:
        return self.scheduler.metadata()

    def _learn(self, trial: Trial, record: dict[str, Any]) -> None:
        """Note what the warm start changed. ``trial.config`` is still x: a trial reports its warm start once."""
        x = record.get("x", trial.config)
        new = {name: value for name, value in record["x_prime"].items() if name in trial.config}
        self._moved[trial.trial_id] = {name: value for name, value in new.items() if value != x.get(name)}

    def _warmed(self, trial: Trial) -> Trial:
        self._configs[trial.trial_id] = dict(trial.config)
        moved = self._moved.get(trial.trial_id)
        return dataclasses.replace(trial, config={**trial.config, **moved}) if moved else trial
