"""A plain PyTorch + Syne Tune script with one-shot hyper-gradient warm-starts added between the ``OHGW`` marks.

    python scripts/example_plain_pytorch.py --trials 8 --epochs 9

Tuner and training script in one file: Syne Tune's LocalBackend runs it once more for every trial, with ``--train 1``.
Delete the marked lines and the same script tunes without warm starts.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from syne_tune import Reporter, StoppingCriterion, Tuner
from syne_tune.backend import LocalBackend
from syne_tune.config_space import loguniform, uniform
from syne_tune.optimizer.baselines import ASHA
from torch import Tensor, nn

SPACE = {
    "lr": loguniform(1e-3, 1.0),
    "wd": loguniform(1e-6, 1e-2),
    "momentum": uniform(0.0, 0.99),
    "label_smoothing": uniform(0.0, 0.3),
}


def smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """Cross-entropy with label smoothing."""
    log_p = logits.log_softmax(1)
    return (1 - smoothing) * F.nll_loss(log_p, labels) - smoothing * log_p.mean()


def train(config: dict[str, Any], epochs: int, seed: int) -> None:
    """Train a small network on UCI digits and report its validation accuracy after every epoch."""
    report = Reporter()
    torch.manual_seed(seed)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, y = images.float() / 16, labels.long()
    shuffled = torch.randperm(
        len(x), generator=torch.Generator().manual_seed(0)
    )  # the split is the same for all trials
    train_rows, validation_rows = shuffled[:1200], shuffled[1200:]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    # OHGW begin
    from harness.ohgw import Problem, Settings, UpdateRule, warm_start
    from harness.space import Space

    pairs = train_rows[torch.randperm(1200, generator=torch.Generator().manual_seed(seed))].split(128)
    problem = Problem(
        model=model,
        train_loss=lambda net, rows, z: smoothed_loss(net(x[rows]), y[rows], z["label_smoothing"]),
        probe_loss=lambda net, rows: smoothed_loss(net(x[rows]), y[rows], 0.0),
        draw=lambda step: (pairs[2 * step], pairs[2 * step + 1]),
        update=UpdateRule(),  # SGD with the hyperparameters "lr", "wd" and "momentum"
        differentiable=("label_smoothing",),
    )
    result = warm_start(config, Space.from_config_space(SPACE), problem, Settings(step="normalized", eta=0.1))
    config = result.config
    # OHGW end
    optimizer = torch.optim.SGD(model.parameters(), config["lr"], config["momentum"], weight_decay=config["wd"])
    for epoch in range(1, epochs + 1):
        for rows in train_rows[torch.randperm(len(train_rows))].split(32):
            optimizer.zero_grad()
            smoothed_loss(model(x[rows]), y[rows], config["label_smoothing"]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (model(x[validation_rows]).argmax(1) == y[validation_rows]).float().mean().item()
        metrics: dict[str, Any] = {"epoch": epoch, "accuracy": accuracy}
        # OHGW begin
        if epoch == 1:
            metrics["warm_start"] = result.record()
        # OHGW end
        report(**metrics)


def tune(trials: int, epochs: int, workers: int) -> None:
    """Tune with ASHA; Syne Tune writes its results below ~/syne-tune (or $SYNETUNE_FOLDER)."""
    space = {**SPACE, "train": 1, "epochs": epochs}
    scheduler: Any = ASHA(space, metric="accuracy", time_attr="epoch", max_t=epochs, do_minimize=False, random_seed=0)
    # OHGW begin
    from harness.ohgw import OHGW

    scheduler = OHGW(scheduler)
    # OHGW end
    stop = StoppingCriterion(max_num_trials_finished=trials)
    tuner = Tuner(LocalBackend(__file__), scheduler, stop, n_workers=workers, sleep_time=0.1, save_tuner=False)
    tuner.run()
    trial_id, _ = tuner.best_config()
    print(f"best trial: {trial_id}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the batches")
    parser.add_argument(
        "--train", type=int, default=0, help="1: train one trial; the backend passes it, and the trial's"
    )
    for name in SPACE:
        parser.add_argument(f"--{name}", type=float)
    args, _ = parser.parse_known_args()  # the backend passes arguments of its own
    if args.train:
        train({name: getattr(args, name) for name in SPACE}, args.epochs, args.seed)
    else:
        tune(args.trials, args.epochs, args.workers)


if __name__ == "__main__":
    main()
