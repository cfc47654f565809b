"""Networks on tables: classification and regression of any mix of numeric and categorical columns (``tables.py``).

Numeric columns are standardised by the training part; a missing number is its median, and says so in an input of its
own; a categorical column is embedded, missing or new levels together. All rows are one tensor on the device, and an
epoch's batches are views of few gathers: on a small table an epoch costs little more than its steps.

Hyperparameters besides those of every supervised task, all with the default 0:

    noise, scaling  standard deviation of Gaussian noise added to, and multiplied with, the standardised numeric inputs:
                    x (1 + scaling * e1) + noise * e2
    mixup           in [0, 1]: an example is mixed with another of its batch, (1-a) x + a x' after embedding and the
                    loss alike, a uniform in [0, mixup/2] (Zhang et al. 2018, but with draws that can be scaled)
    dropout         share of hidden units dropped

A warm start moves noise, scaling and mixup by gradients (the draws are parameters of the loss), as it does
label_smoothing; it runs without dropout, so that dropout stays where it is, and so does warmup. ``label_smoothing`` of
a regression moves the target towards its mean by that share; the loss is then quadratic in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.seeds import torch_seed
from harness.tasks import tables
from harness.tasks.supervised import SupervisedTask, smoothed_cross_entropy

if TYPE_CHECKING:
    from harness.ohgw import Settings

WIDTH = 128
EMBEDDING = 16  # dimensions at most: half the number of levels
CHUNK = 1 << 20  # numbers gathered at once
EVALUATION_BATCH = 4096


@dataclass(frozen=True)
class Batch:
    """``inputs`` (n, inputs) and ``target`` (n,); for training also ``added``, ``multiplied`` (n, numeric columns)
    standard normal, or None where the hyperparameter is 0, and, for mixup, ``partner`` (n, inputs), ``partner_target``
    (n,) and ``share`` (n,) uniform in [0, 1/2]."""

    inputs: Tensor
    target: Tensor
    added: Tensor | None = None
    multiplied: Tensor | None = None
    partner: Tensor | None = None
    partner_target: Tensor | None = None
    share: Tensor | None = None


class TableNet(nn.Module):
    """Two hidden layers or blocks of WIDTH units with LayerNorm, on numbers and embedded levels.

    ``residual``: x + W2 relu(W1 norm(x)), as Gorishniy et al. (2021) have it, with LayerNorm in the place of BatchNorm;
    otherwise relu(norm(W x))."""

    def __init__(self, numeric: int, levels: Sequence[int], outputs: int, residual: bool):
        super().__init__()
        sizes = [min(EMBEDDING, (count + 1) // 2) for count in levels]
        self.numeric, self.residual = numeric, residual
        self.embeddings = nn.ModuleList(nn.Embedding(*size) for size in zip(levels, sizes, strict=True))
        inputs = numeric + sum(sizes)
        self.stem = nn.Linear(inputs, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3 if residual else 2))
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4 if residual else 1))
        self.head = nn.Linear(WIDTH, outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(
        self, inputs: Tensor, partner: Tensor | None = None, share: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """(n, outputs) of ``inputs`` (n, numeric + levels), mixed with ``share`` (n,) of ``partner``."""
        x = self.embedded(inputs)
        if partner is not None and share is not None:
            x = torch.lerp(x, self.embedded(partner), share.unsqueeze(1).to(x.dtype))
        rate = dropout if self.training else 0.0
        x = self.stem(x)
        if not self.residual:
            x = dropped(F.relu(self.norms[0](x)), rate)
            return self.head(dropped(F.relu(self.norms[1](self.hidden[0](x))), rate))
        for i in range(2):
            h = dropped(F.relu(self.hidden[2 * i](self.norms[i](x))), rate)
            x = x + self.hidden[2 * i + 1](h)
        return self.head(F.relu(self.norms[2](x)))

    def embedded(self, inputs: Tensor) -> Tensor:
        """The numeric inputs and the embeddings of the levels, whose numbers are the last columns."""
        if not self.embeddings:
            return inputs
        levels = inputs[:, self.numeric :].long().unbind(1)
        words = [embedding(level) for embedding, level in zip(self.embeddings, levels, strict=True)]
        return torch.cat([inputs[:, : self.numeric], *words], dim=1)


def dropped(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate > 0 else x


class TabularTask(SupervisedTask):
    """A table (``tables.load``), all on the device. ``score``: task.metric; every evaluation also has macro-F1 (or
    accuracy, where F1 is the score), for a regression the root mean squared error in the target's units."""

    defaults: ClassVar[Mapping[str, Any]] = {"noise": 0.0, "scaling": 0.0, "mixup": 0.0, "dropout": 0.0}
    differentiable = ("label_smoothing", "noise", "scaling", "mixup")

    def __init__(
        self,
        device: str,
        *,
        data: str,
        metric: str,
        target: str | None = None,
        kind: str = "auto",
        header: bool = True,
        categorical: Sequence[str] = (),
        data_dir: str | None = None,
        label_noise: float = 0.0,
        **options: Any,
    ):
        super().__init__(device, **options)
        self.table = tables.load(data, metric=metric, target=target, kind=kind, header=header, categorical=categorical,
                                 data_dir=data_dir, label_noise=label_noise)  # fmt: skip
        if not self.table.classes:
            self.linear = ()  # type: ignore[misc]
        self.inputs = {name: x.to(self.device) for name, x in inputs(self.table).items()}
        self.targets = {name: part.target.to(self.device) for name, part in self.table.parts.items()}
        self.sizes = {name: len(target) for name, target in self.targets.items()}
        self.levels = tuple(self.table.levels.values())
        self.numeric = self.inputs["train"].shape[1] - len(self.levels)
        self.completed({})  # the batch size must be possible
        self.flops_per_example = self.count_flops()

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            net = TableNet(self.numeric, self.levels, self.table.outputs, residual=self.model == "resmlp")
        return net.to(self.device)

    def batches(self, config: Mapping[str, Any], seed: int, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Gathered and augmented many at a time; answers as ``criterion`` takes them."""
        size, order = config["batch_size"], self.epoch_order(config, seed, epoch)
        partners = order.view(-1, size).roll(1, 1).flatten()  # the order is random: as good as a random permutation
        chunk = max(1, CHUNK // (size * self.inputs["train"].shape[1])) * size
        streams = {name: generator(seed, name, epoch) for name in ("noise", "scaling", "mixup") if config[name]}
        for chosen, partner in zip(order.split(chunk), partners.split(chunk), strict=True):
            given, answers = self.augmented(self.drawn(chosen, partner, streams), config)
            pieces = zip(*(tensor.split(size) for tensor in (*given, *answers)), strict=True)
            for piece in pieces:
                mine = [self.group.share(tensor) for tensor in piece]
                yield tuple(mine[: len(given)]), tuple(mine[len(given) :])

    def drawn(
        self, chosen: Tensor, partner: Tensor, streams: Mapping[str, torch.Generator], dtype: torch.dtype | None = None
    ) -> Batch:
        """Training examples with draws, from CPU generators, for each hyperparameter that has a stream."""
        inputs, targets = self.inputs["train"], self.targets["train"]
        dtype = dtype or inputs.dtype

        def normal(name: str) -> Tensor | None:
            if name not in streams:
                return None
            return torch.randn(len(chosen), self.numeric, generator=streams[name]).to(self.device, dtype)

        batch = {"added": normal("noise"), "multiplied": normal("scaling")}
        if "mixup" in streams:
            share = torch.rand(len(chosen), generator=streams["mixup"]).to(self.device, dtype) / 2
            where = partner.to(self.device)
            batch |= {"partner": inputs[where].to(dtype), "partner_target": self.target(targets[where], dtype),
                      "share": share}  # fmt: skip
        where = chosen.to(self.device)
        return Batch(inputs[where].to(dtype), self.target(targets[where], dtype), **batch)

    def target(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Classes as they are, values in the network's precision."""
        return target if self.table.classes else target.to(dtype)

    def augmented(self, batch: Batch, config: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The network's arguments and the criterion's answers."""
        x = batch.inputs
        if batch.added is not None or batch.multiplied is not None:
            numbers, words = x[:, : self.numeric], x[:, self.numeric :]
            if batch.multiplied is not None:
                numbers = numbers * (1 + config["scaling"] * batch.multiplied)
            if batch.added is not None:
                numbers = numbers + config["noise"] * batch.added
            x = torch.cat([numbers, words], dim=1)
        if batch.partner is None:
            return (x,), (batch.target,)
        assert batch.partner_target is not None
        assert batch.share is not None
        share = config["mixup"] * batch.share
        return (x, batch.partner, share), (batch.target, batch.partner_target, share)

    def forward(self, net: nn.Module, inputs: tuple[Tensor, ...], config: Mapping[str, Any]) -> Tensor:
        return net(*inputs, dropout=config["dropout"])

    def criterion(self, output: Tensor, labels: Any, config: Mapping[str, Any]) -> Tensor:
        """Cross-entropy with label smoothing, or the mean squared error; ``labels``: (target,), or for mixup (target,
        the partner's target, the partner's share)."""
        target, *mixed = labels
        smoothing = config["label_smoothing"]
        if not self.table.classes:
            target = torch.lerp(target, mixed[0], mixed[1]) if mixed else target
            return F.mse_loss(output.squeeze(1), (1 - smoothing) * target)
        if not mixed:
            return smoothed_cross_entropy(output, target, smoothing)
        partner, share = mixed
        log_p = F.log_softmax(output, dim=1)
        nll = torch.lerp(F.nll_loss(log_p, target, reduction="none"), F.nll_loss(log_p, partner, reduction="none"),
                         share.to(log_p.dtype))  # fmt: skip
        return (1 - smoothing) * nll.mean() - smoothing * log_p.mean()

    def evaluation_batches(self, part: str) -> Iterator[tuple[Tensor, Tensor]]:
        size = min(EVALUATION_BATCH, -(-self.sizes[part] // self.group.size))  # a piece for every process
        yield from zip(self.inputs[part].split(size), self.targets[part].split(size), strict=True)

    def sample(self, n: int) -> tuple[Any, Any]:
        return (self.inputs["train"][:n],), (self.targets["train"][:n],)

    def warm_batches(self, settings: "Settings", seed: int, step: int, dtype: torch.dtype) -> tuple[Batch, Batch]:
        n, source = settings.batch_size, generator(seed, "warm_start", step)
        order = torch.randperm(self.sizes["train"], generator=source)
        names = [name for name in ("noise", "scaling", "mixup") if name in self.space]
        streams = {name: generator(seed, f"warm_{name}", step) for name in names}
        first = self.drawn(order[:n], order[:n].roll(1), streams, dtype)
        part, chosen = "train", order[n : 2 * n]
        if settings.probe != "train":
            part, chosen = "validation", torch.randperm(self.sizes["validation"], generator=source)[:n]
        chosen = self.group.share(chosen).to(self.device)
        second = Batch(self.inputs[part][chosen].to(dtype), self.target(self.targets[part][chosen], dtype))
        return self.shared(first), second

    def shared(self, batch: Batch) -> Batch:
        """This process's share."""
        shares: Any = {name: x if x is None else self.group.share(x) for name, x in vars(batch).items()}
        return Batch(**shares)

    def train_loss(self, net: Callable[..., Tensor], batch: Batch, config: Mapping[str, Any]) -> Tensor:
        """Without dropout."""
        given, answers = self.augmented(batch, config)
        return self.criterion(net(*given), answers, config)

    def probe_loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        output = net(batch.inputs)
        if self.table.classes:
            return F.cross_entropy(output, batch.target)
        return F.mse_loss(output.squeeze(1), batch.target)

    def statistics(self, output: Tensor, labels: Tensor) -> Tensor:
        return self.table.statistics(output, labels)

    def scores(self, statistics: Tensor, n: int) -> dict[str, float]:
        return self.table.scores(statistics, n)

    def train_score(self, kept: Sequence[Tensor], labels: Sequence[Any], loss: float) -> float:
        """On augmented examples, with the target of the greater share."""
        outputs, targets = torch.cat(list(kept)), torch.cat([target for target, *_ in labels])
        total = self.group.total(self.table.statistics(outputs.float(), targets))
        return self.table.scores(total, len(targets) * self.group.size)["score"]


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator of the stream ``name``."""
    return torch.Generator().manual_seed(torch_seed(seed, *name))


def inputs(table: tables.Table) -> dict[str, Tensor]:
    """What the network sees of each part, (n, inputs) float32: standardised numbers, 1 for each missing number of a
    column that has them in training, the numbers of levels. A constant column is 0."""
    train = table.parts["train"].numeric
    median, present = train.nanmedian(0).values.nan_to_num(), ~train.isnan()
    mean = train.nanmean(0).nan_to_num()
    std = (train - mean).square().nanmean(0).nan_to_num().sqrt()
    std = torch.where(std > 0, std, torch.ones_like(std))
    gaps = ~present.all(0)

    def encoded(part: tables.Part) -> Tensor:
        x = torch.where(part.numeric.isnan(), median, part.numeric)
        return torch.cat([(x - mean) / std, part.numeric.isnan()[:, gaps], part.levels], dim=1).float()

    return {name: encoded(part) for name, part in table.parts.items()}
