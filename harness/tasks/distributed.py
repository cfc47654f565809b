"""A trial on several processes: ``task.gpus_per_trial=k``, each with the k-th part of every batch.

The trial's worker is rank 0. It starts k - 1 helpers (``python -m harness.tasks.distributed``), keeps them for its next
trials, and tells them of every call of the run; they make the same call. Gradients, the hyper-gradient, losses and
scores are averaged (torch.distributed: NCCL, a GPU a process, or gloo on CPUs), and every process makes the same
update. Rank 0 alone reports, writes checkpoints and knows the driver.

What holds of k processes and of one with the same batch: the same up to the rounding of sums, but for two things.
BatchNorm normalises by the statistics of a process's part of the batch, as torch's DistributedDataParallel does; the
running statistics that are evaluated and saved are the means over the processes, taken at the end of every epoch. And
what a network draws itself (dropout) comes from a stream of each process.

Gradients are averaged after the backward pass in buckets of a fixed order and size, not by DistributedDataParallel,
which arranges its buckets anew after the first step: a resumed trial must add up in the order of an uninterrupted one,
bit for bit. (It also imports torch._dynamo, 4 s in every process.) The price is that nothing is sent during the
backward pass.

A process that dies ends the worker with all its processes: the driver counts a lost attempt, and the next one goes on
from the checkpoint. An error that all processes meet alike, such as a loss that is not finite, fails the trial only.

    helper's stdin      a line of JSON: rank, size, port, device, threads, sys_path, parent; then calls: a line of JSON
                        {"call", "arguments", "bytes"} and as many bytes; in an epoch a byte before every batch: 1, stop
    helper's stdout     a line of JSON for every call: {"kind", "reason"} as ``backends.attempt.Outcome`` has them
"""

import atexit
import contextlib
import datetime
import functools
import gc
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from backends.attempt import Outcome, call, die_with_parent, kill_own_group
from backends.context import TrialFailed, UserError, to_json
from harness.instantiate import instantiate

if TYPE_CHECKING:
    from harness.ohgw import Objective, Problem, Settings, WarmStart
    from harness.tasks import Run

ROOT = Path(__file__).resolve().parents[2]
LOCALHOST = "127.0.0.1"
BUCKET = 25 << 20  # bytes sent at once: DistributedDataParallel's default
PATIENCE = 20.0  # seconds between the failure of one process and the same failure of the others
COLLECTIVE = datetime.timedelta(minutes=30)  # a process may load data that long while the others wait
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # rank 0's to handle


class Group:
    """The processes that train one trial together, each on its share of every batch: here, one."""

    rank, size = 0, 1

    def share(self, tensor: Tensor) -> Tensor:
        """This process's examples of a batch whose first dimension is that of all."""
        n = len(tensor) // self.size
        return tensor[self.rank * n : (self.rank + 1) * n]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by their means over the processes, in place."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the first process says so."""
        return flag


ALONE = Group()


class Processes(Group):
    """Several processes, by torch.distributed; ``say(flag)``: rank 0's answer, from or to the others, for ``any``."""

    def __init__(self, rank: int, size: int, device: str, store: dist.Store, say: Callable[[bool], bool]):
        """Returns when all have come."""
        self.rank, self.size, self._say = rank, size, say
        self._backend = _nccl(store, rank, size) if device.startswith("cuda") else _gloo(store, rank, size)
        self.total(torch.zeros(1, device=device))  # connections are made by the first sum

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """In buckets of at most 25 MiB, or one larger tensor, filled in the order of ``tensors``."""
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._sum(flat)
            flat /= self.size
            pieces = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(list(bucket), [p.view(t.shape) for p, t in zip(pieces, bucket, strict=True)])

    @torch.no_grad()
    def total(self, tensor: Tensor) -> Tensor:
        summed = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._sum(summed)
        return summed

    def any(self, flag: bool) -> bool:
        """Costs a byte in a pipe, and no wait for the device."""
        return self._say(flag)

    def abort(self) -> None:
        """Let go of processes that no longer answer."""
        if isinstance(self._backend, dist.ProcessGroupNCCL):
            self._backend.abort()

    def _sum(self, tensor: Tensor) -> None:
        self._backend.allreduce([tensor]).wait()


def buckets(tensors: Sequence[Tensor], size: int = BUCKET) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of one dtype and at most ``size`` bytes (or one tensor)."""
    bucket: list[Tensor] = []
    room = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or tensor.nbytes > room):
            yield bucket
            bucket = []
        if not bucket:
            room = size
        bucket.append(tensor)
        room -= tensor.nbytes
    if bucket:
        yield bucket


def _gloo(store: dist.Store, rank: int, size: int) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOCALHOST)]
    options._timeout = COLLECTIVE
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = COLLECTIVE
    return dist.ProcessGroupNCCL(store, rank, size, options)


# ---- rank 0


class SharedTask:
    """A task whose runs are trained by ``gpus_per_trial`` processes of which this is the first.

    Errors: UserError for a task that cannot be shared, and for a worker that has fewer GPUs.
    """

    def __init__(self, spec: Mapping[str, Any], device: str):
        self._spec, self._device, self._size = json.dumps(spec, sort_keys=True), device, spec["gpus_per_trial"]
        if device.startswith("cuda") and torch.cuda.device_count() < self._size:
            raise UserError(
                f"task.gpus_per_trial={self._size} needs a worker of as many GPUs, this one has "
                f"{torch.cuda.device_count()}"
            )
        team = _team(self._size, device)
        self.task = team.call("load", lambda: load(self._spec, device), spec=self._spec)
        team.connect()
        self.space, self.max_epochs = self.task.space, self.task.max_epochs

    def largest_warm_start(self, probe: str) -> int:
        return self.task.largest_warm_start(probe)

    def start(self, config: Mapping[str, Any], seed: int) -> "SharedRun":
        """A run on all processes; the one before must not be used any more."""
        team = _team(self._size, self._device)
        team.connect()
        self.task.group = team.group
        run = team.call("start", lambda: self.task.start(config, seed), spec=self._spec, config=config, seed=seed)
        team.run = SharedRun(team, run)
        return team.run


class SharedRun:
    """``harness.tasks.Run`` of several processes: every call that changes or needs them all is made by all."""

    def __init__(self, team: "Team", run: Any):
        self._team, self.run = team, run

    @property
    def epoch(self) -> int:
        return self.run.epoch

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        self._call("reconfigure", lambda: self.run.reconfigure(config), config=config)

    def problem(self, settings: "Settings") -> "Problem | Objective | None":
        """This process's part; ``warm_start`` is what all can do together."""
        return self.run.problem(settings)

    def warm_start(self, x: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> "WarmStart":
        """``harness.trial.one_warm_start``, its batches shared and its gradients averaged."""
        from harness.trial import one_warm_start

        return self._call("warm_start", lambda: one_warm_start(x, self.run.task, self.run, settings, seed),
                          together=True, x=x, settings=settings, seed=seed)  # fmt: skip

    def train_epoch(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        return self._call("train_epoch", lambda: self.run.train_epoch(should_stop), together=True)

    def evaluate(self, part: str) -> dict[str, float]:
        return self._call("evaluate", lambda: self.run.evaluate(part), together=True, part=part)

    def state_dict(self) -> dict[str, Any]:
        """The same in every process."""
        return self.run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(state, content)
        self._call("load_state_dict", lambda: self.run.load_state_dict(state), payload=content.getvalue())

    def _call(self, name: str, local: Callable[[], Any], **rest: Any) -> Any:
        if self._team.run is not self:
            raise RuntimeError("this run has ended: its processes train another one")
        return self._team.call(name, local, **rest)


@contextlib.contextmanager
def alone(run: "Run") -> Iterator["Run"]:
    """The run in this process only, as if there were no others, until the end of the block: for counting FLOPs."""
    if not isinstance(run, SharedRun):
        yield run
        return
    task, group = run.run.task, run.run.task.group
    task.group = ALONE
    try:
        yield run.run
    finally:
        task.group = group


class Team:
    """The helpers of this process."""

    def __init__(self, size: int, device: str):
        self.size, self.device = size, device
        self.group: Processes | None = None
        self.run: SharedRun | None = None
        self.closing = False
        self.local_done = threading.Event()
        self.local_done.set()
        self._store = dist.TCPStore(LOCALHOST, 0, size, is_master=True, wait_for_workers=False)
        self._helpers = [_Helper(self, rank, self._store.port) for rank in range(1, size)]

    def connect(self) -> None:
        """Make the group, unless there is one."""
        if self.group is None:
            self.group = self.call("connect", self._connected, together=True)

    def _connected(self) -> Processes:
        return Processes(0, self.size, self.device, self._store, self._say)

    def call(
        self, name: str, local: Callable[[], Any], *, together: bool = False, payload: bytes = b"", **arguments: Any
    ) -> Any:
        """Have all helpers do ``name``, do ``local`` meanwhile and return its result. ``together``: they wait for one
        another in it, so that the failure of one would leave the others waiting.

        What ``local`` raises, or else a helper, is raised; afterwards helpers may be gone (the next task or run starts
        others). A helper that dies, or fails where the others do not, ends this process.
        """
        if together:
            self.local_done.clear()
        try:
            message = {"call": name, "arguments": arguments, "bytes": len(payload)}
            for helper in self._helpers:
                helper.send(message, payload)
            result = local()
        except BaseException as error:
            self.local_done.set()
            answers = self._answers(PATIENCE)  # if one died, that is why; then this process ends here
            if len(answers) < len(self._helpers) or not isinstance(error, TrialFailed | UserError):
                self.close()
            raise
        self.local_done.set()
        for rank, answer in enumerate(self._answers(), 1):
            if answer.kind != "returned":
                self.close()
                raise _error(rank, answer)
        return result

    def _answers(self, seconds: float = float("inf")) -> list[Outcome]:
        """Of the helpers, as far as they come in time."""
        deadline, answers = time.monotonic() + seconds, []
        for helper in self._helpers:
            rest = None if seconds == float("inf") else max(0.0, deadline - time.monotonic())
            with contextlib.suppress(queue.Empty):
                answers.append(helper.answers.get(timeout=rest))
        return answers

    def _say(self, flag: bool) -> bool:
        for helper in self._helpers:
            helper.write(b"\1" if flag else b"\0")
        return flag

    def close(self) -> None:
        """End the helpers."""
        self.closing = True
        for helper in self._helpers:
            helper.end()
        if self.group is not None:
            self.group.abort()
        self.group = self.run = None


class _Helper:
    """Rank 0's end of another process."""

    def __init__(self, team: Team, rank: int, port: int):
        self.team, self.rank = team, rank
        self.answers: queue.Queue[Outcome] = queue.Queue()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.tasks.distributed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        device = f"cuda:{rank}" if team.device.startswith("cuda") else team.device
        order = {"rank": rank, "size": team.size, "port": port, "device": device, "threads": torch.get_num_threads(),
                 "sys_path": sys.path, "parent": os.getpid()}  # fmt: skip
        self.send(order)
        threading.Thread(target=self._listen, daemon=True, name=f"rank-{rank}").start()

    def send(self, message: Mapping[str, Any], payload: bytes = b"") -> None:
        self.write(to_json(message).encode() + b"\n" + payload)

    def write(self, data: bytes) -> None:
        """A helper that is gone is ``_listen``'s to deal with."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def _listen(self) -> None:
        """A thread: takes answers; ends this process when it cannot go on."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = Outcome(**json.loads(line))
            if answer.kind != "returned" and not self.team.local_done.wait(PATIENCE) and not self.team.closing:
                _end_worker(f"process {self.rank} of {self.team.size} of this trial failed alone:\n{answer.reason}")
            self.answers.put(answer)
        code = self.process.wait()
        if not self.team.closing:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            _end_worker(f"process {self.rank} of {self.team.size} of this trial {how}")


def _end_worker(why: str) -> None:
    os.write(2, f"{why}\nthe attempt ends here; the trial goes on from its checkpoint\n".encode())
    kill_own_group()


def _error(rank: int, answer: Outcome) -> Exception:
    kinds: dict[str, type[Exception]] = {"failed": TrialFailed, "environment": UserError, "memory": MemoryError}
    if answer.kind in ("failed", "environment"):
        return kinds[answer.kind](answer.reason)
    return kinds.get(answer.kind, RuntimeError)(f"process {rank} of this trial failed:\n{answer.reason}")


_current: list[Team] = []  # at most one: a worker trains one trial at a time


def _team(size: int, device: str) -> Team:
    """This process's team: the one there is if it fits, else a new one."""
    if _current and (_current[0].closing or (_current[0].size, _current[0].device) != (size, device)):
        close()
    if not _current:
        _current.append(Team(size, device))
    return _current[0]


@atexit.register
def close() -> None:
    """End the helpers of this process, if it has any."""
    while _current:
        _current.pop().close()


@functools.lru_cache(maxsize=2)
def load(spec: str, device: str) -> Any:
    """The task of a spec (JSON) for one of several processes. Errors: UserError for a task that cannot be shared."""
    task = instantiate(json.loads(spec), device=device)
    if not hasattr(task, "group"):
        raise UserError(f"{type(task).__name__} cannot be trained on several GPUs: task.gpus_per_trial must be 1")
    return task


# ---- the others


class _Member:
    """What a helper does when told."""

    def __init__(self, order: Mapping[str, Any]):
        from backends.worker import Interpreter

        self.order, self.device = order, order["device"]
        self.interpreter = Interpreter(order["threads"])
        torch.set_num_threads(order["threads"])
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        self.interpreter.remember_torch()
        self.group: Processes | None = None
        self.run: Any = None

    def load(self, spec: str) -> None:
        load(spec, self.device)

    def connect(self) -> None:
        rank, size = self.order["rank"], self.order["size"]
        store = dist.TCPStore(LOCALHOST, self.order["port"], size, is_master=False)
        self.group = Processes(rank, size, self.device, store, lambda _: sys.stdin.buffer.read(1) == b"\1")

    def start(self, spec: str, config: Mapping[str, Any], seed: int) -> None:
        self.run = None  # its memory is free before the next one takes some
        self.interpreter.reset(seed)
        task = load(spec, self.device)
        task.group = self.group
        self.run = task.start(config, seed)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        self.run.reconfigure(config)

    def warm_start(self, x: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> None:
        from harness.trial import one_warm_start

        one_warm_start(x, self.run.task, self.run, settings, seed)

    def train_epoch(self) -> None:
        self.run.train_epoch(lambda: False)

    def evaluate(self, part: str) -> None:
        self.run.evaluate(part)

    def load_state_dict(self, payload: bytes) -> None:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        self.run.load_state_dict(state)


def serve() -> None:
    """Do what rank 0 says until it goes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not get among the answers
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.stdin.buffer.readline())
    die_with_parent(order["parent"])
    sys.path[:] = order["sys_path"]
    member = _Member(order)
    while line := sys.stdin.buffer.readline():
        message = json.loads(line)
        arguments = message["arguments"]
        if message["bytes"]:
            arguments = {**arguments, "payload": sys.stdin.buffer.read(message["bytes"])}
        outcome = call(functools.partial(getattr(member, message["call"]), **arguments))
        if outcome.kind != "returned":
            gc.collect()  # the traceback held the model
        answers.write(to_json({"kind": outcome.kind, "reason": outcome.reason}).encode() + b"\n")
        answers.flush()
    os._exit(0)  # waits for nothing that a broken GPU context could hold up


if __name__ == "__main__":
    from harness.tasks import distributed  # this file again, under the name by which the tasks know it

    distributed.serve()
