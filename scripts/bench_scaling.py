"""How a warm start scales: with the size of the model, and with the number of workers at a time.

    python scripts/bench_scaling.py --out scaling                     # both parts, 15 to 25 minutes on 2 cores
    python scripts/bench_scaling.py --parts models --millions 0.3,3,30
    python scripts/bench_scaling.py --parts workers --workers 1,8,64

models   Synthetic transformers of these many million parameters (width and depth grow together, vocabulary 1,000)
         on random tokens, ``--batch-size`` sequences of 64. Of each: seconds of a training step (forward, backward,
         SGD with momentum, fp32) and of a lookahead warm start that moves lr, wd and momentum; label smoothing as
         well, which enters the loss linearly; the noise on the embeddings as well, which does not. As multiples of a
         step, as peak bytes beside a step's (weights included), and as the share of the trial's first rung: one epoch
         of ``--rung-examples`` sequences. A size that does not fit in the free memory is named and left out.
workers  The digits in virtual time (backend=simulated), ASHA, so many virtual workers and ``--epochs`` epochs a worker.
         `zero`, which pays for a warm start in every trial and does not move it, against `off`, seed by seed: the share
         of the warm starts in the busy seconds, and how much longer the cells take.

Prints tables with n, median [least, most], and writes scaling.csv, scaling.png and scaling.pdf to ``--out``.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import UserError
from harness.ohgw import Problem, Settings, UpdateRule, peak_memory, warm_start
from harness.space import Float, Space
from harness.tasks.models import TransformerBlock, decays

VOCABULARY, CONTEXT, HEAD = 1000, 64, 16  # words, tokens of a sequence, width of an attention head
CONFIG = {"lr": 0.01, "wd": 1e-4, "momentum": 0.9, "label_smoothing": 0.1, "noise": 0.3}
SPACE = Space(
    {
        "lr": Float(1e-4, 1.0, log=True),
        "wd": Float(1e-6, 1e-2, log=True),
        "momentum": Float(0.0, 0.99),
        "label_smoothing": Float(0.0, 0.3),
        "noise": Float(0.0, 1.0),
    }
)
MOVED = {  # what is frozen, by what moves
    "lr, wd, momentum": ("label_smoothing", "noise"),
    "+ label smoothing": ("noise",),
    "+ embedding noise": (),
}
COPIES = 8  # of the weights: themselves, gradient, momentum, u, theta1, q and what autograd adds
ACTIVATIONS = 3  # times what a forward pass keeps: two derivatives keep it, and gradients of it


class Transformer(nn.Module):
    """``depth`` layers of ``width``, in which every token sees all; the embedding is the output layer as well."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, width // HEAD) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """Logits (n, words, context), ``noise`` (n, context, width) being added to the embeddings."""
        x = self.norm(self.blocks(self.embedding(tokens) + noise))
        return F.linear(x, self.embedding.weight).transpose(1, 2)


def shape(millions: float) -> tuple[int, int]:
    """Width and depth of a model of about ``millions`` million parameters."""
    depth = min(24, max(2, round(3.6 * millions ** (1 / 3))))

    def parameters(width: int) -> float:
        return 12 * depth * width**2 + 13 * depth * width + VOCABULARY * width

    widths = range(HEAD, 8192, HEAD)
    return min(widths, key=lambda width: abs(parameters(width) - 1e6 * millions)), depth


def build(millions: float, device: torch.device) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(*shape(millions)).to(device)


def problem(model: Transformer, batch_size: int, device: torch.device) -> Problem:
    """Two batches of random tokens: inputs, next tokens, and the noise's draws."""
    generator = torch.Generator().manual_seed(1)
    weight = model.embedding.weight

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.randint(VOCABULARY, (batch_size, CONTEXT + 1), generator=generator)
        noise = torch.randn(batch_size, CONTEXT, weight.shape[1], generator=generator)
        return tokens[:, :-1].to(device), tokens[:, 1:].to(device), noise.to(weight)

    pair = (batch(), batch())

    def train_loss(net: Callable[..., Tensor], batch: Any, z: Mapping[str, Tensor]) -> Tensor:
        tokens, answers, noise = batch
        log_p = net(tokens, 0.02 * z["noise"] * noise).log_softmax(1)
        smoothing = z["label_smoothing"]
        return (1 - smoothing) * F.nll_loss(log_p, answers) - smoothing * log_p.mean()

    return Problem(
        model,
        train_loss,
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        lambda step: pair,
        UpdateRule(),
        decayed={name for name, weight in model.named_parameters() if decays(weight)}.__contains__,
        differentiable=("label_smoothing", "noise"),
        linear=("label_smoothing",),
    )


@dataclass
class Row:
    """One line of scaling.csv."""

    part: str  # models or workers
    size: float  # parameters, or workers
    what: str  # what moves, or ""
    measure: str
    unit: str
    n: int
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, part: str, size: float, what: str, measure: str, unit: str, values: Sequence[float]) -> "Row":
        spread = (statistics.median(values), min(values), max(values))
        return cls(part, size, what, measure, unit, len(values), *spread)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.least:.3g}, {self.most:.3g}]"


# ---- the size of the model


def bench_models(options: argparse.Namespace) -> Iterator[Row]:
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"models: batch of {options.batch_size} sequences of {CONTEXT} tokens, fp32, {options.device} ({where}), "
          f"torch {torch.__version__}, n = {options.repeats}, median [least, most]; first rung: "
          f"{options.rung_examples} sequences")  # fmt: skip
    for millions in options.millions:
        needed, free = bytes_needed(millions, options.batch_size), available(device)
        if needed > free:
            print(f"{millions:g} M: left out, needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free")
            continue
        try:
            yield from bench_model(millions, options, device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            print(f"{millions:g} M: left out, not enough memory: {str(error).splitlines()[0]}")


def bench_model(millions: float, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The rows of one size, printed as well."""
    model = build(millions, device)
    p = problem(model, options.batch_size, device)
    size = sum(weight.numel() for weight in model.parameters())
    resident = sum(weight.nbytes for weight in model.parameters())
    train = training_step(p)
    starts = {what: one_warm_start(p, mask) for what, mask in MOVED.items()}
    for run in (train, *starts.values()):
        run()  # warms up
    steps: list[float] = []
    seconds: dict[str, list[float]] = {what: [] for what in starts}
    for _ in range(options.repeats):
        steps.append(timed(train, device))
        for what, run in starts.items():
            seconds[what].append(timed(run, device))
    step_memory = resident + peak_memory(train, device)
    print(f"{size / 1e6:.3g} M parameters (width {shape(millions)[0]}, depth {shape(millions)[1]}): "
          f"step {statistics.median(steps):.3g} s, {step_memory / 2**20:.0f} MiB")  # fmt: skip
    yield Row.of("models", size, "training step", "time", "s", steps)
    yield Row.of("models", size, "training step", "peak memory", "bytes", [step_memory])
    rung = options.rung_examples / options.batch_size
    for what, values in seconds.items():
        memory = resident + peak_memory(starts[what], device)
        pairs = list(zip(values, steps, strict=True))
        rows = [
            Row.of("models", size, what, "time", "s", values),
            Row.of("models", size, what, "time in steps", "1", [warm / step for warm, step in pairs]),
            Row.of("models", size, what, "peak memory", "bytes", [memory]),
            Row.of("models", size, what, "peak memory over a step's", "1", [memory / step_memory]),
            Row.of("models", size, what, "share of the first rung", "%",
                   [100 * warm / (warm + rung * step) for warm, step in pairs]),
        ]  # fmt: skip
        print(
            f"  {what:<20} {rows[1]} steps, {rows[0]} s, {memory / step_memory:.2f} x memory, {rows[4]} % of the rung"
        )
        yield from rows


def training_step(p: Problem) -> Callable[[], None]:
    """A step of SGD with momentum. Its learning rate is 0, so that every repeat does the same."""
    batch, _ = p.draw(0)
    z = {name: torch.tensor(CONFIG[name], device=p.device) for name in p.differentiable}
    optimizer = torch.optim.SGD(p.model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)

    def run() -> None:
        p.model.train()
        p.train_loss(p.model, batch, z).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def one_warm_start(p: Problem, mask: tuple[str, ...]) -> Callable[[], None]:
    settings = Settings(step="normalized", eta=0.1, mask=mask)

    def run() -> None:
        result = warm_start(CONFIG, SPACE, p, settings)
        if result.fallback:
            raise RuntimeError(f"not what was to be measured: {result.fallback}")

    return run


def timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def bytes_needed(millions: float, batch_size: int) -> float:
    """Estimate for a warm start with two derivatives (attention in plain matrix products)."""
    width, depth = shape(millions)
    kept = CONTEXT * (16 * width + 4 * CONTEXT * width / HEAD) * depth + 3 * CONTEXT * VOCABULARY
    return 4 * (COPIES * 1e6 * millions + ACTIVATIONS * batch_size * kept)


def available(device: torch.device) -> float:
    """Bytes that can be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


# ---- the number of workers


def bench_workers(options: argparse.Namespace) -> Iterator[Row]:
    print(f"workers: digits ({options.model}), asha, {options.epochs} epochs a worker, virtual time; zero against off, "
          f"n = {options.seeds} seeds, median [least, most]; {os.cpu_count()} cores")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for workers in options.workers:
            cells = {variant: run_cells(folder, variant, workers, options) for variant in ("off", "zero")}
            share = [100 * cell["warm_start"] / cell["busy"] for cell in cells["zero"]]
            both = list(zip(cells["zero"], cells["off"], strict=True))
            delay = [100 * (zero["wallclock"] / off["wallclock"] - 1) for zero, off in both]
            trials = [cell["trials"] for cell in cells["zero"]]
            rows = [
                Row.of("workers", workers, "zero", "share of busy seconds", "%", share),
                Row.of("workers", workers, "zero", "longer than off", "%", delay),
            ]
            print(f"  {workers:>3} workers: warm starts take {rows[0]} % of the busy seconds, cells {rows[1]} % longer "
                  f"than off; {statistics.median(trials):g} trials a cell")  # fmt: skip
            yield from rows


def run_cells(folder: str, variant: str, workers: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Seed by seed: busy seconds without test, those of warm starts among them, and the virtual length of the cell."""
    from harness.runner import run_sweep
    from harness.sweep import make_plan

    words = [f"results_dir={folder}", f"name=workers{workers}", "backend=simulated", f"n_workers={workers}",
             "scheduler=asha", f"ohgw={variant}", "tracker=none", f"task.model={options.model}",
             f"budget.epochs={options.epochs * workers}", f"seed=0..{options.seeds - 1}"]  # fmt: skip
    plan = make_plan(words)
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            code = run_sweep(plan, json_output=False, verbose=False)
        finally:
            sys.stdout = out
    if code:
        raise RuntimeError(f"the sweep of {workers} workers ended with exit code {code}")
    return [measured(plan.root / cell.folder) for cell in plan.cells]


def measured(cell: Path) -> dict[str, float]:
    """What the cell's events say."""
    from harness.record import read_events

    events, _ = read_events(cell / "events.jsonl")
    busy = [event["result"]["busy"] for event in events if event["e"] == "report"]
    spent = [sum(seconds for kind, seconds in row.items() if kind != "test") for row in busy]
    return {
        "warm_start": sum(row["warm_start"] for row in busy),
        "busy": sum(spent),
        "wallclock": max(event["t"] for event in events),
        "trials": sum(event["e"] == "start" for event in events),
    }


# ---- output


def write(rows: Sequence[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "scaling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)
    plot(rows, folder)
    print(f"written: {folder / 'scaling.csv'}, scaling.png, scaling.pdf")


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Time, memory and share against parameters; share and delay against workers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("models", "time", "seconds", 1.0), ("models", "time in steps", "training steps", 1.0),
              ("models", "peak memory", "peak memory, GiB", 2.0**30),
              ("models", "share of the first rung", "share of the first rung, %", 1.0),
              ("workers", "share of busy seconds", "warm starts, % of busy seconds", 1.0),
              ("workers", "longer than off", "longer than off, %", 1.0)]  # fmt: skip
    colors = {what: f"C{number}" for number, what in enumerate(["training step", *MOVED, "zero"])}
    panels = [panel for panel in panels if any((row.part, row.measure) == panel[:2] for row in rows)]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    for axis, (part, measure, label, scale) in zip(axes.flat, panels, strict=False):
        chosen = [row for row in rows if (row.part, row.measure) == (part, measure)]
        for what in dict.fromkeys(row.what for row in chosen):
            line = [row for row in chosen if row.what == what]
            low = [(row.median - row.least) / scale for row in line]
            high = [(row.most - row.median) / scale for row in line]
            axis.errorbar([row.size for row in line], [row.median / scale for row in line], [low, high],
                          marker="o", markersize=4, capsize=2, color=colors[what], label=what)  # fmt: skip
        axis.set_xscale("log")
        if measure in ("time", "peak memory"):
            axis.set_yscale("log")
        else:
            axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        sizes = sorted({row.size for row in chosen})
        axis.set_xticks(sizes, [f"{size if part == 'workers' else size / 1e6:.2g}" for size in sizes])
        axis.xaxis.minorticks_off()
        axis.set_xlabel("million parameters" if part == "models" else "virtual workers")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if panels[0][0] == "models":
        axes.flat[0].legend(frameon=False, fontsize=8)
    for ending in ("png", "pdf"):
        figure.savefig(folder / f"scaling.{ending}", dpi=150)
    plt.close(figure)


# ---- command line


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        values = [kind(word) for word in text.split(",")]
        if not all(value > 0 for value in values):
            raise ValueError(text)
        return values

    read.__name__ = "list of positive numbers"
    return read


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="models,workers", help="models, workers or both (default)")
    parser.add_argument("--out", type=Path, default=Path("scaling"), help="folder of the results (default: scaling)")
    parser.add_argument("--millions", type=numbers(float), default=[0.3, 1, 3, 10, 30, 100, 300])
    parser.add_argument("--batch-size", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--rung-examples", type=int, default=10_000, help="sequences of rung 1 (default 10,000)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=numbers(int), default=[1, 8, 64], help="virtual workers (default 1,8,64)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the workers part (default 5)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs a virtual worker (default 30)")
    parser.add_argument("--model", default="mlp", help="task.model of the workers part (default mlp)")
    options = parser.parse_args()
    parts = {"models": bench_models, "workers": bench_workers}
    chosen = options.parts.split(",")
    if unknown := set(chosen) - set(parts):
        parser.error(f"--parts takes models and workers, not {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    try:
        for name in chosen:
            rows += parts[name](options)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    if rows:
        write(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
