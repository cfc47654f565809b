"""``map`` by several Python processes, for reading and drawing.

Not ``multiprocessing``: its child processes run the caller's script again, which a plain script does not expect. Not
joblib's loky: interrupted, it prints tracebacks of its own threads.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

_CHILD = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the whole process group: end without a traceback
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from harness.report.processes import serve
serve()
"""


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[Any], Any], items: Sequence[Any], processes: int) -> list[Any]:
    """``[function(item) for item in items]``, by ``processes`` new Python processes; the order is that of ``items``.

    function: of a module (not of the running script); items and results can be pickled. An exception of a call is
    raised here, after the other processes have ended; interrupted, all are killed.
    """
    chunks = [items[start::processes] for start in range(processes)]
    words = [sys.executable, "-c", _CHILD]
    children = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in chunks]
    with ThreadPoolExecutor(processes) as threads:
        try:
            parts = list(threads.map(_ask, children, repeat(function), chunks))
        finally:  # before the executor waits for its threads
            for child in children:
                child.kill()
    results: list[Any] = [None] * len(items)
    for start, part in enumerate(parts):
        results[start::processes] = part
    return results


def _ask(child: subprocess.Popen[bytes], function: Callable[[Any], Any], chunk: Sequence[Any]) -> list[Any]:
    answer, _ = child.communicate(pickle.dumps(sys.path) + pickle.dumps((function, chunk)))
    if child.returncode:
        raise RuntimeError(f"a process of the report ended with exit code {child.returncode}")
    results, error = pickle.loads(answer)
    if error is not None:
        raise error
    return list(results)


def serve() -> None:
    """A child's work: read (function, items) from stdin, write (results, exception or None) to stdout."""
    function, chunk = pickle.load(sys.stdin.buffer)
    answer, sys.stdout = sys.stdout, sys.stderr  # what a call prints must not get between
    try:
        reply: tuple[Any, Exception | None] = ([function(item) for item in chunk], None)
    except Exception as error:
        reply = None, error
    pickle.dump(reply, answer.buffer)
    answer.buffer.flush()
