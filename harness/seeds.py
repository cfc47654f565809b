"""Named random streams: every random draw of the project has a seed and a name.

A stream is a child of ``numpy.random.SeedSequence(seed)`` whose spawn key is derived from its name, so that streams are
independent, adding one never shifts another, and nothing depends on the order of calls or on ``hash()``.

    rng(seed, "configuration", 3)        # numpy generator of the 4th sampled configuration
    torch_seed(seed, "batches", epoch)   # for torch.Generator().manual_seed(...)
"""

import hashlib

import numpy as np


def stream(seed: int, *name: str | int) -> np.random.SeedSequence:
    """The child of ``SeedSequence(seed)`` that belongs to ``name`` (strings and integers; ``1`` and ``"1"`` differ)."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    words = tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    return np.random.SeedSequence(seed, spawn_key=words)


def rng(seed: int, *name: str | int) -> np.random.Generator:
    """A numpy generator for the stream ``name`` of ``seed``."""
    return np.random.default_rng(stream(seed, *name))


def torch_seed(seed: int, *name: str | int) -> int:
    """A 63-bit integer for ``torch.Generator().manual_seed`` (torch takes no SeedSequence)."""
    return int(stream(seed, *name).generate_state(1, np.uint64)[0] >> np.uint64(1))
