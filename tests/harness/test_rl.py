"""PPO tasks: environments that can be kept, advantages, the loss, runs, and the problem of a warm start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from backends.context import TrialFailed, UserError
from harness.ohgw import Settings, lookahead, lookahead_objective
from harness.ohgw.coordinates import Coordinate
from harness.seeds import rng, torch_seed
from harness.space import Float, Space
from harness.tasks import environments, load_task, rl
from harness.tasks.environments import Atari, CartPole
from scripts.plain_loops import rl as plain_loop
from tests.conftest import ROOT, read_lines
from tests.harness.test_tasks import never, resume, same

pytest.importorskip("gymnasium")
pytest.importorskip("ale_py")
CONF = Path(__file__).parents[2] / "conf" / "task"
CONFIG = {"lr": 2.5e-3, "entropy": 0.01, "clip_range": 0.2, "gae_lambda": 0.95, "discount": 0.98}
SMALL = {
    "cartpole_ppo": {"rollout": 32, "updates_per_epoch": 2},
    "atari_ppo": {"rollout": 8, "updates_per_epoch": 2, "environments": 2, "evaluation_steps": 20},
}


def spec(name: str, **changes: Any) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())["task"] | SMALL[name] | changes


def build(name: str = "cartpole_ppo", **changes: Any) -> Any:
    return load_task(spec(name, **changes), "cpu")


# environments


def walk(made: Any, observations: np.ndarray, steps: int, generator: np.random.Generator) -> list[Any]:
    """What ``steps`` random actions lead to."""
    return [made.step(generator.integers(0, made.actions, made.n)) for _ in range(steps)]


@pytest.mark.parametrize("make", [lambda: CartPole(3), lambda: Atari(2, "pong", 1)], ids=["cartpole", "atari"])
def test_restored_environments_go_on_bit_for_bit(make):
    first = make()
    walk(first, first.reset(7), 60, np.random.default_rng(0))  # beyond CartPole's first episodes
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state().items()}
    second = make()
    observations = second.restore(state)
    for mine, other in zip(
        *(walk(e, observations, 40, np.random.default_rng(1)) for e in (first, second)), strict=True
    ):
        for a, b in zip(mine, other, strict=True):
            assert np.array_equal(a, b)
    assert same(first.state(), second.state())


def test_atari_repeats_no_more_than_since_an_end_of_an_episode(monkeypatch):
    monkeypatch.setattr(environments, "RESEED", 100)
    made, generator = Atari(3, "breakout", 1), np.random.default_rng(0)
    observations, fresh, firsts = made.reset(5), np.zeros(3, bool), list[bytes]()
    for _ in range(500):
        previous = observations
        observations, rewards, terminated, truncated = made.step(generator.integers(0, made.actions, 3))
        ended = terminated | truncated
        assert not rewards[fresh].any()
        assert not ended[fresh].any()
        assert np.array_equal(observations[~fresh, 0], previous[~fresh, 1])  # the other games' frames move on
        firsts += [observation.tobytes() for observation in observations[fresh]]
        fresh = ended
    assert len(firsts) > 5
    assert len(set(firsts)) > 1
    assert made.state()["seeding"].min() > 0
    state = made.state()
    assert len(state["actions"]) == int(state["age"].max()) < 400
    restored = Atari(3, "breakout", 1)
    assert np.array_equal(restored.restore(state), observations)
    assert same(restored.state(), state)


def test_atari_episodes_are_limited(monkeypatch):
    monkeypatch.setattr(environments, "MAX_STEPS", 30)
    monkeypatch.setattr(environments, "RESEED", 0)
    made = Atari(2, "pong", 1)
    rows = walk(made, made.reset(0), 90, np.random.default_rng(0))
    assert sum(int(row[3].sum()) for row in rows) >= 4
    assert not any(row[2].any() for row in rows)
    assert len(made.state()["actions"]) <= 31


@pytest.mark.parametrize("make", [lambda: CartPole(3), lambda: Atari(2, "breakout", 1)], ids=["cartpole", "atari"])
def test_a_seed_decides_everything(make):
    runs = []
    for _ in range(2):
        made = make()
        runs.append([made.reset(3), *(row[0] for row in walk(made, made.reset(3), 10, np.random.default_rng(0)))])
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(a, b)


def test_a_game_that_is_not_there_is_a_users_error():
    with pytest.raises(UserError, match=r"task\.game must be one of .*pong.*, not 'tetris_attack'"):
        Atari(1, "tetris_attack")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r"gymnasium; install it with: pip install 'ohgw-harness\[rl\]'"):
        CartPole(1)


def test_importing_the_task_imports_no_environment():
    code = (
        "import harness.tasks.rl, sys; print([m for m in ('gymnasium', 'ale_py', 'torch._dynamo') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"


# advantages and losses


def test_advantages_are_those_of_their_definition():
    generator = torch.Generator().manual_seed(0)
    steps, n, discount, gae_lambda = 12, 3, 0.9, 0.8
    terminated = torch.rand(steps, n, generator=generator) < 0.2
    ended = terminated | (torch.rand(steps, n, generator=generator) < 0.1)
    rewards, values = torch.rand(steps, n, generator=generator), torch.rand(steps + 1, n, generator=generator)
    rollout = rl.Rollout(
        torch.empty(0), torch.empty(0), rewards, terminated, ended, ~terminated, torch.empty(0), values
    )
    found = rl.advantages(rollout, discount, gae_lambda)
    for i in range(n):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                ahead = 0.0 if terminated[k, i] else float(values[k + 1, i])
                expected += weight * (float(rewards[k, i]) + discount * ahead - float(values[k, i]))
                if ended[k, i]:
                    break
                weight *= discount * gae_lambda
            assert float(found[t, i]) == pytest.approx(expected, abs=1e-5)


def test_with_lambda_1_advantages_and_values_are_discounted_returns():
    steps = 5
    rewards, values = torch.ones(steps, 1), torch.full((steps + 1, 1), 3.0)
    no = torch.zeros(steps, 1, dtype=torch.bool)
    last = no.clone()
    last[-1] = True
    rollout = rl.Rollout(torch.empty(0), torch.empty(0), rewards, last, last, ~no, torch.empty(0), values)
    returns = (rl.advantages(rollout, 0.5, 1.0) + 3.0).flatten().tolist()
    assert returns == pytest.approx([1.9375, 1.875, 1.75, 1.5, 1.0])


def test_the_clip_stops_the_gain_beyond_its_range():
    net = rl.ActorCritic(4, 2)
    observations, actions = torch.randn(64, 4), torch.randint(2, (64,))
    logits, values = net(observations)
    log_p = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1).detach()
    batch = {"observations": observations, "actions": actions, "advantage": torch.randn(64), "target": values.detach()}
    near, far = {**batch, "log_p": log_p}, {**batch, "log_p": log_p - 1.0}
    assert torch.equal(rl.losses(net, near, 0.2)[0], rl.losses(net, near, None)[0])  # the ratio is 1
    assert float(rl.losses(net, far, 0.2)[0].detach()) > float(rl.losses(net, far, None)[0].detach())
    assert float(rl.losses(net, near, 0.2)[1].detach()) == 0.0
    assert float(rl.losses(net, near, 0.2)[2].detach()) == pytest.approx(np.log(2), abs=0.01)


def test_actions_are_drawn_from_the_policy():
    task = build(environments=64)
    net = task.network(0)
    actor = task.actor(64, 0, "test")
    rollout = actor.act(net, 200, torch.Generator().manual_seed(0), task.device)
    logits = net(rollout.observations[:-1].flatten(0, 1))[0]
    expected = float(logits.detach().softmax(-1)[:, 1].mean())
    assert float(rollout.actions.float().mean()) == pytest.approx(expected, abs=0.015)
    chosen = logits.detach().log_softmax(-1).gather(1, rollout.actions.flatten()[:, None]).flatten()
    torch.testing.assert_close(rollout.log_p.flatten(), chosen)


def test_returns_and_resets_are_taken_down():
    task = build(environments=4)
    actor = task.actor(4, 0, "test")
    rollout = actor.act(task.network(0), 100, torch.Generator().manual_seed(0), task.device)
    assert len(actor.finished) == int(rollout.ended.sum())
    assert sum(actor.finished) + actor.returns.sum() == float(rollout.rewards.sum())
    assert torch.equal(rollout.counts[1:], ~rollout.ended[:-1])  # the step after an end counts not
    assert float(rollout.rewards[~rollout.counts].sum()) == 0.0


# runs


def test_cartpole_learns():
    run = build(updates_per_epoch=8, rollout=64).start(CONFIG, 0)
    scores = []
    for _ in range(4):
        scores.append(run.train_epoch(never)["train_score"])
    assert scores[-1] > 3 * scores[0]
    assert run.evaluate("test")["score"] > 100
    assert run.evaluate("validation")["score"] == pytest.approx(np.mean(run.returns[-20:]))


@pytest.mark.parametrize("name", ["cartpole_ppo", "atari_ppo"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name):
    task = build(name)
    straight, broken = task.start(CONFIG, 1), task.start(CONFIG, 1)
    for _ in range(3):
        expected = [straight.train_epoch(never), straight.evaluate("validation"), straight.evaluate("test")]
        assert [broken.train_epoch(never), broken.evaluate("validation"), broken.evaluate("test")] == expected
        broken = resume(task, broken)
    assert same(straight.state_dict(), broken.state_dict())


def test_atari_resumes_across_the_ends_of_episodes(monkeypatch):
    monkeypatch.setattr(environments, "MAX_STEPS", 11)
    monkeypatch.setattr(environments, "RESEED", 15)
    task = build("atari_ppo")
    straight, broken = task.start(CONFIG, 1), task.start(CONFIG, 1)
    for _ in range(3):
        assert broken.train_epoch(never) == straight.train_epoch(never)
        broken = resume(task, broken)
    assert straight.state_dict()["environments"]["seeding"].min() >= 1
    assert same(straight.state_dict(), broken.state_dict())


def test_the_test_score_is_the_mean_return_of_the_first_episodes():
    task = build()
    run = task.start(CONFIG, 4)
    run.train_epoch(never)
    actor = task.actor(task.n, 4, "test", 1)
    rollout = actor.act(
        run.net, task.evaluation_steps, torch.Generator().manual_seed(torch_seed(4, "test", 1)), task.device
    )
    ends = [int(ended.nonzero()[0]) for ended in rollout.ended.T]
    expected = np.mean([float(rewards[: end + 1].sum()) for rewards, end in zip(rollout.rewards.T, ends, strict=True)])
    assert run.evaluate("test")["score"] == pytest.approx(expected)
    short = build(evaluation_steps=5).start(CONFIG, 4)
    assert short.evaluate("test")["score"] == 5.0  # of episodes that go on, what they have


def test_the_test_episodes_disturb_nothing_and_are_the_same_every_time():
    task = build()
    one, other = task.start(CONFIG, 2), task.start(CONFIG, 2)
    one.train_epoch(never)
    other.train_epoch(never)
    assert one.evaluate("test") == one.evaluate("test")
    assert one.train_epoch(never) == other.train_epoch(never)


def test_initial_weights_and_global_random_numbers():
    task = build()
    state = torch.get_rng_state()
    run = task.start(CONFIG, 3)
    run.train_epoch(never)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(task.network(3).parameters(), task.start({"lr": 1e-5}, 3).net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_epoch_stops_at_the_next_block():
    asked = iter([False, True])
    run = build().start(CONFIG, 0)
    assert run.train_epoch(lambda: next(asked)) is None
    assert run.epoch == 0


def test_a_loss_that_is_not_finite_fails_the_trial():
    run = build().start({"lr": float("nan")}, 0)
    with pytest.raises(TrialFailed, match="loss is"):
        run.train_epoch(never)


@pytest.mark.parametrize(("change", "message"), [({"schedule": "linear"}, "schedule"), ({"minibatches": 999}, "256")])
def test_hyperparameters_that_make_no_sense_are_users_errors(change, message):
    with pytest.raises(UserError, match=message):
        build().start(CONFIG | change, 0)
    with pytest.raises(UserError, match="mlp"):
        build(model="resnet")


@pytest.mark.parametrize("name", ["cartpole_ppo", "atari_ppo"])
@pytest.mark.parametrize(("space", "floats", "others"), [("study3", 3, 0), ("study5", 5, 0), ("study10", 10, 0),
                                                         ("mixed", 5, 3), ("continuous", 5, 0)])  # fmt: skip
def test_spaces(name, space, floats, others):
    spaces = spec(name)["spaces"]
    chosen = Space.from_spec(spaces[space])
    assert (len(chosen.continuous), len(chosen)) == (floats, floats + others)
    assert Space.from_spec(spaces["continuous"]).domains == Space.from_spec(spaces["mixed"]).continuous
    assert set(chosen) <= {*rl.DEFAULTS, "lr", "schedule"}


@pytest.mark.parametrize("space", ["study3", "study10", "mixed"])
def test_every_space_trains(space):
    task = build(space=space, updates_per_epoch=1)
    assert task.start(task.space.sample(rng(1, "test")), 0).train_epoch(never) is not None


# the problem of a warm start


@pytest.mark.parametrize("space", ["study5", "study10"])
@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_is_that_of_the_objective_in_float64(space, seed):
    task = build(space=space)
    config = task.space.sample(rng(seed, "test"))
    run = task.start(config, seed)
    run.net.double()
    problem = run.problem(Settings(batch_size=64))
    movable = {name: Coordinate(domain) for name, domain in task.space.domains.items()
               if isinstance(domain, Float) and name in problem.movable}  # fmt: skip
    batches = problem.draw(0)
    gradient = lookahead(problem, config, batches, movable).gradient
    for name, coordinate in movable.items():
        psi, h = coordinate.psi(config[name]), 1e-5 * coordinate.width
        ends = [{**config, name: coordinate.value(psi + d)} for d in (h, -h)]
        above, below = (lookahead_objective(problem, end, batches) for end in ends)
        assert gradient[name] == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-9), name
    assert all(gradient[name] for name in ("lr", "entropy", "discount", "gae_lambda"))
    assert "clip_range" not in movable


def test_the_training_loss_of_the_problem_is_the_trainers_first():
    task = build(environments=8)
    config = CONFIG | {"minibatches": 1, "update_epochs": 1}
    run = task.start(config, 0)
    problem = run.problem(Settings(batch_size=8 * 32))
    rollout, _ = problem.draw(0)
    batch = rl.transitions(rollout, CONFIG["discount"], CONFIG["gae_lambda"])
    twin = task.start(config, 0)
    trained = twin._update(batch)
    torch.testing.assert_close(problem.train_loss(run.net, rollout, {}).detach(), trained)


def test_rollouts_of_a_warm_start_are_different_repeatable_and_of_the_size_asked_for():
    run = build().start(CONFIG, 0)
    problem = run.problem(Settings(batch_size=100))
    first, second = problem.draw(0)
    again, _ = problem.draw(0)
    assert first.actions.shape == (17, 6)  # 100 rounded up
    assert torch.equal(first.observations, again.observations)
    assert not torch.equal(first.observations, second.observations)
    assert not torch.equal(first.observations, problem.draw(1)[0].observations)
    assert run.problem(Settings(batch_size=4)).draw(0)[0].actions.shape == (4, 1)
    assert run.problem(Settings(batch_size=512)).draw(0)[0].actions.shape == (64, 8)


def test_atari_warm_starts():
    task = build("atari_ppo")
    problem = task.start(CONFIG, 0).problem(Settings(batch_size=8))
    space = {name: Coordinate(domain) for name, domain in task.space.continuous.items() if name in problem.movable}
    gradient = lookahead(problem, CONFIG, problem.draw(0), space).gradient
    assert all(np.isfinite(value) for value in gradient.values())
    assert gradient["lr"] != 0.0


@pytest.mark.parametrize("name", ["cartpole_ppo", "atari_ppo"])
def test_the_usual_loop_runs(name):
    asked = iter([False, True])
    plain_loop.plain_loop(spec(name), CONFIG, torch.device("cpu"), 0)(lambda: next(asked))
    assert list(asked) == []
    assert plain_loop.units_per_step(spec(name), CONFIG) == {"cartpole_ppo": 256, "atari_ppo": 16}[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole_ppo", "atari_ppo"])
def test_the_command_trains(name, tmp_path, harness):
    small = [f"task.{key}={value}" for key, value in SMALL[name].items()]
    words = [f"task={name}", *small, "ohgw=off,normalized", "ohgw.batch_size=32", "budget.epochs=4",
             "budget.wallclock=null", "n_workers=1", "backend.threads=1", "tracker=none"]  # fmt: skip
    done = harness(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("results/*/*normalized*/trials.jsonl")
    rows = read_lines(path)
    assert rows
    assert all(row["estimator"] == "lookahead" and row["flops"] > 0 for row in rows)
    assert all(json.dumps(row["x"]["clip_range"]) == json.dumps(row["x_prime"]["clip_range"]) for row in rows)


def test_reference_hyperparameters_are_the_defaults():
    assert all(rl.DEFAULTS[name] == value for name, value in rl.REFERENCE.items())
    assert environments.INSTALL in "pip install 'ohgw-harness[rl]'"
