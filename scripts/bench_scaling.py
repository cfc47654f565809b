"""How a warm start's seconds, bytes and share scale: with the size of the model, and with the number of workers.

    python scripts/bench_scaling.py                                      # both parts
    python scripts/bench_scaling.py --parts models --millions 1,10,100 --device cuda:0 --batch-size 128
    python scripts/bench_scaling.py --parts workers --workers 1,8,64 --seeds 10

models   Causal pre-norm transformers on random tokens, width about 64 times the depth, as many parameters as
``--millions`` asks for (within 10 %), fp32. Beside each other, in turn, device synchronised: a training step (batch
drawn, forward, backward, SGD with momentum and decay) and the lookahead's warm start at the same batch size, for three
sets of coordinates, one z at a time: lr, weight decay and momentum; label smoothing, in which the loss is linear; the
magnitude of noise on the embeddings, in which it is not. Steps: seconds over the training step's of the same repeat.
Bytes: the most that is held, weights and (in training) momentum included. Share: of a first rung of R steps, the
passage of ``--examples`` examples, warm start / (warm start + R steps): r / (r + R) for a warm start of r steps. A size
that would not fit into the free memory is left out, and said so.

workers  The real command in virtual time (``backend=simulated``: real training, each curve measured once) with W
virtual workers and a budget of ``--epochs-per-worker`` times W epochs, ohgw=off and ohgw=on in pairs of a seed. Shares:
warm-start busy seconds of all busy seconds without test evaluation, and of the W workers' virtual wall-clock. Delay:
virtual wall-clock of on over off, whose curves were measured at different times (what a trained epoch took in on over
off shows that noise); and of on over the same cell replayed with warm starts of 0 s, all other durations the same.

All figures: median [min, max] of n. Written to ``--out``: scaling.csv, scaling.json (all values), scaling.png and
scaling.pdf. They are this machine's results: do not commit them.
"""

import argparse
import contextlib
import csv
import functools
import io
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.curve_store import Curve, CurveStore
from backends.curve_store import Row as CurveRow
from backends.gpus import default_n_workers
from backends.pool import WorkerPool
from harness.experiment import PREPARE_FUNCTION, Shared, run_cell, trial_settings
from harness.ohgw import Problem, Settings, UpdateRule, count_flops, peak_memory, warm_start
from harness.provenance import provenance
from harness.record import CellPaths, write_atomic, write_json
from harness.report.document import STYLE
from harness.seeds import torch_seed
from harness.space import Float, Space
from harness.sweep import Cell, make_plan
from harness.tasks.supervised import smoothed_cross_entropy

PARTS = ("models", "workers")
VOCABULARY = 256
ASPECT = 64  # width over depth, about GPT-2's
INITIAL_STD = 0.02  # GPT-2's
CONFIG = {"lr": 0.01, "wd": 5e-4, "momentum": 0.9, "label_smoothing": 0.1, "noise": 0.2}
SPACE = Space({
    "lr": Float(1e-3, 1.0, log=True), "wd": Float(1e-6, 1e-2, log=True), "momentum": Float(0.0, 0.99),
    "label_smoothing": Float(0.0, 0.3), "noise": Float(0.0, 1.0),
})  # fmt: skip
STEP = "training step"
MASKS = {  # the coordinates that stay
    "lr, wd, momentum": ("label_smoothing", "noise"),
    "+ label smoothing": ("noise",),
    "+ embedding noise": (),
}
FREE = "on in 0 s"  # ohgw=on with the same durations, but none for the warm starts
BUSY_SHARE, HELD_SHARE = "warm starts' share of busy time", "warm starts' share of the workers' wall-clock"
# Of what is held at the peak of the dearest warm start, in copies of the weights: theta0, the training step's momentum,
# q, g with its graph, the gradient of <q, g> in g, and 2 for what the allocators and a weight's second gradient add.
COPIES = 7
ACTIVATIONS = 60, 4  # of two derivatives, kept per layer and token, not underestimated: x width; x heads x tokens
MEMORY_SHARE = 0.9  # of the free memory may be planned with


@dataclass(frozen=True)
class Row:
    """A quantity of one size or number of workers; ``values``: one a repeat or seed (1 where none can differ)."""

    part: str
    parameters: int | None
    workers: int | None
    series: str
    quantity: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:.3g} [{low:.3g}, {high:.3g}]" if len(self.values) > 1 else f"{self.median:.3g}"


class Skipped(Exception):
    """A size that cannot be measured here; the message says why."""


def main(words: Sequence[str] | None = None) -> None:
    options = _options(words)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts bytes, would announce each run
    if options.threads:
        torch.set_num_threads(options.threads)
    meta = provenance(["bench_scaling.py", *(sys.argv[1:] if words is None else words)], _gpus(options))
    print(f"{meta['cpu']}, {meta['cores']} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
          + "".join(f", {name}" for name in meta["gpus"]))  # fmt: skip
    rows: list[Row] = []
    skipped: list[str] = []

    def save() -> None:  # after each size: the next one may take long
        write(options.out, rows, {"options": _plain_options(options), "skipped": skipped, "machine": meta})

    if "models" in options.parts:
        bench_models(options, rows, skipped, save)
    if "workers" in options.parts:
        rows += bench_workers(options)
    save()
    print(f"written to {options.out}: scaling.csv, .json" + (", .png, .pdf" if rows else "; nothing to draw")
          + " (results of this machine, not to be committed)")  # fmt: skip


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="models,workers (default both)")
    parser.add_argument("--repeats", type=_positive, default=5, help="measurements of each size (default 5)")
    parser.add_argument("--out", type=Path, default=Path("bench_scaling"), help="folder (default bench_scaling)")
    models = parser.add_argument_group("models")
    sizes = [0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
    models.add_argument("--millions", type=_sizes, default=sizes, help="parameters (default .3,1,3,10,30,100,300)")
    models.add_argument("--batch-size", type=_positive, default=32, help="examples of a step and a batch (default 32)")
    models.add_argument("--tokens", type=_positive, default=16, help="length of an example (default 16)")
    models.add_argument("--examples", type=_positive, default=45_000, help="of the first rung (default 45000)")
    models.add_argument("--device", type=_device, default="cuda:0" if torch.cuda.is_available() else "cpu")
    models.add_argument("--threads", type=_positive, default=None, help="CPU threads (default torch's)")
    workers = parser.add_argument_group("workers")
    workers.add_argument("--workers", type=_counts, default=[1, 8, 64], help="virtual workers (default 1,8,64)")
    workers.add_argument("--seeds", type=_positive, default=5, help="pairs, of seeds 0, 1, ... (default 5)")
    workers.add_argument("--epochs-per-worker", type=_positive, default=30, help="budget of a cell / W (default 30)")
    workers.add_argument("--model", default="mlp", choices=["mlp", "cnn"], help="on digits (default mlp)")
    workers.add_argument("--scheduler", default="asha", help="default asha")
    return parser.parse_args(words)


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _device(word: str) -> str:
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {word!r} here ({str(error).splitlines()[0]})") from None
    return word


def _counts(word: str) -> list[int]:
    return sorted({_positive(each) for each in word.split(",")})


def _sizes(word: str) -> list[float]:
    sizes = sorted({float(each) for each in word.split(",")})
    if not (sizes[0] >= 0.002 and math.isfinite(sizes[-1])):
        raise argparse.ArgumentTypeError("sizes are millions of parameters, at least 0.002")
    return sizes


def _parts(word: str) -> list[str]:
    parts = word.split(",")
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; possible: {', '.join(PARTS)}")
    return parts


def _plain_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _gpus(options: argparse.Namespace) -> list[str]:
    device = torch.device(options.device)
    return [torch.cuda.get_device_name(device)] if device.type == "cuda" else []


# ---- models


@dataclass(frozen=True)
class Shape:
    """Of a transformer. ``width`` is a multiple of ``heads``, ``tokens`` the length of its position embedding."""

    layers: int
    heads: int
    width: int
    tokens: int

    @property
    def parameters(self) -> int:
        d = self.width
        return self.layers * (12 * d * d + 13 * d) + (VOCABULARY + self.tokens + 2) * d

    @classmethod
    def of_size(cls, parameters: float, tokens: int) -> "Shape":
        """The shape with about so many parameters and a width of about ``ASPECT`` times the depth."""
        layers = max(1, round((parameters / (12 * ASPECT**2)) ** (1 / 3)))
        a, b = 12 * layers, 13 * layers + VOCABULARY + tokens + 2
        width = (math.sqrt(b * b + 4 * a * parameters) - b) / (2 * a)
        heads = max(1, round(width / 64))
        return cls(layers, heads, heads * max(2, 2 * round(width / heads / 2)), tokens)

    def memory(self, batch_size: int) -> int:
        """Bytes that the measurement of this shape is expected to take at most, in fp32."""
        per_width, per_pair = ACTIVATIONS
        kept = self.layers * (per_width * self.width + per_pair * self.heads * self.tokens) + 8 * VOCABULARY
        return 4 * (COPIES * self.parameters + batch_size * self.tokens * kept)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """tokens (n, length) and noise (n, length, width), in standard deviations of the embeddings -> logits (n, length,
    vocabulary), by the embeddings' own matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Parameter(torch.empty(shape.tokens, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor, noise: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position + INITIAL_STD * noise
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


def transformer(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Transformer:
    """Initialised as GPT-2 is, without a draw from the global generators."""
    with torch.device("meta"):
        model = Transformer(shape)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(torch_seed(0, "weights"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                shrink = math.sqrt(2 * shape.layers) if "out." in name or "down." in name else 1.0
                p.normal_(0.0, INITIAL_STD / shrink, generator=generator)
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def synthetic_problem(model: Transformer, batch_size: int) -> Problem:
    """Next-token prediction on random tokens, with smoothed labels and noise on the embeddings."""
    tokens, width = model.position.shape
    device, dtype = model.position.device, model.position.dtype

    def batch(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(torch_seed(0, "batch", number))
        text = torch.randint(VOCABULARY, (batch_size, tokens + 1), generator=generator)
        noise = torch.randn((batch_size, tokens, width), generator=generator, dtype=dtype)
        return text.to(device), noise.to(device)

    def loss(net: Callable[..., Tensor], batch: tuple[Tensor, Tensor], z: Mapping[str, Any]) -> Tensor:
        text, noise = batch
        logits = net(text[:, :-1], z["noise"] * noise).flatten(0, 1)
        return smoothed_cross_entropy(logits, text[:, 1:].flatten(), z["label_smoothing"])

    return Problem(
        model=model,
        train_loss=loss,
        probe_loss=lambda net, batch: loss(net, batch, {"noise": 0.0, "label_smoothing": 0.0}),
        draw=lambda step: (batch(2 * step), batch(2 * step + 1)),
        update=UpdateRule(),
        differentiable=("label_smoothing", "noise"),
        linear=("label_smoothing",),
    )


def training_step(problem: Problem) -> Callable[[], None]:
    """One step of plain PyTorch, its momentum kept from step to step; a learning rate of 0 leaves the weights alone."""
    optimizer = torch.optim.SGD(
        problem.model.parameters(), lr=0.0, momentum=CONFIG["momentum"], weight_decay=CONFIG["wd"]
    )
    z = {name: torch.tensor(CONFIG[name], device=problem.device) for name in problem.differentiable}

    def run() -> None:
        problem.train_loss(problem.model, problem.draw(0)[0], z).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def one_warm_start(problem: Problem, mask: tuple[str, ...], batch_size: int) -> Callable[[], None]:
    settings = Settings(mask=mask, batch_size=batch_size)

    def run() -> None:
        result = warm_start(CONFIG, SPACE, problem, settings)
        if result.fallback:
            raise RuntimeError(f"not what was to be measured: {result.fallback}")

    return run


def bench_models(options: argparse.Namespace, rows: list[Row], skipped: list[str], save: Callable[[], None]) -> None:
    """Adds the rows of each size that could be measured, or else a line to ``skipped``, and then calls ``save``."""
    steps = max(1, options.examples // options.batch_size)
    print(f"models: transformers on {options.device}, fp32, {options.batch_size} examples of {options.tokens} tokens, "
          f"n = {options.repeats} each; first rung: {steps} steps ({options.examples} examples)")  # fmt: skip
    for millions in options.millions:
        shape = Shape.of_size(1e6 * millions, options.tokens)
        try:
            found = measure_model(shape, options.batch_size, options.repeats, steps, torch.device(options.device))
        except Skipped as reason:
            skipped.append(f"{millions:g} M parameters: left out, {reason}")
            print(skipped[-1], flush=True)
        else:
            rows += found
            _print_model(shape, found)
        save()


def measure_model(shape: Shape, batch_size: int, repeats: int, steps: int, device: torch.device) -> list[Row]:
    """Raises Skipped if the memory does not, or turns out not to, suffice."""
    needed, free = shape.memory(batch_size), available_memory(device)
    if needed > MEMORY_SHARE * free:
        raise Skipped(f"about {_gib(needed)} needed, {_gib(free)} free (of which {MEMORY_SHARE:.0%} may be used)")
    try:
        return _measure_model(shape, batch_size, repeats, steps, device)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not _out_of_memory(error):
            raise
        why = str(error).split("\n")[0]
    raise Skipped(f"out of memory ({why})")  # not from the error, whose frames hold the model


def _out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def _measure_model(shape: Shape, batch_size: int, repeats: int, steps: int, device: torch.device) -> list[Row]:
    model = transformer(shape, device)
    problem = synthetic_problem(model, batch_size)
    weights = sum(p.nbytes for p in model.parameters())
    arms = {STEP: training_step(problem)}
    arms |= {name: one_warm_start(problem, mask, batch_size) for name, mask in MASKS.items()}
    flops = {name: count_flops(run) for name, run in arms.items()}  # these runs and the next ones warm up, too
    held = {name: weights + (weights if name == STEP else 0) + peak_memory(run, device) for name, run in arms.items()}
    times = [{name: _seconds(run, device) for name, run in arms.items()} for _ in range(repeats)]

    def row(series: str, quantity: str, unit: str, values: list[float]) -> Row:
        return Row("models", shape.parameters, None, series, quantity, unit, values)

    rows = []
    for name in arms:
        rows += [
            row(name, "time", "s", [each[name] for each in times]),
            row(name, "peak memory", "bytes", [held[name]]),
            row(name, "operations", "FLOP", [flops[name]]),
        ]
        if name != STEP:
            ratios = [each[name] / each[STEP] for each in times]
            rows += [
                row(name, "time over a training step's", "", ratios),
                row(name, "peak memory over a training step's", "", [held[name] / held[STEP]]),
                row(name, "operations over a training step's", "", [flops[name] / flops[STEP]]),
                row(name, "share of the first rung", "%", [100 * ratio / (ratio + steps) for ratio in ratios]),
            ]
    return rows


def available_memory(device: torch.device) -> int:
    """Free bytes: of a GPU; or of this machine, within the limits of the process's control groups."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterable[int]:
    """Bytes up to the limit of each control group (version 2) that the process is in and that has one."""
    top = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
        for folder in [place for path in own for place in (top / path.strip("/"), *(top / path.strip("/")).parents)]:
            with contextlib.suppress(OSError, ValueError):  # no limit: the file holds "max"
                limit = int((folder / "memory.max").read_text())
                stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - int((folder / "memory.current").read_text()) + int(stats["inactive_file"])


def _seconds(fn: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _print_model(shape: Shape, rows: Sequence[Row]) -> None:
    of = {(row.series, row.quantity): row for row in rows}
    print(f"{shape.parameters / 1e6:.3g} M parameters ({shape.layers} layers, width {shape.width}): a training step "
          f"takes {of[STEP, 'time'].spread} s, {_gib(of[STEP, 'peak memory'].median)}, "
          f"{of[STEP, 'operations'].median / 1e9:.3g} GFLOP")  # fmt: skip
    for name in MASKS:
        over = {what: of[name, f"{what} over a training step's"] for what in ("time", "peak memory", "operations")}
        print(f"  {name:<18}{of[name, 'time'].spread} s  {over['time'].spread} steps  "
              f"{_gib(of[name, 'peak memory'].median)}, x {over['peak memory'].median:.2f}  "
              f"x {over['operations'].median:.2f} FLOP  {of[name, 'share of the first rung'].spread} % of the rung",
              flush=True)  # fmt: skip


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


# ---- workers


def bench_workers(options: argparse.Namespace) -> list[Row]:
    print(f"workers: {options.scheduler} on digits ({options.model}) in virtual time, {options.epochs_per_worker} "
          f"epochs a worker, n = {options.seeds} pairs of a seed; curves trained by {default_n_workers()} processes",
          flush=True)  # fmt: skip
    logging.disable(logging.WARNING)  # the Tuner's
    try:
        summaries = run_pairs(options)
    finally:
        logging.disable(logging.NOTSET)
    rows = []
    for workers in options.workers:
        rows += worker_rows(
            workers,
            *([summaries[workers, seed, side] for seed in range(options.seeds)] for side in ("off", "on", FREE)),
        )
    _print_workers(rows, options.workers)
    return rows


class FreeWarmStarts(CurveStore):
    """A curve store in whose curves warm starts take no time."""

    def append(self, curve: Curve, row: CurveRow) -> None:
        super().append(curve, _without_warm_start(row))


def _without_warm_start(row: CurveRow) -> CurveRow:
    def free(spent: dict[str, Any]) -> dict[str, Any]:
        return {**spent, "busy": {**spent["busy"], "warm_start": 0.0}} if "busy" in spent else spent

    return replace(row, details=free(row.details), report=None if row.report is None else free(row.report))


def run_pairs(options: argparse.Namespace) -> dict[tuple[int, int, str], dict[str, Any]]:
    """Summaries by (workers, seed, "off", "on" or ``FREE``). Within a seed and variant all replay the same curves."""
    summaries: dict[tuple[int, int, str], dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = stack.enter_context(CurveStore(folder / "curves.sqlite"))
        free = stack.enter_context(FreeWarmStarts(folder / "free.sqlite"))
        warm_up = _cell(options, folder, default_n_workers(), options.seeds, "on")

        @functools.cache
        def pool() -> WorkerPool:
            workers = stack.enter_context(WorkerPool(default_n_workers(), threads=1))
            workers.prepare(PREPARE_FUNCTION, trial_settings(warm_up))
            return workers

        meta = provenance([], [])

        def run(cell: Cell, name: str, store: CurveStore) -> dict[str, Any]:
            return run_cell(cell, CellPaths(folder, name, cell.folder), Shared(pool, store), meta)

        run(warm_up, "warm-up", store)
        for seed in range(options.seeds):
            for variant in ("off", "on") if seed % 2 == 0 else ("on", "off"):
                for workers in reversed(options.workers):
                    cell = _cell(options, folder, workers, seed, variant)
                    summaries[workers, seed, variant] = run(cell, "bench", store)
            for curve in store.export():
                free.put(*curve)
            for workers in options.workers:
                summaries[workers, seed, FREE] = run(_cell(options, folder, workers, seed, "on"), "free", free)
    return summaries


def _cell(options: argparse.Namespace, folder: Path, workers: int, seed: int, variant: str) -> Cell:
    words = [f"scheduler={options.scheduler}", "task=digits", f"task.model={options.model}", "backend=simulated"]
    words += [f"ohgw={variant}", f"seed={seed}", f"n_workers={workers}", f"results_dir={folder}"]
    return make_plan([*words, f"budget.epochs={options.epochs_per_worker * workers}"]).cells[0]


def worker_rows(
    workers: int, off: Sequence[dict[str, Any]], on: Sequence[dict[str, Any]], free: Sequence[dict[str, Any]]
) -> list[Row]:
    """From the summaries of each seed."""

    def row(series: str, quantity: str, unit: str, values: Iterable[float]) -> Row:
        return Row("workers", None, workers, series, quantity, unit, list(values))

    def over(quantity: str, of: Callable[[dict[str, Any]], float], base: Sequence[dict[str, Any]], name: str) -> Row:
        return row(f"on / {name}", quantity, "", (of(a) / of(b) for a, b in zip(on, base, strict=True)))

    def wallclock(summary: dict[str, Any]) -> float:
        return summary["wallclock"]

    def epoch(summary: dict[str, Any]) -> float:
        return summary["busy"]["train"] / summary["epochs"]

    held = (100 * each["busy"]["warm_start"] / (workers * each["wallclock"]) for each in on)
    return [
        row("on", BUSY_SHARE, "%", (100 * each["warm_start_share"]["busy"] for each in on)),
        row("on", HELD_SHARE, "%", held),
        over("virtual wall-clock", wallclock, off, "off"),
        over("training time of an epoch", epoch, off, "off"),
        over("virtual wall-clock", wallclock, free, FREE),
        row("off", "virtual wall-clock", "s", map(wallclock, off)),
        row("on", "virtual wall-clock", "s", map(wallclock, on)),
        row("off", "trials", "", (each["trials"] for each in off)),
        row("on", "trials", "", (each["trials"] for each in on)),
    ]


def _print_workers(rows: Sequence[Row], counts: Sequence[int]) -> None:
    of = {(row.workers, row.series, row.quantity): row for row in rows}
    columns = list(dict.fromkeys((row.series, row.quantity, row.unit) for row in rows))
    width = max(len(f"{series}: {quantity} ({unit})") for series, quantity, unit in columns) + 2
    print(" " * width + "".join(f"{f'W = {workers}':<24}" for workers in counts))
    for series, quantity, unit in columns:
        name = f"{series}: {quantity}" + (f" ({unit})" if unit else "")
        cells = (of[workers, series, quantity].spread for workers in counts)
        print(f"{name:<{width}}" + "".join(f"{cell:<24}" for cell in cells))
    depend = [("on", BUSY_SHARE), ("on", HELD_SHARE), ("on / off", "virtual wall-clock"),
              (f"on / {FREE}", "virtual wall-clock")]  # fmt: skip
    for series, quantity in depend if len(counts) > 1 else []:
        first, last = (of[workers, series, quantity].values for workers in (counts[0], counts[-1]))
        ratios = Row("", None, None, "", "", "", [b / a for a, b in zip(first, last, strict=True)])
        print(f"{series}: {quantity}, W = {counts[-1]} over W = {counts[0]} in pairs of a seed: {ratios.spread}")


# ---- what is written


def write(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """scaling.csv, scaling.json, and scaling.png and scaling.pdf if there are rows."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["part", "parameters", "workers", "series", "quantity", "unit", "n", "median", "min", "max"])
    for row in rows:
        numbers = [len(row.values), row.median, min(row.values), max(row.values)]
        lines.writerow([row.part, row.parameters, row.workers, row.series, row.quantity, row.unit, *numbers])
    write_atomic(folder / "scaling.csv", text.getvalue())
    write_json(folder / "scaling.json", {**about, "rows": [asdict(row) for row in rows]})
    if rows:
        draw(folder, rows)


@dataclass(frozen=True)
class Panel:
    """``lines``: label in the legend -> (series, quantity); ``scale`` multiplies the values."""

    part: str
    label: str
    lines: Mapping[str, tuple[str, str]]
    log: bool = False
    scale: float = 1.0
    reference: float | None = None


def _of_sets(quantity: str, *more: str) -> dict[str, tuple[str, str]]:
    return {name: (name, quantity) for name in (*more, *MASKS)}


PANELS = [
    Panel("models", "time [s]", _of_sets("time", STEP), log=True),
    Panel("models", "time [training steps]", _of_sets("time over a training step's"), reference=1.0),
    Panel("models", "peak memory [GiB]", _of_sets("peak memory", STEP), log=True, scale=2.0**-30),
    Panel("models", "share of the first rung [%]", _of_sets("share of the first rung")),
    Panel("workers", "share of warm starts [%]", {
        "of busy time": ("on", BUSY_SHARE),
        "of the workers' wall-clock": ("on", HELD_SHARE),
    }),
    Panel("workers", "ratio of virtual wall-clocks", {
        "ohgw=on / off": ("on / off", "virtual wall-clock"),
        "(training time of an epoch: noise)": ("on / off", "training time of an epoch"),
        "ohgw=on / the same with warm starts of 0 s": (f"on / {FREE}", "virtual wall-clock"),
    }, reference=1.0),
]  # fmt: skip


def draw(folder: Path, rows: Sequence[Row]) -> None:
    """scaling.png and scaling.pdf: a panel for each quantity of the parts there are."""
    from matplotlib import pyplot

    panels = [panel for panel in PANELS if any(row.part == panel.part for row in rows)]
    columns = {2: 2, 4: 2, 6: 3}[len(panels)]
    pyplot.switch_backend("agg")
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(panels) // columns, columns, figsize=(3.9 * columns, 3.1 * len(panels) // columns),
            layout="constrained", squeeze=False,
        )  # fmt: skip
        for axis, panel in zip(axes.flat, panels, strict=True):
            _draw_panel(axis, panel, rows)
        for ending in ("png", "pdf"):
            temporary = folder / f".scaling.{os.getpid()}.{ending}"
            figure.savefig(temporary)
            os.replace(temporary, folder / f"scaling.{ending}")
        pyplot.close(figure)


LOOKS = dict(zip(  # color, marker, line: dashed where it may hide another
    [STEP, *MASKS], [("0.4", "o", "-"), ("C0", "s", "-"), ("C1", "^", "--"), ("C2", "D", "-")], strict=True
))  # fmt: skip


def _draw_panel(axis: Any, panel: Panel, rows: Sequence[Row]) -> None:
    """Medians, with bars from the least to the most."""
    top = 0.0
    for number, (label, (series, quantity)) in enumerate(panel.lines.items()):
        found = [row for row in rows if (row.part, row.series, row.quantity) == (panel.part, series, quantity)]
        x = [1e-6 * row.parameters if row.parameters else row.workers for row in found]
        y = [panel.scale * row.median for row in found]
        low = [panel.scale * (row.median - min(row.values)) for row in found]
        high = [panel.scale * (max(row.values) - row.median) for row in found]
        color, marker, line = LOOKS[series] if series in LOOKS else (f"C{number}", "os^"[number], "-")
        axis.errorbar(x, y, (low, high), label=label, color=color, marker=marker, ls=line, lw=1.2, ms=4, capsize=2)
        top = max([top, *(a + b for a, b in zip(y, high, strict=True))])
    axis.set_xscale("log")
    if panel.log:
        axis.set_yscale("log")
        _mark_ones_and_threes(axis.yaxis)
    else:
        axis.set_ylim(0, 1.3 * max(top, panel.reference or 0.0))  # room for the legend
    if panel.reference is not None:
        axis.axhline(panel.reference, color="0.4", linewidth=0.8, linestyle="--")
    if panel.part == "workers":
        counts = sorted({row.workers for row in rows if row.workers is not None})
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
    else:
        _mark_ones_and_threes(axis.xaxis)
    axis.set_xlabel("model size [million parameters]" if panel.part == "models" else "virtual workers")
    axis.set_ylabel(panel.label)
    axis.legend(fontsize=7.5, loc="upper left")


def _mark_ones_and_threes(axis: Any) -> None:
    """Labels at 1 and 3 of each decade, so that a logarithmic axis of one decade has some, too."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=20))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
