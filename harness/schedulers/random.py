"""Random search: the baseline without early stopping."""

from syne_tune.optimizer.scheduler import SchedulerDecision, TrialSuggestion

from harness.schedulers.base import BaseScheduler, Job


class RandomSearch(BaseScheduler[Job]):
    """Every configuration of the searcher is trained to ``max_t``. Arguments as in ``BaseScheduler``."""

    def suggest(self) -> TrialSuggestion | None:
        return self.start(Job(self.max_t), train_to=self.max_t)

    def decide(self, trial_id: int, job: Job, resource: int, value: float) -> str:
        return SchedulerDecision.STOP if resource >= job.milestone else SchedulerDecision.CONTINUE
