"""Property tests: no time limit per example (a busy machine is no failure), the same examples on every run."""

from hypothesis import settings

settings.register_profile("harness", deadline=None, derandomize=True)
settings.load_profile("harness")
