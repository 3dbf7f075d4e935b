"""Our callbacks on a LightningModule that knows nothing of us: a convolutional network, named group by group.

python examples/own_module.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.callbacks import L2SP, DiscriminativeLR, GradualUnfreezing
from lightning_ft.core import Layers


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(16, 4)  # declared first: the order of attributes plays no part
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.classifier(self.features(images).flatten(1)), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)}


def main() -> None:
    seed_everything(0)
    labels = torch.arange(256) % 4
    images = torch.randn(256, 1, 8, 8) + labels[:, None, None, None]
    layers = Layers(groups={"stem": r"^features\.0\.", "body": r"^features\.2\.", "head": r"^classifier\."})
    callbacks = [
        GradualUnfreezing(every="2 epochs", layers=layers),
        DiscriminativeLR(decay=0.5, layers=layers),
        L2SP(strength=0.01, layers=layers),
    ]
    trainer = Trainer(max_epochs=6, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Digits(), DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True))


if __name__ == "__main__":
    main()
