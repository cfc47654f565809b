"""PPO as CleanRL writes it (Huang et al. 2022): gymnasium's environments, a Categorical a step, minibatches."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from harness.tasks.rl import DEFAULTS, ActorCritic, NatureCnn

UNIT = "environment steps"


def units_per_step(spec: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """A step of the loop is an update block."""
    return int(spec["environments"] * spec["rollout"])


def plain_loop(
    spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, loader_workers: int
) -> Callable[[Callable[[], bool]], None]:
    """One block a call of ``finished``; ``loader_workers`` means nothing here."""
    config = {**DEFAULTS, **config}
    n, steps, atari = spec["environments"], spec["rollout"], "game" in spec
    environments = _environments(spec, n)
    net: nn.Module = NatureCnn(int(environments.single_action_space.n)) if atari else ActorCritic(4, 2)
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config["lr"], eps=1e-5)
    shape = environments.single_observation_space.shape
    observed = torch.zeros(steps, n, *shape, device=device)
    actions, log_ps, rewards, dones, values = (torch.zeros(steps, n, device=device) for _ in range(5))
    state = {"observation": _tensor(environments.reset(seed=0)[0], device), "done": torch.zeros(n, device=device)}

    def rollout() -> None:
        for step in range(steps):
            observed[step], dones[step] = state["observation"], state["done"]
            with torch.no_grad():
                logits, values[step] = net(state["observation"])
                policy = Categorical(logits=logits)
                action = policy.sample()
                log_ps[step] = policy.log_prob(action)
            actions[step] = action
            observation, reward, terminated, truncated, _ = environments.step(action.cpu().numpy())
            rewards[step] = _tensor(np.sign(reward) if atari else reward, device)
            state["observation"] = _tensor(observation, device)
            state["done"] = _tensor(np.logical_or(terminated, truncated), device)

    def advantages() -> Tensor:
        found, last = torch.zeros_like(rewards), torch.zeros(n, device=device)
        with torch.no_grad():
            next_value, next_done = net(state["observation"])[1], state["done"]
        for step in reversed(range(steps)):
            going_on = 1 - (next_done if step == steps - 1 else dones[step + 1])
            ahead = next_value if step == steps - 1 else values[step + 1]
            delta = rewards[step] + config["discount"] * ahead * going_on - values[step]
            last = delta + config["discount"] * config["gae_lambda"] * going_on * last
            found[step] = last
        return found

    def update(gained: Tensor) -> None:
        flat = [t.flatten(0, 1) for t in (observed, actions, log_ps, gained, gained + values)]
        size = n * steps // config["minibatches"]
        for _ in range(config["update_epochs"]):
            order = torch.from_numpy(np.random.default_rng().permutation(n * steps))
            for chosen in order.split(size):
                seen, action, log_p, advantage, target = (t[chosen] for t in flat)
                logits, value = net(seen)
                policy = Categorical(logits=logits)
                ratio = (policy.log_prob(action) - log_p).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                low, high = 1 - config["clip_range"], 1 + config["clip_range"]
                surrogate = torch.max(-advantage * ratio, -advantage * ratio.clamp(low, high)).mean()
                value_loss = 0.5 * (value - target).square().mean()
                bonus = config["entropy"] * policy.entropy().mean()
                optimizer.zero_grad()
                (surrogate + config["value_coefficient"] * value_loss - bonus).backward()
                nn.utils.clip_grad_norm_(net.parameters(), config["max_grad_norm"])
                optimizer.step()

    def train(finished: Callable[[], bool]) -> None:
        while not finished():
            rollout()
            update(advantages())

    return train


def _environments(spec: Mapping[str, Any], n: int) -> Any:
    if "game" in spec:
        from ale_py.vector_env import AtariVectorEnv

        return AtariVectorEnv(spec["game"], n, num_threads=torch.get_num_threads(), reward_clipping=False)
    import gymnasium

    return gymnasium.make_vec("CartPole-v1", num_envs=n, vectorization_mode="sync")


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32, device=device)
