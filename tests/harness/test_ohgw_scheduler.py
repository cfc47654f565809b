"""The wrapper: what the wrapped scheduler sees, and what resumed trials are sent."""

import pickle
import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import loguniform, uniform
from syne_tune.optimizer.baselines import ASHA, RandomSearch
from syne_tune.optimizer.scheduler import SchedulerDecision, TrialScheduler, TrialSuggestion

from harness.ohgw import OHGW

X = {"lr": 0.1, "momentum": 0.9, "epochs": 1, "tag": "a"}
RECORD = {"x": X, "x_prime": {**X, "lr": 0.2}}


class Spy(TrialScheduler):
    """Notes every configuration it is shown; ``suggest`` returns ``next``."""

    def __init__(self) -> None:
        super().__init__(random_seed=1)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.next: TrialSuggestion | None = None
        self.oracle_state = "spied"

    def suggest(self) -> TrialSuggestion | None:
        return self.next

    def on_trial_add(self, trial: Trial) -> None:
        self.seen.append(("add", trial.config))

    def on_trial_result(self, trial: Trial, result: dict[str, Any]) -> str:
        self.seen.append(("result", trial.config))
        return SchedulerDecision.PAUSE

    def on_trial_complete(self, trial: Trial, result: dict[str, Any]) -> None:
        self.seen.append(("complete", trial.config))

    def on_trial_error(self, trial: Trial) -> None:
        self.seen.append(("error", trial.config))

    def on_trial_remove(self, trial: Trial) -> None:
        self.seen.append(("remove", trial.config))

    def metric_names(self) -> list[str]:
        return ["accuracy"]

    def metric_mode(self) -> str:
        return "max"


def trial(trial_id: int = 0, **changes: Any) -> Trial:
    return Trial(trial_id, {**X, **changes}, datetime(2026, 1, 1))


def warmed() -> tuple[Spy, OHGW]:
    spy = Spy()
    wrapper = OHGW(spy)
    wrapper.on_trial_add(trial())
    assert wrapper.on_trial_result(trial(), {"accuracy": 0.5, "warm_start": RECORD}) == SchedulerDecision.PAUSE
    return spy, wrapper


def test_from_the_reporting_result_on_the_scheduler_sees_the_new_configuration():
    spy, wrapper = warmed()
    wrapper.on_trial_remove(trial())
    wrapper.on_trial_result(trial(), {"accuracy": 0.6})
    wrapper.on_trial_complete(trial(), {"accuracy": 0.6})
    wrapper.on_trial_error(trial())
    assert [what for what, _ in spy.seen] == ["add", "result", "remove", "result", "complete", "error"]
    assert spy.seen[0][1] == X
    assert all(config == {**X, "lr": 0.2} for _, config in spy.seen[1:])


def test_a_trial_without_warm_start_and_other_trials_are_left_alone():
    spy, wrapper = warmed()
    other = trial(1)
    wrapper.on_trial_add(other)
    wrapper.on_trial_result(other, {"accuracy": 0.1})
    assert spy.seen[-1] == ("result", X)
    spy.next = TrialSuggestion.resume_suggestion(1)
    assert wrapper.suggest() is spy.next


def test_keys_outside_the_warm_start_follow_the_current_configuration():
    spy, wrapper = warmed()
    wrapper.on_trial_result(trial(epochs=9), {"accuracy": 0.7})
    assert spy.seen[-1][1] == {**X, "lr": 0.2, "epochs": 9}


@pytest.mark.parametrize(
    ("suggested", "epochs"), [(None, 1), ({**X, "epochs": 3}, 3), ({**X, "lr": 0.2, "epochs": 3}, 3)]
)
def test_a_resumed_trial_is_sent_the_new_configuration_and_its_milestone(suggested: dict[str, Any] | None, epochs: int):
    spy, wrapper = warmed()
    spy.next = TrialSuggestion.resume_suggestion(0, suggested)
    suggestion = wrapper.suggest()
    assert suggestion is not None
    assert (suggestion.spawn_new_trial_id, suggestion.checkpoint_trial_id) == (False, 0)
    assert suggestion.config == {**X, "lr": 0.2, "epochs": epochs}
    assert wrapper.configuration(0) == suggestion.config


def test_new_suggestions_and_the_end_pass_through():
    spy, wrapper = warmed()
    assert wrapper.suggest() is None
    spy.next = TrialSuggestion.start_suggestion(dict(X))
    assert wrapper.suggest() is spy.next


def test_the_trial_objects_of_the_backend_are_not_touched():
    wrapper = OHGW(Spy())
    one = trial()
    wrapper.on_trial_add(one)
    wrapper.on_trial_result(one, {"accuracy": 0.5, "warm_start": RECORD})
    assert one == trial()


def test_a_record_of_the_new_configuration_alone_is_enough():
    wrapper = OHGW(Spy())
    wrapper.on_trial_result(trial(), {"accuracy": 0.5, "warm_start": {"x_prime": {**X, "lr": 0.2}}})
    assert wrapper.configuration(0) == {**X, "lr": 0.2}


def test_other_attributes_and_pickles_are_those_of_the_wrapped_scheduler():
    _, wrapper = warmed()
    assert (wrapper.oracle_state, wrapper.metric_names(), wrapper.metric_mode()) == ("spied", ["accuracy"], "max")
    assert wrapper.metadata()["scheduler_name"] == "Spy"
    with pytest.raises(AttributeError):
        _ = wrapper.no_such_thing
    copy = pickle.loads(pickle.dumps(wrapper))
    assert copy.configuration(0) == wrapper.configuration(0)


def test_syne_tunes_own_random_search_learns_from_the_new_configuration():
    space = {"lr": loguniform(1e-3, 1.0), "momentum": uniform(0.0, 0.99), "epochs": 3}
    inner = RandomSearch(space, metrics=["accuracy"], do_minimize=False, random_seed=0)
    learned = []
    inner.searcher.on_trial_complete = lambda trial_id, config, metrics: learned.append(config)
    wrapper = OHGW(inner)
    suggestion = wrapper.suggest()
    assert suggestion is not None
    assert suggestion.config is not None
    one = Trial(0, suggestion.config, datetime(2026, 1, 1))
    wrapper.on_trial_add(one)
    result = {"accuracy": 0.5, "warm_start": {"x": one.config, "x_prime": {**one.config, "lr": 0.2}}}
    wrapper.on_trial_result(one, result)
    wrapper.on_trial_complete(one, {"accuracy": 0.5})
    assert learned == [{"lr": 0.2, "momentum": one.config["momentum"]}]


def test_syne_tunes_own_asha_decides_as_it_does_alone():
    space = {"lr": loguniform(1e-3, 1.0), "momentum": uniform(0.0, 0.99)}

    def decisions(wrap: bool) -> list[str]:
        inner = ASHA(space, metric="accuracy", time_attr="epoch", max_t=9, do_minimize=False, random_seed=0)
        scheduler = OHGW(inner) if wrap else inner
        made = []
        for k in range(9):
            one = trial(k)
            scheduler.on_trial_add(one)
            made.append(scheduler.on_trial_result(one, {"accuracy": (k * 5 % 9) / 9, "epoch": 1, "warm_start": RECORD}))
            if made[-1] == SchedulerDecision.STOP:
                scheduler.on_trial_remove(one)
        return made

    assert decisions(True) == decisions(False)
    assert {SchedulerDecision.STOP, SchedulerDecision.CONTINUE} == set(decisions(True))


def test_the_tuner_needs_no_torch_and_a_trial_no_syne_tune():
    code = "import sys; from harness.ohgw import {}; assert {!r} not in sys.modules"
    for names, module in (("OHGW, Settings", "torch"), ("warm_start, Problem, UpdateRule, Settings", "syne_tune")):
        subprocess.run([sys.executable, "-c", code.format(names, module)], check=True, timeout=120)


def test_an_unknown_name_is_an_attribute_error():
    import harness.ohgw

    assert "warm_start" in dir(harness.ohgw)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = harness.ohgw.no_such_thing
