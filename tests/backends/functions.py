"""Trial functions for the backend tests; torch is imported only where it is needed."""

import json
import os
import random
import subprocess
import sys
import time

from backends.context import TrialContext, TrialFailed, UserError


def count(ctx: TrialContext) -> None:
    """Reports 1 ... config["epochs"], checkpoint and report in one."""
    state = ctx.load() or {"epoch": 0}
    while state["epoch"] < ctx.config["epochs"] and not ctx.should_stop():
        time.sleep(ctx.config.get("sleep", 0))
        state["epoch"] += 1
        ctx.save(
            state, report={"epoch": state["epoch"], "loss": ctx.config["x"] / state["epoch"], "attempt": ctx.attempt}
        )


def report_only(ctx: TrialContext) -> None:
    """Reports 1 ... config["epochs"] without checkpoints (and without torch)."""
    for epoch in range(1, ctx.config["epochs"] + 1):
        if ctx.should_stop():
            return
        time.sleep(ctx.config.get("sleep", 0))
        ctx.report(epoch=epoch, loss=ctx.config["x"] / epoch, seed=ctx.seed, more={"nan": float("nan"), "none": None})


def dies_once(ctx: TrialContext) -> None:
    """Kills its own process after the third epoch of its first attempt."""
    state = ctx.load() or {"epoch": 0}
    while state["epoch"] < 6:
        state["epoch"] += 1
        ctx.save(state, report={"epoch": state["epoch"], "attempt": ctx.attempt})
        if state["epoch"] == 3 and ctx.attempt.endswith("0001"):
            os.kill(os.getpid(), 9)


def repeats_epochs(ctx: TrialContext) -> None:
    """Reports every epoch, saves every second one after the report, dies at 3 in its first attempt."""
    state = ctx.load() or {"epoch": 0}
    while state["epoch"] < 6:
        state["epoch"] += 1
        ctx.report(epoch=state["epoch"])
        if state["epoch"] % 2 == 0:
            ctx.save(state)
        if state["epoch"] == 3 and ctx.attempt.endswith("0001"):
            os.kill(os.getpid(), 9)


def always_dies(ctx: TrialContext) -> None:
    os.kill(os.getpid(), 9)


def misbehaves(ctx: TrialContext) -> None:
    """Reports once, then does what config["how"] says."""
    ctx.report(epoch=1)
    how = ctx.config["how"]
    if how == "diverge":
        raise TrialFailed("loss is nan at epoch 2")
    if how == "raise":
        raise KeyError("typo in the trial function")
    if how == "exit":
        sys.exit(3)
    if how == "memory":
        raise MemoryError
    if how == "torch_memory":
        import torch

        torch.empty(2**60, dtype=torch.uint8)
    if how == "unjsonable":
        ctx.report(epoch=2, model=object())


def silent(ctx: TrialContext) -> None:
    """Returns without a report."""


def stubborn(ctx: TrialContext) -> None:
    """Never looks at should_stop; starts a child that has to go with it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    ctx.report(epoch=1, pid=os.getpid(), child=child.pid)
    time.sleep(600)


def batches(ctx: TrialContext) -> None:
    """One endless epoch of short batches."""
    ctx.report(epoch=1, pid=os.getpid())
    while not ctx.should_stop():
        time.sleep(0.002)


def overruns(ctx: TrialContext) -> None:
    """Goes on past the milestone until stopped, then saves and returns."""
    state = ctx.load() or {"epoch": 0}
    while state["epoch"] < 8:
        state["epoch"] += 1
        ctx.report(epoch=state["epoch"], attempt=ctx.attempt)
        ctx.save(state)
        if ctx.should_stop():
            return


def chatty(ctx: TrialContext) -> None:
    print("a line for stdout")
    print("a line for stderr", file=sys.stderr)
    ctx.report(epoch=1)


def stamps(ctx: TrialContext) -> None:
    ctx.report(first_line=time.time())


def stochastic(ctx: TrialContext) -> None:
    """Trains a small net with dropout on the global generators of torch, numpy and Python."""
    import numpy as np
    import torch

    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        x = torch.randn(32, 8) + random.random() + float(np.random.rand())  # noqa: NPY002
        loss = (net(x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = float(sum(float(p.double().sum()) for p in net.parameters()))
        ctx.report(epoch=epoch, loss=loss.item().hex(), weights=total.hex(), dtype=str(x.dtype))


def spoils(ctx: TrialContext) -> None:
    """Leaves every global setting it can think of in disorder."""
    import torch

    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(3)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("medium")
    torch.set_flush_denormal(True)
    os.chdir("/")
    os.environ["SPOILT"] = "1"
    ctx.report(epoch=1)


def environment(ctx: TrialContext) -> None:
    ctx.report(
        threads={name: value for name, value in os.environ.items() if name.endswith("_THREADS")},
        device=ctx.device,
        settings=ctx.settings,
        directory=os.getcwd(),
        spoilt=os.environ.get("SPOILT"),
    )


def prepare(settings: dict, device: str) -> None:
    with open(settings["file"], "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "device": device}) + "\n")


def prepare_without_data(settings: dict, device: str) -> None:
    raise UserError("no data here: fetch it with `fetch`")


def prepare_broken(settings: dict, device: str) -> None:
    raise ZeroDivisionError


def timed(ctx: TrialContext) -> None:
    """Reports 1 ... config["epochs"]; epoch e costs config["seconds"] * factor(e), slept if config["sleep"] says so."""
    state = ctx.load() or {"epoch": 0}
    first = True
    while state["epoch"] < min(ctx.config["epochs"], ctx.config.get("returns_at", 100)):
        if ctx.should_stop():
            return
        epoch = state["epoch"] = state["epoch"] + 1
        seconds = ctx.config["seconds"] * ctx.config.get("later", 1.0) ** (epoch - 1)
        time.sleep(seconds if ctx.config.get("sleep") else 0)
        if epoch == ctx.config.get("fails_at"):
            error = TrialFailed(f"failed at {epoch}")
            error.details = {"busy": {"train": seconds}}  # type: ignore[attr-defined]
            raise error
        if "needs" in ctx.config and not os.path.exists(ctx.config["needs"]):
            raise UserError("the data are not there")
        if epoch == ctx.config.get("breaks_at"):
            raise KeyError("a bug")
        if epoch == ctx.config.get("dies_at") and ctx.attempt.endswith("0001"):
            os.kill(os.getpid(), 9)
        startup = (1.0 if epoch == 1 else 0.25) if first else 0.0
        busy = (
            {"startup": startup, "train": seconds, "checkpoint": 0.5} if ctx.config.get("kinds") else {"train": seconds}
        )
        ctx.save(state, report={"epoch": epoch, "loss": ctx.config["x"] / epoch, "busy": busy})
        first = False


def polite(ctx: TrialContext) -> None:
    """Reports 1 ... config["epochs"]; checkpoints every tenth, and when it is interrupted: then it leaves."""
    state = ctx.load() or {"epoch": 0}
    resumed_at = state["epoch"]
    while state["epoch"] < ctx.config["epochs"] and not ctx.should_stop():
        time.sleep(ctx.config.get("sleep", 0))
        state["epoch"] += 1
        report = {"epoch": state["epoch"], "resumed_at": resumed_at, "pid": os.getpid()}
        leaving = ctx.interrupted()
        if leaving or state["epoch"] % 10 == 1:
            ctx.save(state, report=report)
        else:
            ctx.report(**report)
        if leaving:
            return


def forks(ctx: TrialContext) -> None:
    """Reports its pid; then how a forked child ended that it terminated."""
    import multiprocessing

    ctx.report(epoch=1, pid=os.getpid())
    time.sleep(0.3)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.1)
    child.terminate()
    child.join(20)
    ctx.report(epoch=2, pid=os.getpid(), child=child.exitcode)
