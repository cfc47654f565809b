"""Reproducible arithmetic: sums of floating-point numbers depend on how many threads share them, decisions must not."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside (matrices of some hundred rows are no slower so), as before outside."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
