"""The warm worker: a process that keeps torch, the data set and the GPU context, and runs one trial after another.

Started by ``WorkerPool`` as ``python -m backends.worker``; reads one line of JSON (where to connect, the key, limits)
from stdin. ``SlurmWorkers`` starts it as ``python -m backends.worker FILE BASE``: the JSON is in that file, and the
worker's number is BASE plus the index in its job array. Messages are JSON bytes both ways:

    in    {"m": "start", "key", "spec"}   {"m": "stop", "key"}   {"m": "interrupt", "key"}
          {"m": "prepare", "generation", "function", "settings"}
    out   {"m": "hello", "spawn", "pid", "node", "job"}   {"m": "ready", "device"}   {"m": "leaving"}
          {"m": "prepared", "generation", "error", "user"}
          {"m": "report", "key", "report"}   {"m": "done", "key", "kind", "reason", "details", "replace"}

A reused worker gives bit for bit what a fresh one gives: before each attempt ``Interpreter.reset`` puts back all global
state it knows of. When the connection closes (the driver is gone) the worker and all it started die at once. A worker
of Slurm that is told to go (preemption, time limit) lets its attempt checkpoint at the end of its epoch, and leaves.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from backends.attempt import Attempt, AttemptSpec, Outcome, call, die_with_parent, kill_own_group, resolve
from backends.context import UserError, to_json
from backends.slurm_commands import own_slurm_job
from backends.sockets import notice_dead_peer

REFUSED_SECONDS = 5.0  # a driver listens before it submits its workers


class Interpreter:
    """Global state of Python, numpy and torch that one trial could leave behind for the next."""

    def __init__(self, threads: int):
        self.threads = threads
        self._directory, self._environment = os.getcwd(), dict(os.environ)
        self._torch: dict[str, Any] | None = None

    def remember_torch(self) -> None:
        """Take torch's settings as they are now, before any trial ran, for the state to return to."""
        torch = sys.modules.get("torch")
        if torch is None or self._torch is not None:
            return
        self._torch = {
            "dtype": torch.get_default_dtype(),
            "deterministic": _determinism(torch),
            "matmul": torch.get_float32_matmul_precision(),
            "cudnn": {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "deterministic", "allow_tf32")},
        }

    def reset(self, seed: int) -> None:
        """Put everything back and seed the global generators, so that nothing depends on what ran here before."""
        os.chdir(self._directory)
        if os.environ != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        if self._torch is not None:
            self._reset_torch(sys.modules["torch"], self._torch, seed)

    def _reset_torch(self, torch: Any, state: dict[str, Any], seed: int) -> None:
        torch.manual_seed(seed)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(state["dtype"])
        torch.set_default_device(None)
        if _determinism(torch) != state["deterministic"]:  # the setter imports torch's compiler: seconds
            enabled, warn_only = state["deterministic"]
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.set_float32_matmul_precision(state["matmul"])
        torch.autograd.set_detect_anomaly(False)
        torch.set_flush_denormal(False)
        for name, value in state["cudnn"].items():
            setattr(torch.backends.cudnn, name, value)
        torch.backends.cudnn.benchmark = False  # its choice of algorithm depends on timing
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _determinism(torch: Any) -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


class Worker:
    """The main thread runs trials; a reader thread takes messages and sets the stop events."""

    def __init__(self, connection: Connection, device: str, interpreter: Interpreter):
        self.device = device
        self._connection, self._interpreter = connection, interpreter
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stops: dict[int, threading.Event] = {}
        self._interrupts: dict[int, threading.Event] = {}
        self._leaving = ""  # why this worker has to go

    def leave(self, reason: str) -> None:
        """Let the running attempt checkpoint, then end this process. To be called by a signal handler."""
        if not self._leaving:
            self._leaving = reason
            for event in list(self._interrupts.values()):
                event.set()
            self._inbox.put({"m": "leave"})

    def send(self, **message: Any) -> None:
        data = to_json(message).encode()
        with self._lock:
            self._connection.send_bytes(data)

    def listen(self) -> None:
        """The reader thread; never returns: without a driver there is nothing left to do."""
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                if message["m"] in ("stop", "interrupt"):
                    events = self._stops if message["m"] == "stop" else self._interrupts
                    if event := events.get(message["key"]):
                        event.set()
                    continue
                if message["m"] == "start":
                    message["received"] = time.perf_counter()
                    self._stops[message["key"]] = threading.Event()
                    self._interrupts[message["key"]] = threading.Event()
                self._inbox.put(message)
        finally:
            kill_own_group()

    def serve(self) -> None:
        """Run what arrives until the connection closes, a trial has spoilt the process, or it has to leave."""
        while True:
            message = self._inbox.get()
            if message["m"] == "leave":
                return self.send(m="leaving")
            if message["m"] == "prepare":
                self._prepare(message)
            elif not self._run(message):
                return

    def _prepare(self, message: dict[str, Any]) -> None:
        user: list[UserError] = []

        def prepare() -> None:
            try:
                resolve(message["function"])(message["settings"], self.device)
            except UserError as error:
                user.append(error)

        outcome = call(prepare)
        self._interpreter.remember_torch()
        _freeze()
        error = str(user[0]) if user else outcome.reason or None
        self.send(m="prepared", generation=message["generation"], error=error, user=bool(user))

    def _run(self, message: dict[str, Any]) -> bool:
        """One attempt; False if the worker has to be replaced."""
        key, spec = message["key"], AttemptSpec(**message["spec"])
        interrupt = self._interrupts[key]
        context = Attempt(
            spec,
            self.device,
            emit=lambda report: self.send(m="report", key=key, report=report),
            stop=self._stops[key],
            started=message["received"],
            interrupt=interrupt,
        )
        outcome = Outcome("returned") if self._leaving else self._logged(spec, context)
        del self._stops[key], self._interrupts[key]
        if outcome.kind == "returned" and (self._leaving or interrupt.is_set()):  # perhaps before its milestone
            outcome = Outcome("interrupted", self._leaving or "was interrupted")
        replace = bool(self._leaving) or (outcome.kind == "error" and _cuda_is_initialized())
        if outcome.kind != "returned":
            gc.collect()  # the traceback held the model
        self.send(m="done", key=key, kind=outcome.kind, reason=outcome.reason, details=outcome.details, replace=replace)
        return not replace

    def _logged(self, spec: AttemptSpec, context: Attempt) -> Outcome:
        try:
            with output_to(Path(spec.folder), spec.attempt):
                outcome = call(lambda: self._attempt(spec, context))
                if outcome.reason:
                    print(outcome.reason, file=sys.stderr)
                return outcome
        except OSError as error:
            return Outcome("environment", f"cannot write the trial's log: {error}")

    def _attempt(self, spec: AttemptSpec, context: Attempt) -> None:
        function = resolve(spec.function)
        self._interpreter.remember_torch()
        self._interpreter.reset(spec.seed)
        function(context)


@contextlib.contextmanager
def output_to(folder: Path, attempt: str) -> Iterator[None]:
    """What this process and its children print goes to ``folder``/<attempt>.out and .err; empty files are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {1: folder / f"{attempt}.out", 2: folder / f"{attempt}.err"}
    saved = {fd: os.dup(fd) for fd in paths}
    try:
        for fd, path in paths.items():
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(log, fd)
            os.close(log)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, path in paths.items():
            empty = os.fstat(fd).st_size == 0
            os.dup2(saved[fd], fd)
            os.close(saved[fd])
            if empty:
                path.unlink(missing_ok=True)


def _cuda_is_initialized() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()


def _freeze() -> None:
    """Exempt what was imported or loaded from garbage collection: later collections take milliseconds, not a tenth."""
    gc.collect()
    gc.freeze()


def warm_up(modules: list[str], threads: int, gpu: bool) -> str:
    """Import ``modules`` as far as they are installed, open the GPU if there is one; returns the device's name."""
    for module in modules:
        if importlib.util.find_spec(module):
            importlib.import_module(module)
    torch = sys.modules.get("torch")
    if torch is None:
        return "cuda:0" if gpu else "cpu"
    torch.set_num_threads(threads)
    if not (gpu and torch.cuda.is_available()):
        return "cpu"
    torch.ones(8, 8, device="cuda:0").mm(torch.ones(8, 8, device="cuda:0"))
    torch.cuda.synchronize()
    return "cuda:0"


def main() -> None:
    """Connect back, warm up, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    in_slurm = len(sys.argv) > 1
    try:
        init = (
            _slurm_order(Path(sys.argv[1]), int(sys.argv[2])) if in_slurm else json.loads(sys.stdin.buffer.readline())
        )
        connection = _connect(init["address"], bytes.fromhex(init["key"]), init.get("connect_seconds", 0.0))
    except UserError as error:
        sys.exit(str(error))
    if in_slurm and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # so that it can end all it started
    elif not in_slurm:
        die_with_parent(init["parent"])  # in case a fork of the driver keeps the connection open
    sys.path[:] = init["sys_path"]
    try:
        _serve(connection, init)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # before the connection closes, which would end it without a word
    os._exit(0)  # waits for nothing that a broken GPU context could hold up


def _slurm_order(file: Path, base: int) -> dict[str, Any]:
    """What a driver wrote for all its workers, with this one's number. Errors: UserError if the driver has gone."""
    try:
        order = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"the driver has gone: there is no {file}") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # absent where the site has no GPUs for Slurm to give
    gpu = Path("/dev/nvidia0").exists() if visible is None else visible not in ("", "NoDevFiles")
    return {**order, "spawn": base + int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)), "gpu": gpu}


def _connect(address: str | list[Any], key: bytes, patience: float) -> Connection:
    """The connection to the driver, both sides having proved that they know the key.

    ``address``: the path of a Unix socket, or [host, port]. Errors: UserError if nobody answers there for ``patience``
    seconds.
    """
    if isinstance(address, str):
        return Client(address, authkey=key)
    host, port = address
    begun = time.monotonic()
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=10.0)
            break
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)  # by a machine that is up: the driver is gone
            if time.monotonic() - begun > (min(patience, REFUSED_SECONDS) if refused else patience):
                raise UserError(
                    f"{socket.gethostname()} cannot reach the driver at {host} port {port}: {error}; is it running, "
                    "and may this node open connections to it? (backend.host and backend.port choose the address)"
                ) from None
            time.sleep(1.0)
    notice_dead_peer(sock)
    sock.settimeout(None)
    connection = Connection(sock.detach())
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except Exception as error:
        raise UserError(f"what answers at {host} port {port} is not this worker's driver ({error!r})") from None
    return connection


def _heed_signals(worker: Worker, init: dict[str, Any]) -> None:
    """SIGTERM reaches every process of a Slurm job that is to end: a worker of a pool leaves it to its driver, a worker
    that is a job of its own goes. Processes that trials fork have their defaults back."""
    chosen = {signal.SIGTERM}
    if "signal" in init:
        chosen.add(signal.Signals[f"SIG{init['signal']}"])
    for number in chosen:
        name = signal.Signals(number).name

        def handle(*_: object, name: str = name) -> None:
            if "signal" in init:
                worker.leave(f"was told to go by {name} (preempted, cancelled, or near its time limit)")

        signal.signal(number, handle)

    def restore() -> None:
        for number in chosen:
            signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=restore)


def _serve(connection: Connection, init: dict[str, Any]) -> None:
    interpreter = Interpreter(init["threads"])
    worker = Worker(connection, "cpu", interpreter)
    _heed_signals(worker, init)
    place = {"node": os.environ.get("SLURMD_NODENAME", socket.gethostname()), "job": own_slurm_job()}
    worker.send(m="hello", spawn=init["spawn"], pid=os.getpid(), **place)
    threading.Thread(target=worker.listen, daemon=True).start()
    worker.device = warm_up(init["warm"], init["threads"], init["gpu"])
    interpreter.remember_torch()
    interpreter.reset(seed=0)  # the first time costs milliseconds
    _freeze()
    worker.send(m="ready", device=worker.device)
    worker.serve()


if __name__ == "__main__":
    main()
