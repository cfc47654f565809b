"""Many copies of an environment at a time, whose state can be kept: CartPole and the Atari games.

    environments = CartPole(8)
    observations = environments.reset(seed)                          # (n, ...)
    observations, rewards, terminated, truncated = environments.step(actions)
    state = environments.state()                                     # tensors and texts
    observations = CartPole(8).restore(state)                        # goes on bit for bit

An episode that has ended is reset by the step after its last one (gymnasium's ``AutoresetMode.NEXT_STEP``): that step
ignores its action, gives no reward, and its observation is the first of the next episode.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from backends.context import UserError
from harness.seeds import torch_seed

INSTALL = "pip install 'ohgw-harness[rl]'"
FRAMES = 4  # of an Atari game in a step
MAX_STEPS = 15_000  # of an Atari episode: 17 minutes of play
RESEED = 5_000  # steps
Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Environments(Protocol):
    """``n`` environments with ``actions`` discrete actions; observations (n, *``shape``) of ``dtype``."""

    n: int
    actions: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def reset(self, seed: int) -> np.ndarray: ...
    def step(self, actions: np.ndarray) -> Step: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> np.ndarray: ...
    def close(self) -> None: ...


class CartPole:
    """gymnasium's CartPole-v1, all computed at once. Errors: UserError if gymnasium is not installed."""

    dtype = torch.float32
    shape: tuple[int, ...] = (4,)
    actions = 2

    def __init__(self, n: int):
        _imported("gymnasium")
        from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

        self.n, self._env = n, CartPoleVectorEnv(n, max_episode_steps=500)

    def reset(self, seed: int) -> np.ndarray:
        return self._env.reset(seed=seed)[0]

    def step(self, actions: np.ndarray) -> Step:
        observations, rewards, terminated, truncated, _ = self._env.step(actions)
        return observations, rewards, terminated, truncated

    def state(self) -> dict[str, Any]:
        """Positions, steps, which are to be reset, and the generator, as JSON."""
        env: Any = self._env
        return {"state": torch.from_numpy(env.state.copy()), "steps": torch.from_numpy(env.steps.copy()),
                "done": torch.from_numpy(env.prev_done.copy()),
                "generator": json.dumps(env.np_random.bit_generator.state)}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> np.ndarray:
        env: Any = self._env
        env.reset(seed=0)  # it wants to have been
        env.state, env.steps = state["state"].numpy().copy(), state["steps"].numpy().copy()
        env.prev_done = state["done"].numpy().copy()
        env.np_random.bit_generator.state = json.loads(state["generator"])
        return env.state.T.astype(np.float32)

    def close(self) -> None:
        self._env.close()


class Atari:
    """A game of the Arcade Learning Environment in its native vector environment (Mnih et al. 2015: 84 x 84 grey
    pixels, 4 frames stacked, every 4th seen; no sticky actions, whole episodes, rewards as the game gives them).

    It cannot save its state. It is deterministic: ``restore`` repeats the actions since the last seeded reset of each
    environment. An environment gets a new seed where an episode ends, if ``RESEED`` steps or more have passed since the
    last one (it takes as long as 200 steps); so at most ``RESEED + MAX_STEPS`` steps, 20,000, are repeated, and no
    episode is cut off for that.

    Errors: UserError if ale-py is not installed or has no such game."""

    dtype = torch.uint8
    shape: tuple[int, ...] = (4, 84, 84)

    def __init__(self, n: int, game: str, threads: int = 0):
        _imported("ale_py")
        from ale_py import roms
        from ale_py.vector_env import AtariVectorEnv

        known = sorted(roms.get_all_rom_ids())
        if game not in known:
            raise UserError(f"task.game must be one of {', '.join(known)}, not {game!r}")
        self.n = n
        self._env = AtariVectorEnv(game, n, num_threads=threads, reward_clipping=False, noop_max=30,
                                   max_num_frames_per_episode=MAX_STEPS * FRAMES)  # fmt: skip
        self.actions = int(self._env.single_action_space.n)  # type: ignore[attr-defined]
        self.reset(0)

    def reset(self, seed: int) -> np.ndarray:
        self._seed = seed
        self._seeding = np.zeros(self.n, np.int64)  # how often an environment has got a new seed
        self._age = np.zeros(self.n, np.int64)  # steps since
        self._ended = np.zeros(self.n, bool)  # whether the running episode has
        self._taken: list[np.ndarray] = []  # the last actions of all, as many as the largest age
        return self._begun(~self._ended)

    def step(self, actions: np.ndarray) -> Step:
        new = self._ended & (self._age >= RESEED)
        observations, rewards, terminated, truncated, _ = self._env.step(actions)
        self._taken.append(actions.astype(np.uint8))
        self._age += 1
        self._ended = terminated | truncated
        if new.any():
            self._seeding[new] += 1
            self._age[new] = 0
            del self._taken[: len(self._taken) - self._age.max()]
            observations = self._begun(new)
        return observations, rewards.astype(np.float32), terminated, truncated

    def state(self) -> dict[str, Any]:
        """The seed; of every environment how often it got a new one, the steps since, whether its episode has ended;
        the last actions of all, (steps, n)."""
        taken = np.stack(self._taken) if self._taken else np.empty((0, self.n), np.uint8)
        return {"seed": self._seed, "seeding": torch.from_numpy(self._seeding.copy()),
                "age": torch.from_numpy(self._age.copy()), "ended": torch.from_numpy(self._ended.copy()),
                "actions": torch.from_numpy(taken)}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> np.ndarray:
        self._seed, self._taken = state["seed"], list(state["actions"].numpy().copy())
        self._seeding, self._age, self._ended = (state[key].numpy().copy() for key in ("seeding", "age", "ended"))
        observations = np.empty(0)
        for left in range(len(self._taken), -1, -1):
            if (due := self._age == left).any():  # what others do before is of no consequence
                observations = self._begun(due)
            if left:
                observations = self._env.step(self._taken[-left].astype(np.int64))[0]
        return observations

    def close(self) -> None:
        self._env.close()

    def _begun(self, which: np.ndarray) -> np.ndarray:
        """The observations of all, once those in ``which`` (n,) have been reset with their seeds."""
        numbers = [(i, int(self._seeding[i])) for i in which.nonzero()[0].tolist()]
        seeds = np.array([torch_seed(self._seed, "environment", i, k) >> 32 for i, k in numbers])  # ALE's are C ints
        options = None if which.all() else {"reset_mask": which}
        return self._env.reset(seed=seeds, options=options)[0]


def _imported(module: str) -> None:
    """Errors: UserError that says how to install it."""
    try:
        __import__(module)
    except ImportError:
        raise UserError(f"this task needs {module}; install it with: {INSTALL}") from None
