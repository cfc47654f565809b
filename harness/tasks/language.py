"""Language modelling with a causal Transformer: WikiText by words, any text by bytes, the tokens on the device.

    task = Text("cpu", model="transformer_tiny", context=64, batch_size=16, max_epochs=27, space="study3", spaces={...})
    run = task.start({"lr": 3e-3, "optimizer": "adamw", "momentum": 0.9}, seed=0)
    run.train_epoch(lambda: False)      # {"train_loss": ..., "train_score": ..., "flops": ...}
    run.evaluate("validation")          # {"loss": mean cross-entropy of a token, "score": perplexity}

An example is a window of ``context`` tokens, each of which predicts the next one; ``batch_size`` counts windows. A pass
over the training part cuts it into windows from a random offset on and takes them in random order; an epoch is one of
``parts_per_pass`` parts of a pass. Validation and test cut their whole part into windows from the first token on, so
that the first tokens of a window are predicted from little context (as by most published perplexities). The score is
the perplexity, the exponential of the mean cross-entropy; ``train_score`` that of the training loss, with whatever
label smoothing and dropout do to it.

Hyperparameters besides those of every supervised task: dropout (of every residual branch), embedding_dropout and
attention_dropout, the three rates of GPT-2. Defaults: 0. What a warm start does with them all:

    lr, wd, label_smoothing, under SGD also momentum and clip    exact derivatives
    the dropout rates   finite differences with common random numbers: one seed draws the masks of both points, a larger
                        rate drops what the smaller one did and more. What a difference sees is the units that change
                        sides, so its noise falls with the square root of h, 0.05 in unit coordinates: over 5 batch
                        pairs of ``text``, dF/d embedding_dropout was 0.39 with a standard deviation of 0.12 (0.25 at
                        h = 0.02), the two others 0.02 and -0.05 with 0.06, all small beside dF/d log lr
    warmup, beta2       frozen: one update does not see them
"""

import ast
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import TrialFailed, UserError
from harness.seeds import rng, torch_seed
from harness.tasks.data import SPLIT_SEED, find_data, installed_file, with_label_noise
from harness.tasks.supervised import SupervisedTask

if TYPE_CHECKING:
    from harness.ohgw import Settings

RATES = ("embedding_dropout", "attention_dropout", "dropout")
NO_DROPOUT = (0.0, 0.0, 0.0)
SMALLEST_RATE = 1e-6  # in warm starts, where a rate of 0 must draw as many random numbers as any other
IGNORED = -100  # label of what only fills the last window up; the default of F.cross_entropy
EVALUATION_LOGITS = {"cpu": 1 << 20}  # numbers at once: 4 MiB in fp32 stay in a cache; elsewhere 1 GiB, and no waiting
LARGEST_LOSS = 700.0  # nats a token; its exponential is about the largest number there is
READ = 1 << 24  # characters of a text file at a time
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"


# ---- network


class Block(nn.Module):
    """Attention to the past, then an MLP of four times the width, each after layer normalisation and beside a residual
    connection (GPT-2, Radford et al. 2019)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attention_dropout: float, dropout: float) -> Tensor:
        x = x + dropped(self.merge(self._attention(self.norm1(x), attention_dropout)), dropout)
        return x + dropped(self.narrow(F.gelu(self.widen(self.norm2(x)), approximate="tanh")), dropout)

    def _attention(self, x: Tensor, rate: float) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return attended.transpose(1, 2).reshape(n, length, width)


class Transformer(nn.Module):
    """Decoder-only Transformer with learned positions. The embedding is also the output layer (Press & Wolf 2017).

    Takes tokens (n, length <= context), integers, and the three ``RATES``, which are arguments so that a finite
    difference can vary them; returns logits (n, length, vocabulary). Weights are initialised as GPT-2's, from torch's
    global generator."""

    def __init__(self, vocabulary: int, context: int, *, width: int, depth: int, heads: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                ends_branch = name.endswith(("merge", "narrow"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if ends_branch else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, rates: tuple[float, float, float] = NO_DROPOUT) -> Tensor:
        embedding_dropout, attention_dropout, dropout = rates
        x = dropped(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]], embedding_dropout)
        for block in self.blocks:
            x = block(x, attention_dropout, dropout)
        return F.linear(self.norm(x), self.tokens.weight)


def dropped(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate > 0 else x


MODELS: dict[str, dict[str, int]] = {
    "transformer_tiny": {"width": 64, "depth": 2, "heads": 4},  # 0.12 M parameters with bytes
    "transformer_mini": {"width": 128, "depth": 4, "heads": 4},  # 0.8 M and 128 for each token
    "transformer_10m": {"width": 256, "depth": 7, "heads": 4},  # 9.8 M with 16,384 words
    "transformer_small": {"width": 768, "depth": 12, "heads": 12},  # GPT-2 small: 85 M and 768 for each token
}


def build(name: str, vocabulary: int, context: int) -> Transformer:
    """The network ``name``. Errors: UserError for an unknown one."""
    if name not in MODELS:
        raise UserError(f"task.model must be one of {', '.join(MODELS)}, not {name!r}")
    return Transformer(vocabulary, context, **MODELS[name])


# ---- tasks


@dataclass(frozen=True)
class Batch:
    """``tokens`` and ``labels``, the tokens that follow them: (n, context), int64. ``seed``: of its dropout."""

    tokens: Tensor
    labels: Tensor
    seed: int


class LanguageTask(SupervisedTask):
    """A text as three streams of tokens. Errors: UserError for a text that is too short, and for an unknown model.

    ``label_noise`` replaces a share of the tokens that are to be predicted in training by others, uniformly; those that
    are read stay."""

    vocabulary: int
    defaults: ClassVar[Mapping[str, Any]] = dict.fromkeys(RATES, 0.0)
    finite = RATES
    h = 0.05

    def __init__(
        self,
        device: str,
        *,
        context: int,
        parts_per_pass: int = 1,
        label_noise: float = 0.0,
        **options: Any,
    ):
        super().__init__(device, **options)
        self.context, self.parts_per_pass = context, parts_per_pass
        streams = self.read()
        for part, stream in streams.items():
            if len(stream) <= 2 * context:
                raise UserError(f"the {part} part has {len(stream)} tokens, too few for task.context={context}")
        noisy = streams["train"]
        if label_noise:
            noisy = with_label_noise(noisy.long(), label_noise, self.vocabulary, type(self).__name__).to(noisy.dtype)
        self.targets = {part: stream.to(self.device) for part, stream in {**streams, "train": noisy}.items()}
        self.streams = {**self.targets, "train": streams["train"].to(self.device)} if label_noise else self.targets
        lengths = {part: len(stream) for part, stream in streams.items()}
        self.sizes = {part: math.ceil((n - 1) / context) for part, n in lengths.items()}
        self.sizes["train"] = lengths["train"] // context - 1  # whatever the pass's offset
        if self.device.type == "cuda":
            _reproducible_attention()
        self.flops_per_example = self.count_flops()

    def read(self) -> dict[str, Tensor]:
        """Tokens of the parts ``train``, ``validation`` and ``test``, (n,), on the CPU; sets ``vocabulary``."""
        raise NotImplementedError

    def largest_warm_start(self, probe: str) -> int:
        whole = (len(self.streams["validation"]) - 1) // self.context
        return self.sizes["train"] // 2 if probe == "train" else min(self.sizes["train"], whole)

    def steps_per_epoch(self, config: Mapping[str, Any]) -> int:
        return self.sizes["train"] // self.parts_per_pass // config["batch_size"]

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        full = super().completed(config)
        if not self.steps_per_epoch(full):
            per_epoch = self.sizes["train"] // self.parts_per_pass
            raise UserError(f"batch_size={full['batch_size']} is more than the {per_epoch} windows of an epoch "
                            f"(1/{self.parts_per_pass} of a pass, task.parts_per_pass)")  # fmt: skip
        return full

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            return build(self.model, self.vocabulary, self.context).to(self.device)

    def epoch_windows(self, config: Mapping[str, Any], seed: int, epoch: int) -> tuple[int, Tensor]:
        """The first token of the first window of the pass, and the windows of the epoch after ``epoch`` in their order,
        whole batches only, on the CPU."""
        number, part = divmod(epoch, self.parts_per_pass)
        generator = torch.Generator().manual_seed(torch_seed(seed, "batches", number))
        offset = int(torch.randint(self.context, (), generator=generator))
        order = torch.randperm(self.sizes["train"], generator=generator)
        n, whole = self.sizes["train"] // self.parts_per_pass, self.steps_per_epoch(config) * config["batch_size"]
        return offset, order[part * n : part * n + whole]

    def batches(self, config: Mapping[str, Any], seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        offset, order = self.epoch_windows(config, seed, epoch)
        for chosen in order.to(self.device).split(config["batch_size"]):
            yield self.windows("train", self.group.share(chosen), offset)

    def evaluation_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The last window is filled up with tokens that do not count."""
        stream, whole = self.streams[part], (len(self.streams[part]) - 1) // self.context
        size = max(1, EVALUATION_LOGITS.get(self.device.type, 1 << 28) // (self.context * self.vocabulary))
        for chosen in torch.arange(whole, device=self.device).split(size):
            yield self.windows(part, chosen)
        rest = stream[whole * self.context :].long()
        if len(rest) > 1:
            missing = (0, self.context - len(rest) + 1)
            yield F.pad(rest[:-1], missing)[None], F.pad(rest[1:], missing, value=IGNORED)[None]

    def windows(self, part: str, chosen: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and labels (n, context), int64, of windows by number, the first one beginning at ``offset``."""
        read, predicted = self.streams[part][offset:], self.targets[part][offset + 1 :]
        cut = (0, self.context, self.context)
        return read.unfold(*cut)[chosen].long(), predicted.unfold(*cut)[chosen].long()

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        return self.windows("train", torch.arange(n, device=self.device) % self.sizes["train"])

    def forward(self, net: nn.Module, inputs: Tensor, config: Mapping[str, Any]) -> Tensor:
        return net(inputs, tuple(config[name] for name in RATES))

    def criterion(self, output: Tensor, labels: Tensor, config: Mapping[str, Any]) -> Tensor:
        return super().criterion(_logits(output), labels.flatten(), config)

    def statistics(self, output: Tensor, labels: Tensor) -> Tensor:
        """The sum of the cross-entropies, in float64, and their number."""
        loss = F.cross_entropy(_logits(output), labels.flatten(), reduction="sum").double()
        return torch.stack([loss, (labels != IGNORED).sum().double()])

    def scores(self, statistics: Tensor, n: int) -> dict[str, float]:
        total, count = statistics.tolist()
        return {"loss": total / count, "score": perplexity(total / count)}

    def kept(self, output: Tensor) -> Tensor:
        return output.new_empty(0)

    def train_score(self, kept: Sequence[Tensor], labels: Sequence[Tensor], loss: float) -> float:
        return perplexity(loss)

    def warm_batches(self, settings: "Settings", seed: int, step: int, dtype: torch.dtype) -> tuple[Batch, Batch]:
        n = settings.batch_size
        generator = torch.Generator().manual_seed(torch_seed(seed, "warm_start", step))
        order = torch.randperm(self.sizes["train"], generator=generator)
        part, others = "train", order[n : 2 * n]
        if settings.probe == "val":
            part = "validation"
            others = torch.randperm((len(self.streams[part]) - 1) // self.context, generator=generator)[:n]
        drawn = torch_seed(seed, "warm_start", step, "dropout", self.group.rank)
        first, second = (Batch(*self.windows(name, self.group.share(chosen).to(self.device)), drawn)
                         for name, chosen in (("train", order[:n]), (part, others)))  # fmt: skip
        return first, second

    def train_loss(self, net: Callable[..., Tensor], batch: Batch, config: Mapping[str, Any]) -> Tensor:
        """Of ``batch`` with its own dropout masks."""
        rates = [float(config[name]) for name in RATES]
        rates = [max(r, SMALLEST_RATE) if name in self.space else r for name, r in zip(RATES, rates, strict=True)]
        with _seeded(batch.seed, self.device):
            output = net(batch.tokens, tuple(rates))
        return self.criterion(output, batch.labels, config)

    def probe_loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        return F.cross_entropy(_logits(net(batch.tokens)), batch.labels.flatten())


class Text(LanguageTask):
    """A text file by bytes: the first 80 % to train, 10 % to validate, the last 10 % to test. Any encoding will do.

    ``text_file``: its path (~ expanded); None: the reference topics that come with Python (what ``help("while")``
    shows), about 370 kB of English and code, which differ a little from one Python release to another."""

    vocabulary = 256

    def __init__(self, device: str, *, text_file: str | None = None, **options: Any):
        self.text_file = text_file
        super().__init__(device, **options)

    def read(self) -> dict[str, Tensor]:
        content = python_topics() if self.text_file is None else _bytes(Path(os.path.expanduser(self.text_file)))
        stream = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int16))
        first, second = len(stream) * 8 // 10, len(stream) * 9 // 10
        return {"train": stream[:first], "validation": stream[first:second], "test": stream[second:]}


class WikiText(LanguageTask):
    """WikiText-103 or -2 (Merity et al. 2017) by words: ``data_files`` are the training, validation and test part.

    The vocabulary is ``vocabulary`` words, the most frequent of the training part, <unk> (for all others) and <eos>
    (the end of a line) among them. Perplexities with different vocabularies cannot be compared."""

    mixed = True

    def __init__(
        self,
        device: str,
        *,
        data_dir: str | None,
        data_files: Sequence[str],
        vocabulary: int,
        fetch: str = "",
        **options: Any,
    ):
        if len(data_files) != 3:
            raise UserError(f"task.data_files must be three files, to train, validate and test, not {len(data_files)}")
        folder = find_data(data_dir, data_files, fetch)
        assert folder is not None  # find_data has seen to it
        self.files = [folder / name for name in data_files]
        self.vocabulary = vocabulary
        super().__init__(device, **options)

    def read(self) -> dict[str, Tensor]:
        train, words = learn_vocabulary(self.files[0], self.vocabulary)
        self.vocabulary = len(words)
        dtype = np.int16 if len(words) <= 1 << 15 else np.int32
        parts = [train, *(encode(path, words) for path in self.files[1:])]
        return {name: torch.from_numpy(part.astype(dtype))
                for name, part in zip(("train", "validation", "test"), parts, strict=True)}  # fmt: skip


def perplexity(loss: float) -> float:
    """exp(loss). Errors: TrialFailed if that is not finite."""
    if not loss <= LARGEST_LOSS:
        raise TrialFailed(f"a loss of {loss} has no finite perplexity")
    return math.exp(loss)


def _logits(output: Tensor) -> Tensor:
    """(n * length, vocabulary), in fp32 at least."""
    return output.flatten(0, 1).to(torch.promote_types(output.dtype, torch.float32))


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators start from ``seed`` and are afterwards what they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _reproducible_attention() -> None:
    """Fused attention on a GPU sums its gradients in another order every time unless told not to; a resumed trial must
    equal an uninterrupted one bit for bit. ``warn_only``: what has no deterministic form may run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs, and is no need


# ---- texts


def python_topics() -> bytes:
    """The topics of Python's ``help()``, in a fixed random order (so that all parts have of everything), without the
    paragraphs that were there before (many topics repeat others). Read, not imported. Errors: UserError."""
    try:
        file = installed_file("pydoc_data", "topics.py", "")
    except UserError:
        raise UserError("this Python comes without its help topics; name any text with task.text_file=...") from None
    found = next(node.value for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(found)
    order = rng(SPLIT_SEED, "split", "topics").permutation(len(topics))
    texts = [topics[name].strip() for name in sorted(topics)]
    paragraphs = dict.fromkeys(paragraph for i in order for paragraph in texts[i].split("\n\n"))
    return "\n\n".join(paragraphs).encode()


def learn_vocabulary(file: Path, size: int) -> tuple[np.ndarray, dict[str, int]]:
    """The words of ``file`` as numbers, int32, and the number of each of the ``size`` most frequent ones, beginning
    with the most frequent; of equally frequent ones the first wins."""
    growing = _Numbered()
    stream = encode(file, growing)
    unknown = growing[UNKNOWN]
    counts = np.bincount(stream, minlength=len(growing))
    kept = np.argsort(-counts, kind="stable")[:size]
    if unknown not in kept:
        kept = np.append(kept[: size - 1], unknown)
    numbers = np.full(len(growing), np.flatnonzero(kept == unknown)[0], dtype=np.int32)
    numbers[kept] = np.arange(len(kept))
    words = list(growing)
    return numbers[stream], {words[i]: number for number, i in enumerate(kept.tolist())}


def encode(file: Path, numbers: dict[str, int]) -> np.ndarray:
    """The words of a text between white space, and <eos> for the end of each line, as ``numbers`` has them: (n,),
    int32. Words that are not there are <unk>. Errors: UserError for a file that is no text in UTF-8."""
    table = numbers if isinstance(numbers, _Numbered) else _Known(numbers)
    pieces = []
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            while chunk := lines.readlines(READ):
                words = "".join(chunk).replace("\n", f" {END_OF_LINE} ").split()
                pieces.append(np.fromiter(map(table.__getitem__, words), np.int32, len(words)))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


class _Numbered(dict[str, int]):
    """Numbers words as they come."""

    def __missing__(self, word: str) -> int:
        return self.setdefault(word, len(self))


class _Known(dict[str, int]):
    """Any other word is <unk>."""

    def __missing__(self, word: str) -> int:
        return self[UNKNOWN]


def _bytes(file: Path) -> bytes:
    """Errors: UserError for a file that cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"task.text_file={file} cannot be read: {error.strerror}") from None
