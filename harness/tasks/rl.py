"""Reinforcement learning by PPO (Schulman et al. 2017) on vectors of environments (``environments.py``).

    task = CartPolePpo("cpu", model="mlp", max_epochs=27, environments=8, rollout=64, updates_per_epoch=4, ...)
    run = task.start({"lr": 3e-3}, seed=0)
    run.train_epoch(lambda: False)

Resource: update blocks. An epoch is ``updates_per_epoch`` of them, each a rollout of ``rollout`` steps in every
environment and ``update_epochs`` passes over it in ``minibatches`` parts. As in the usual implementations (Huang et al.
2022): generalised advantages (Schulman et al. 2016), normalised in each minibatch, clipped surrogate, value loss, an
entropy bonus, Adam with eps 1e-5, a clipped gradient, orthogonal weights. Not as usual: an episode cut off by a time
limit is bootstrapped from the value of its last observation; steps that only reset an environment are left out of the
losses; the value loss is not clipped.

The score is the mean return (of the game's own, unclipped rewards): for the scheduler ("validation") that of the last
``episodes`` training episodes, or before any has ended of the running ones; for the study ("test") that of
``environments`` episodes of their own, with actions drawn as in training, of at most ``evaluation_steps`` steps. The
validation loss is the training loss.

Everything random comes from named streams of the trial's seed, the actions of a rollout from that of the block. A run
is resumed bit for bit: CartPole keeps its state, Atari repeats at most the last 20,000 steps (``environments.py``).

Warm start: PPO's clip does nothing at the initial weights, where the ratio is 1, so the clip range stays; so does what
Adam's first update does not depend on (momentum, beta2). One rollout of the initial policy gives the update, a second
one F: surrogate and value loss, unclipped, with discount and lambda at REFERENCE (a loss whose own discount moved could
not be compared). Discount and lambda have their derivatives through the recursion of the advantages, entropy and value
coefficient enter linearly. ``ohgw.batch_size`` counts transitions, rounded up to whole steps of all environments:
``environments`` of them, or fewer for a rollout of 16 steps at least.

Hyperparameters: lr, entropy, clip_range, gae_lambda, discount, value_coefficient, max_grad_norm, update_epochs,
minibatches, momentum (beta1), beta2, wd, schedule (constant, cosine), warmup.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.context import TrialFailed, UserError
from harness.seeds import torch_seed
from harness.space import Space
from harness.tasks import models
from harness.tasks.environments import Atari, CartPole, Environments
from harness.tasks.optimizers import Adam
from harness.tasks.supervised import scheduled

if TYPE_CHECKING:
    from harness.ohgw import Problem, Settings

DEFAULTS = {
    "entropy": 0.01, "clip_range": 0.2, "gae_lambda": 0.95, "discount": 0.99, "value_coefficient": 0.5,
    "max_grad_norm": 0.5, "update_epochs": 4, "minibatches": 4, "momentum": 0.9, "beta2": 0.999, "wd": 0.0,
    "warmup": 0.0,
}  # fmt: skip
REFERENCE = {"discount": 0.99, "gae_lambda": 0.95}
DIFFERENTIABLE = ("entropy", "value_coefficient", "discount", "gae_lambda")
LINEAR = ("entropy", "value_coefficient")
EPS = 1e-5  # Adam's
SEED_BITS = 31  # an environment's seed is a C int
ANY_NUMBER = 1 << 20  # of transitions that a warm start may have: they are made as they are asked for
FLOPS_SAMPLE = 4
SHORTEST = 16  # steps of a warm start's rollout: advantages look ahead


# ---- networks: observations to logits (n, actions) and values (n,)


class ActorCritic(nn.Module):
    """Two perceptrons of two hidden layers of 64 units with tanh."""

    def __init__(self, inputs: int, actions: int, width: int = 64):
        super().__init__()
        self.actor = _perceptron(inputs, width, actions, gain=0.01)
        self.critic = _perceptron(inputs, width, 1, gain=1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(observations), self.critic(observations).squeeze(-1)

    def logits(self, observations: Tensor) -> Tensor:
        return self.actor(observations)


class NatureCnn(nn.Module):
    """The network of Mnih et al. (2015) with a head for the policy and one for the value."""

    def __init__(self, actions: int, width: int = 512):
        super().__init__()
        root = math.sqrt(2)
        self.body = nn.Sequential(
            _orthogonal(nn.Conv2d(4, 32, 8, 4), root), nn.ReLU(), _orthogonal(nn.Conv2d(32, 64, 4, 2), root), nn.ReLU(),
            _orthogonal(nn.Conv2d(64, 64, 3, 1), root), nn.ReLU(), nn.Flatten(),
            _orthogonal(nn.Linear(64 * 7 * 7, width), root), nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = _orthogonal(nn.Linear(width, actions), 0.01), _orthogonal(nn.Linear(width, 1), 1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        seen = self._seen(observations)
        return self.actor(seen), self.critic(seen).squeeze(-1)

    def logits(self, observations: Tensor) -> Tensor:
        return self.actor(self._seen(observations))

    def _seen(self, observations: Tensor) -> Tensor:
        return self.body(observations.to(self.actor.weight.dtype) / 255)


def _perceptron(inputs: int, width: int, outputs: int, gain: float) -> nn.Module:
    root = math.sqrt(2)
    return nn.Sequential(
        _orthogonal(nn.Linear(inputs, width), root), nn.Tanh(), _orthogonal(nn.Linear(width, width), root), nn.Tanh(),
        _orthogonal(nn.Linear(width, outputs), gain),
    )  # fmt: skip


def _orthogonal(layer: Any, gain: float) -> Any:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


# ---- experience


@dataclass
class Rollout:
    """T steps of n environments. ``observations`` (T + 1, n, ...), the last one where the rollout ended; all others
    (T, n): ``actions``; ``rewards``; ``terminated`` by the environment; ``ended`` for whatever reason; ``counts``:
    false where the step only reset the environment. Of the policy that acted: ``log_p`` and, (T + 1, n), ``values``."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    ended: Tensor
    counts: Tensor
    log_p: Tensor
    values: Tensor


def advantages(rollout: Rollout, discount: float | Tensor, gae_lambda: float | Tensor) -> Tensor:
    """Generalised advantages (T, n) (Schulman et al. 2016, equation 16), differentiable in both hyperparameters."""
    going_on, values = (~rollout.terminated).to(rollout.values), rollout.values
    deltas = rollout.rewards + discount * values[1:] * going_on - values[:-1]
    kept = discount * gae_lambda * (~rollout.ended).to(values)
    found, last = [], torch.zeros_like(values[0])
    for delta, decay in zip(deltas.flip(0).unbind(), kept.flip(0).unbind(), strict=True):
        last = delta + decay * last
        found.append(last)
    return torch.stack(found[::-1])


def losses(
    net: Callable[..., Any], batch: Mapping[str, Tensor], clip_range: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(surrogate, value loss, entropy), means over the transitions of ``batch`` (observations, actions, log_p,
    advantage, target, all (n, ...)); ``clip_range`` None: no clip."""
    logits, values = net(batch["observations"])
    log_p = F.log_softmax(logits, dim=-1)
    ratio = (log_p.gather(1, batch["actions"][:, None]).squeeze(1) - batch["log_p"]).exp()
    advantage = batch["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    gain = ratio * advantage
    if clip_range is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    value_loss = 0.5 * (values - batch["target"]).square().mean()
    return -gain.mean(), value_loss, -(log_p.exp() * log_p).sum(-1).mean()


def transitions(rollout: Rollout, discount: float | Tensor, gae_lambda: float | Tensor) -> dict[str, Tensor]:
    """The steps that count, as ``losses`` wants them."""
    advantage = advantages(rollout, discount, gae_lambda)
    found = {"observations": rollout.observations[:-1], "actions": rollout.actions, "log_p": rollout.log_p,
             "advantage": advantage, "target": advantage + rollout.values[:-1]}  # fmt: skip
    return {name: tensor[rollout.counts] for name, tensor in found.items()}


class Actor:
    """Environments and where they are: what a run, an evaluation, a warm start act in."""

    def __init__(self, environments: Environments, observations: np.ndarray):
        self.environments, self.observations = environments, observations
        self.fresh = np.zeros(environments.n, bool)  # whether the next step only resets an environment
        self.returns = np.zeros(environments.n)  # of the running episodes
        self.finished: list[float] = []

    @torch.no_grad()
    def play(
        self, net: Any, steps: int, generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """(actions, rewards, terminated, ended, counts), each (n,), of ``steps`` steps, as they are made."""
        kind = next(net.parameters()).dtype
        noise = torch.empty(steps, self.environments.n, self.environments.actions).exponential_(generator=generator)
        for draw in noise.to(device, kind):
            logits = net.logits(_on(self.observations, device, kind))
            actions = (logits.softmax(-1) / draw).argmax(-1).cpu().numpy()  # a race of exponentials: drawn by softmax
            yield actions, *self._step(actions)

    @torch.no_grad()
    def act(self, net: Any, steps: int, generator: torch.Generator, device: torch.device) -> Rollout:
        """A rollout of ``steps`` steps. The values and probabilities are computed of all steps at once afterwards."""
        n, kind = self.environments.n, next(net.parameters()).dtype
        seen, rows = [self.observations], []
        for row in self.play(net, steps, generator, device):
            rows.append(row)
            seen.append(self.observations)
        sides = (torch.from_numpy(np.stack(side)).to(device) for side in zip(*rows, strict=True))
        chosen, rewards, terminated, ended, counts = sides
        observations = _on(np.stack(seen), device, kind)
        logits, values = net(observations.flatten(0, 1))
        log_p = F.log_softmax(logits, dim=-1).view(steps + 1, n, -1)[:-1]
        log_p = log_p.gather(2, chosen[..., None]).squeeze(2)
        return Rollout(observations, chosen, rewards.to(kind), terminated, ended, counts, log_p,
                       values.view(steps + 1, n))  # fmt: skip

    def _step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(rewards, terminated, ended, counts) of a step, whose episodes are taken down."""
        counts = ~self.fresh
        self.observations, rewards, terminated, truncated = self.environments.step(actions)
        ended = terminated | truncated
        self.returns += rewards
        self.finished += self.returns[ended].tolist()
        self.returns[ended] = 0.0
        self.fresh = ended
        return rewards, terminated, ended, counts


def _on(array: np.ndarray, device: torch.device, kind: torch.dtype) -> Tensor:
    """Images stay bytes, everything else gets the weights' type."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return tensor if tensor.dtype == torch.uint8 else tensor.to(kind)


# ---- tasks


class PpoTask:
    """Environments, a network and a search space. Keys of the YAML that only the driver reads are ignored."""

    clipped_rewards: ClassVar[bool] = False  # whether the agent sees their signs only

    def __init__(
        self,
        device: str,
        *,
        model: str,
        max_epochs: int,
        environments: int,
        rollout: int,
        updates_per_epoch: int,
        episodes: int,
        evaluation_steps: int,
        space: str,
        spaces: Mapping[str, Any],
        schedule: str = "constant",
        **_driver: Any,
    ):
        self.device, self.model, self.max_epochs, self.schedule = torch.device(device), model, max_epochs, schedule
        self.n, self.rollout, self.updates_per_epoch = environments, rollout, updates_per_epoch
        self.episodes, self.evaluation_steps = episodes, evaluation_steps
        self.space = Space.from_spec(spaces[space])
        one = self.environments(1)
        one.close()
        self.actions, self.dtype = one.actions, one.dtype
        self.observed: tuple[int, ...] = one.shape
        self.count_flops()

    def environments(self, n: int) -> Environments:
        """``n`` of them, not yet reset."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """The network, initialised from torch's global generator. Errors: UserError for an unknown one."""
        raise NotImplementedError

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            return self.build().to(self.device)

    def actor(self, n: int, seed: int, *name: str | int) -> Actor:
        """``n`` environments at their beginning, seeded by the stream ``name``."""
        environments = self.environments(n)
        return Actor(environments, environments.reset(environment_seed(seed, *name)))

    def largest_warm_start(self, probe: str) -> int:
        return ANY_NUMBER

    def start(self, config: Mapping[str, Any], seed: int) -> "PpoRun":
        return PpoRun(self, config, seed)

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with all defaults. Errors: UserError for an unknown schedule, too many minibatches."""
        full = {**DEFAULTS, "schedule": self.schedule, **config}
        if full["schedule"] not in ("constant", "cosine"):
            raise UserError(f"schedule must be constant or cosine, not {full['schedule']!r}")
        if full["minibatches"] > self.n * self.rollout:
            steps = self.n * self.rollout
            raise UserError(f"minibatches={full['minibatches']} is more than the {steps} steps of a block")
        return full

    def lr_factor(self, config: Mapping[str, Any], epoch: int, update: int) -> float:
        time = epoch + update / self.updates_per_epoch
        return scheduled(config["schedule"], config["warmup"], time, self.max_epochs, 1 / self.updates_per_epoch)

    def shown(self, rollout: Rollout) -> Rollout:
        """The rollout with the rewards that the agent learns from."""
        if self.clipped_rewards:
            rollout.rewards = rollout.rewards.sign()
        return rollout

    def count_flops(self) -> None:
        """FLOPs of a forward pass and of a training step per observation."""
        from harness.ohgw.cost import count_flops

        net = self.network(0)
        observations = torch.zeros(FLOPS_SAMPLE, *self.observed, dtype=self.dtype, device=self.device)

        def train() -> None:
            logits, values = net(observations)
            (logits.sum() + values.sum()).backward()

        self.flops_forward = count_flops(lambda: net(observations)) // FLOPS_SAMPLE
        self.flops_train = count_flops(train) // FLOPS_SAMPLE


class CartPolePpo(PpoTask):
    """CartPole-v1 (Barto et al. 1983): returns from about 9 to 500."""

    def environments(self, n: int) -> Environments:
        return CartPole(n)

    def build(self) -> nn.Module:
        if self.model != "mlp":
            raise UserError(f"task.model must be mlp, not {self.model!r}")
        return ActorCritic(self.observed[0], self.actions)


class AtariPpo(PpoTask):
    """A game of the Arcade Learning Environment, learnt from the signs of its rewards."""

    clipped_rewards = True

    def __init__(self, device: str, *, game: str, **options: Any):
        self.game = game
        super().__init__(device, **options)

    def environments(self, n: int) -> Environments:
        return Atari(n, self.game, torch.get_num_threads())

    def build(self) -> nn.Module:
        if self.model != "nature_cnn":
            raise UserError(f"task.model must be nature_cnn, not {self.model!r}")
        return NatureCnn(self.actions)


def environment_seed(seed: int, *name: str | int) -> int:
    return torch_seed(seed, "environment", *name) >> (63 - SEED_BITS)


class PpoRun:
    """One configuration in training."""

    def __init__(self, task: PpoTask, config: Mapping[str, Any], seed: int):
        torch.backends.cudnn.deterministic = True
        self.task, self.seed, self.epoch = task, seed, 0
        self.net = task.network(seed)
        self._actor: Actor | None = None  # begins with the first rollout
        self.returns: list[float] = []  # of the last training episodes
        self.loss = 0.0
        self.reconfigure(config)

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Train with ``config`` from now on; only before epoch 1, since it forgets the optimiser's state."""
        self.config = self.task.completed(config)
        self.optimizer = Adam(self.net, {**self.config, "clip": self.config["max_grad_norm"], "eps": EPS})

    @property
    def actor(self) -> Actor:
        if self._actor is None:
            self._actor = self.task.actor(self.task.n, self.seed, "train")
        return self._actor

    def train_epoch(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """An epoch's blocks; None (and a run to be thrown away) if ``should_stop`` said so before one of them.

        Errors: TrialFailed when the loss is not finite.
        """
        task, before, found = self.task, len(self.returns), []
        self.net.train()
        for update in range(task.updates_per_epoch):
            if should_stop():
                return None
            self.optimizer.lr = self.config["lr"] * task.lr_factor(self.config, self.epoch, update)
            found.append(self._block(self.epoch * task.updates_per_epoch + update))
        self.epoch += 1
        self.loss = float(torch.stack(found).mean())
        if not math.isfinite(self.loss):
            raise TrialFailed(f"training loss is {self.loss}")
        new = self.returns[before:] or self.actor.returns.tolist()
        self.returns = self.returns[-task.episodes :]
        steps = task.updates_per_epoch * task.rollout * task.n
        flops = steps * (2 * task.flops_forward + self.config["update_epochs"] * task.flops_train)
        return {"train_loss": self.loss, "train_score": float(np.mean(new)), "flops": flops}

    def _block(self, number: int) -> Tensor:
        """A rollout and the updates on it; their mean loss."""
        task, config = self.task, self.config
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "actions", number))
        rollout = task.shown(self.actor.act(self.net, task.rollout, generator, task.device))
        self.returns += self.actor.finished
        self.actor.finished = []
        batch = transitions(rollout, config["discount"], config["gae_lambda"])
        generator.manual_seed(torch_seed(self.seed, "batches", number))
        found = []
        for _ in range(config["update_epochs"]):
            order = torch.randperm(len(batch["actions"]), generator=generator).to(task.device)
            found += [self._update({name: tensor[part] for name, tensor in batch.items()})
                      for part in order.tensor_split(config["minibatches"]) if len(part)]  # fmt: skip
        return torch.stack(found).mean()

    def _update(self, batch: Mapping[str, Tensor]) -> Tensor:
        config = self.config
        surrogate, value_loss, entropy = losses(self.net, batch, config["clip_range"])
        loss = surrogate + config["value_coefficient"] * value_loss - config["entropy"] * entropy
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.clip_gradients()
        self.optimizer.step()
        return loss.detach()

    def evaluate(self, part: str) -> dict[str, float]:
        """The mean return of the last training episodes, or of episodes of their own (see the module's docstring)."""
        if part == "validation":
            known = self.returns or self.actor.returns.tolist()
            return {"loss": self.loss, "score": float(np.mean(known))}
        return {"loss": self.loss, "score": self._tested()}

    def _tested(self) -> float:
        """The mean over environments of the return of the first episode in each."""
        task = self.task
        actor = task.actor(task.n, self.seed, "test", self.epoch)
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "test", self.epoch))
        returns, running = np.zeros(task.n), np.ones(task.n, bool)
        for _, rewards, _, ended, _ in actor.play(self.net, task.evaluation_steps, generator, task.device):
            returns += np.where(running, rewards, 0.0)
            running &= ~ended
            if not running.any():
                break
        actor.environments.close()
        return float(returns.mean())

    def problem(self, settings: "Settings") -> "Problem":
        """What OHGW needs of this run at its initial weights: rollouts of environments of their own."""
        from harness.ohgw import Problem, UpdateRule

        task, config = self.task, self.config

        def train_loss(net: Callable[..., Any], rollout: Rollout, z: Mapping[str, Tensor]) -> Tensor:
            now = {**config, **z}
            surrogate, value_loss, entropy = losses(
                net, transitions(rollout, now["discount"], now["gae_lambda"]), config["clip_range"]
            )
            return surrogate + now["value_coefficient"] * value_loss - now["entropy"] * entropy

        def probe_loss(net: Callable[..., Any], rollout: Rollout) -> Tensor:
            surrogate, value_loss, _ = losses(net, transitions(rollout, **REFERENCE), None)
            return surrogate + DEFAULTS["value_coefficient"] * value_loss

        def draw(step: int) -> tuple[Rollout, Rollout]:
            first, second = (self._experience(settings.batch_size, "warm_start", step, part) for part in (0, 1))
            return first, second

        decayed = {name for name, parameter in self.net.named_parameters() if models.decays(parameter)}
        clip = "max_grad_norm" if "max_grad_norm" in task.space else config["max_grad_norm"]
        return Problem(
            model=self.net,
            train_loss=train_loss,
            probe_loss=probe_loss,
            draw=draw,
            update=UpdateRule("adam", clip=clip, eps=EPS),
            decayed=decayed.__contains__,
            differentiable=tuple(name for name in DIFFERENTIABLE if name in task.space),
            linear=tuple(name for name in LINEAR if name in task.space),
        )

    def _experience(self, transitions: int, *name: str | int) -> Rollout:
        """A rollout of the present policy in new environments, of at least so many transitions."""
        task = self.task
        n = max(1, min(task.n, transitions // SHORTEST))
        actor = task.actor(n, self.seed, *name)
        generator = torch.Generator().manual_seed(torch_seed(self.seed, "actions", *name))
        rollout = actor.act(self.net, math.ceil(transitions / n), generator, task.device)
        actor.environments.close()
        return task.shown(rollout)

    def state_dict(self) -> dict[str, Any]:
        """Weights, the optimiser, the environments and the returns; hyperparameters belong to the configuration."""
        actor = self.actor
        return {"epoch": self.epoch, "net": self.net.state_dict(), "optimizer": self.optimizer.state,
                "environments": actor.environments.state(),
                "fresh": torch.from_numpy(actor.fresh.copy()), "running": torch.from_numpy(actor.returns.copy()),
                "returns": list(self.returns), "loss": self.loss}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.net.load_state_dict(state["net"])
        for tensor, saved in zip(self.optimizer.state, state["optimizer"], strict=True):
            tensor.copy_(saved)
        environments = self.task.environments(self.task.n)
        self._actor = Actor(environments, environments.restore(state["environments"]))
        self._actor.fresh, self._actor.returns = state["fresh"].numpy().copy(), state["running"].numpy().copy()
        self.returns, self.loss = list(state["returns"]), state["loss"]
