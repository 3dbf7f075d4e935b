"""Five LightningModules that know nothing of lightning_ft, each odd in a way in which projects are odd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytorch_lightning as legacy
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from lightning_ft.data.loader import ResumableDataLoader
from lightning_ft.data.sampler import LengthBucketSampler

WIDTH, VOCABULARY, LENGTH, ROWS, BATCH = 8, 20, 5, 24, 4
BATCHES = ROWS // BATCH
UNITS = ["head", "block.2", "block.1", "block.0", "embeddings"]
"""What gradual unfreezing releases, in its order; head stands for head and tail."""


class Encoder(nn.Module):
    """A transformer of three blocks, in plain torch."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout, batch_first=True) for _ in range(3)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


def pretrained(build: Callable[..., nn.Module], *args: Any) -> Any:
    """A model whose weights are the same at each call, as those of ``from_pretrained`` are."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(*args)


def dataset() -> TensorDataset:
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return TensorDataset(tokens, tokens[:, 0] % 2)


class _Project:
    """What all have in common: a loss, and training batches in an order that can be resumed."""

    log: Any
    trainer: Any

    def loss(self, batch: list[Tensor]) -> Tensor:
        tokens, labels = batch
        return F.cross_entropy(self(tokens), labels)  # type: ignore[operator]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def train_dataloader(self) -> DataLoader[Any]:
        return ResumableDataLoader(dataset(), LengthBucketSampler([LENGTH] * ROWS, BATCH), trainer=self.trainer)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=12)

    test_dataloader = val_dataloader


class Filtered(_Project, pl.LightningModule):
    """Its optimiser holds what requires gradients when it is built."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = pretrained(Encoder, dropout)
        self.classifier = pretrained(nn.Linear, WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.encoder(tokens)[:, 0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, self.parameters()), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Late(_Project, pl.LightningModule):
    """Its model, a BERT, exists from ``configure_model`` on; two optimiser groups, a fused optimiser."""

    bert: nn.Module

    def configure_model(self) -> None:
        if not hasattr(self, "bert"):
            config = hf.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                num_attention_heads=2,
                intermediate_size=16,
                num_hidden_layers=3,
                max_position_embeddings=32,
            )
            self.bert = pretrained(hf.BertForSequenceClassification, config).train()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).logits

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Manual(Filtered):
    """Steps its optimiser and its scheduler itself, each second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
            self.lr_schedulers().step()


class HeadFirst(_Project, pl.LightningModule):
    """Declares its head before an encoder under a name that no list of names would hold."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.verdict = pretrained(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)))
        self.thing_from_paris = nn.ModuleDict({"inner": pretrained(Encoder, dropout)})

    def forward(self, tokens: Tensor) -> Tensor:
        return self.verdict(self.thing_from_paris["inner"](tokens).mean(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Legacy(_Project, legacy.LightningModule):
    """A project of ``pytorch_lightning``, whose classes are not those of ``lightning.pytorch``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = pretrained(Encoder)
        self.classifier = pretrained(nn.Linear, WIDTH, 2)

    forward = Filtered.forward

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=100)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@dataclass(frozen=True)
class Stranger:
    """A project: how it makes its module, and which Trainer it uses."""

    name: str
    module: Callable[[], Any]
    trainer_class: type = pl.Trainer

    def trainer(self, callbacks: Iterable[Any] = (), **options: Any) -> Any:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        defaults = {**quiet, "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": 2}
        return self.trainer_class(callbacks=list(callbacks), **{**defaults, **options})

    def fit(self, *callbacks: Any, module: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
        """Train from one seed, and return the trainer; its ``lightning_module`` is the trained one."""
        trainer = self.trainer(callbacks, **options)
        torch.manual_seed(0)
        trainer.fit(module or self.module(), ckpt_path=ckpt_path)
        return trainer


FILTERED = Stranger("filtered", Filtered)
STILL = Stranger("still", lambda: Filtered(dropout=0))
"""Without dropout, for closed forms. Not one of the five."""
STRANGERS = [
    FILTERED,
    Stranger("late", Late),
    Stranger("manual", Manual),
    Stranger("head-first", HeadFirst),
    Stranger("legacy", Legacy, legacy.Trainer),
]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def outcome(trainer: Any) -> dict[str, Any]:
    """All that training changes: weights, optimiser states and scheduler states."""
    return {
        "weights": weights(trainer.lightning_module),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }


def identical(left: Any, right: Any) -> bool:
    """Bit-equal, in values and in structure."""
    leaves, structure = tree_flatten(left)
    others, other_structure = tree_flatten(right)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )
