"""What a warm start or a training step costs besides time: floating-point operations and peak memory."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def count_flops(fn: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in ``fn()``, derivatives included
    (torch's own formulas). Depends on shapes only; runs ``fn`` once, more slowly than it would run alone."""
    from torch.utils.flop_counter import flop_registry  # takes seconds to import

    with _FlopCounter(flop_registry) as counter:
        fn()
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """torch's ``FlopCounterMode`` without its module hooks, which do not expect second derivatives."""

    def __init__(self, formulas: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()
        self.formulas = formulas
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled in here, and keeping the compiler out would import it, 4 s in every process."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def peak_memory(fn: Callable[[], Any], device: torch.device) -> int:
    """Bytes that ``fn()`` holds at its peak beyond what was held before: the CUDA allocator's figure, or on the CPU the
    running sum of all allocations, from the profiler (slow: for benchmarks)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_of_allocations(fn)


def _peak_of_allocations(fn: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events: list[Any] = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((nbytes for _, nbytes in changes), initial=0))
