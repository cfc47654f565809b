"""PyTorch Lightning with one-shot hyper-gradient warm-starts: all that is added is between the ``OHGW`` marks.

    python scripts/example_lightning.py --lr 0.003 --weight_decay 1e-4

Trains one configuration on UCI digits and prints the hyperparameters it trained with. Needs the package lightning:
``pip install 'ohgw-harness[lightning]'``. Without the marked lines it is the same training without a warm start.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    def __init__(self, lr: float, weight_decay: float, momentum: float, label_smoothing: float):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits, smoothing = self.net(batch[0]), self.hparams["label_smoothing"]
        return (1 - smoothing) * F.cross_entropy(logits, batch[1]) - smoothing * logits.log_softmax(1).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        lr, decay = self.hparams["lr"], self.hparams["weight_decay"]
        return torch.optim.SGD(self.parameters(), lr, momentum=self.hparams["momentum"], weight_decay=decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--weight_decay", type=float, default=1e-4)
    parser.add_argument("--momentum", type=float, default=0.5)
    parser.add_argument("--label_smoothing", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    L.seed_everything(0)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(images.float() / 16, labels.long())
    train, validation = torch.utils.data.random_split(data, [1200, len(data) - 1200])
    module = Classifier(args.lr, args.weight_decay, args.momentum, args.label_smoothing)
    callbacks: list[Callback] = []
    # OHGW begin
    from syne_tune.config_space import loguniform, uniform

    from harness.lightning import OHGWCallback
    from harness.ohgw import Settings

    space = {
        "lr": loguniform(1e-3, 1.0),
        "weight_decay": loguniform(1e-6, 1e-2),
        "momentum": uniform(0.0, 0.99),
        "label_smoothing": uniform(0.0, 0.3),
    }
    settings = Settings(step="normalized", eta=0.1)
    z = ("label_smoothing",)  # what training_step reads, besides what the optimizer takes
    callbacks += [OHGWCallback(space, settings, differentiable=z, linear=z)]
    # OHGW end
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(validation, len(validation)))
    print("trained with", dict(module.hparams))
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.3f}")


if __name__ == "__main__":
    main()
