"""A project around any transformers model, one batch with padding, and the gradients of one step on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import transformers as hf
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.tiny import BERT, GPT2, SEQ2SEQ, T5

Gradients = dict[str, Tensor]
SEED = 11


def bert(head: str = "SequenceClassification", dropout: float = 0.0, **options: Any) -> Any:
    return _model("Bert", hf.BertConfig(**BERT, **_rates("_dropout_prob", dropout), **options), head)


def gpt2(head: str = "LMHeadModel") -> Any:
    return _model("GPT2", hf.GPT2Config(**GPT2, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), head)


def t5() -> Any:
    return _model("T5", hf.T5Config(**SEQ2SEQ, **T5, dropout_rate=0.0), "ForConditionalGeneration")


def _rates(end: str, rate: float) -> dict[str, float]:
    return {f"hidden{end}": rate, f"attention_probs{end}": rate}


def _model(family: str, config: Any, head: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        name = f"{family}{head}" if head.startswith(("For", "LM")) else f"{family}For{head}"
        model = getattr(hf, name)(config).train()
        for parameter in model.parameters():  # away from the small values of a fresh model, whose answers hardly move
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        return model


def batch(labels: Tensor | None = None, rows: int = 4, width: int = 6) -> dict[str, Tensor]:
    """Token ids, a mask with padding in every other row, and labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 50, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, width - 2 :] = 0
    labels = torch.arange(rows) % 2 if labels is None else labels
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class Project(pl.LightningModule):
    """Calls its model with ids and labels; draws its dropout from one seed in every step."""

    def __init__(self, net: nn.Module, rows: Mapping[str, Tensor], batches: int = 1, lr: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.rows, self.batches, self.lr = dict(rows), batches, lr
        self.steps = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        loss: Tensor = self.net(**batch).loss
        self.log("train_loss", loss, on_step=True)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(SEED)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader([self.rows] * self.batches, batch_size=None)


class Keep(Callback):
    """The gradients of the last optimiser step, before clipping."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients = gradients_of(getattr(pl_module, "net", pl_module))


def gradients_of(module: nn.Module) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults: dict[str, Any] = {**quiet, "logger": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1}
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def step(module: Any, *callbacks: Callback, **options: Any) -> Gradients:
    """The gradients that one training step leaves."""
    keep = Keep()
    trainer(*callbacks, keep, **options).fit(module)
    return keep.gradients


class Numbers(DummyLogger):
    """What is logged, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)


def logged(module: Any, *callbacks: Callback, **options: Any) -> dict[str, list[float]]:
    """What a fit logs at each step."""
    trainer(*callbacks, logger=(numbers := Numbers()), log_every_n_steps=1, **options).fit(module)
    return numbers.values


def backward(module: nn.Module, loss: Tensor) -> Gradients:
    """The gradients of a loss, written out."""
    module.zero_grad()
    loss.backward()
    return gradients_of(module)


def assert_same(found: Gradients, wanted: Gradients, tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
