"""What every method that trains a part of a model, or changes it, promises on four kinds of models: one table.

Tests of the methods run cells of it, and `benchmarks/methods_table.py` writes all of them down.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_ft.callbacks import ExactResume
from lightning_ft.core.base_weights import base_names
from lightning_ft.data import ClassificationData
from lightning_ft.export import export_onnx
from lightning_ft.export.bake import baked, core_model
from lightning_ft.functional.alterations import PART
from lightning_ft.functional.delta import content_hash
from lightning_ft.functional.peft_merge import plain_model
from lightning_ft.functional.quantised_tensor import QuantisedTensor
from lightning_ft.modules import SequenceClassification, load_checkpoint
from tests.pretrained import Kind, pretrained
from tests.strangers import identical

KINDS: tuple[Kind, ...] = ("bert", "gpt2", "llama", "t5")
PROPERTIES = ("share", "trains", "resumes", "saves", "reloads", "merges", "exports")
ERRORS = (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        make: New callbacks, and plugins of the trainer.
        learning_rate: At which a few steps change something.
        impossible: What cannot be, by kind (or ``"all"``) and property, with the reason; the error's words are matched.
        freezes: Whether the pretrained weights must not move.
        tolerance: Of merged against unmerged logits.
    """

    make: Callable[[], tuple[list[Callback], list[Any]]]
    learning_rate: float = 1e-2
    impossible: dict[tuple[str, str], str] | None = None
    freezes: bool = True
    tolerance: float = 1e-5

    def reason(self, kind: str, what: str) -> str | None:
        known = self.impossible or {}
        return known.get((kind, what)) or known.get(("all", what))


@cache
def _folder(kind: Kind) -> str:
    place = tempfile.mkdtemp(prefix=f"lightning_ft_{kind}_")
    return pretrained(Path(place), kind, hf.AutoModelForSequenceClassification)


def data(kind: Kind) -> ClassificationData:
    """Sixteen rows, four batches an epoch."""
    words = ["the film is good", "a dull story", "well made", "people who sing in London are bad", "maybe"]
    texts = [" and ".join(words[(i + j) % 5] for j in range(1 + i % 3)) for i in range(16)]
    rows = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(16)]})
    return ClassificationData(_folder(kind), rows, rows, batch_size=4, max_length=24, labels=["0", "1"])


class _Stop(Callback):
    """Kills the run on the first epoch's last batch."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise KeyboardInterrupt


def module(kind: Kind, method: Method) -> SequenceClassification:
    return SequenceClassification(_folder(kind), ["0", "1"], learning_rate=method.learning_rate, warmup=0.0)


def fit(
    kind: Kind, method: Method, place: Path, *more: Callback, ckpt_path: Path | None = None
) -> tuple[SequenceClassification, Trainer]:
    """Dropout, shuffling, accumulation 2, validation in mid-epoch."""
    callbacks, plugins = method.make()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        plugins=plugins,
        callbacks=[ExactResume("1 steps", dirpath=place), *callbacks, *more],
    )
    torch.manual_seed(0)
    trained = module(kind, method)
    try:
        trainer.fit(trained, datamodule=data(kind), ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):
        assert more, "the run was to reach its end"
    return trained, trainer


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """In eval mode."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs).logits
    return result


class Cell:
    """A method on a kind of model, trained once; each property may be asked.

    Args:
        method: The method.
        kind: The kind of model.
        place: An empty folder.
    """

    def __init__(self, method: Method, kind: Kind, place: Path) -> None:
        self.method, self.kind, self.place = method, kind, place
        self.trained, self.trainer = fit(kind, method, place / "whole")
        self.checkpoint = place / "whole" / "last.ckpt"
        source = data(kind)
        source.setup("validate")
        self.batch = next(iter(source.val_dataloader()))
        self.logits = logits(self.trained.model, self.batch)

    def share(self) -> float:
        """Of the values that train."""
        parameters = list(self.trained.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)

    def trains(self) -> bool:
        """What trains has moved, the logits with it, and the base has not."""
        torch.manual_seed(0)
        fresh = module(self.kind, self.method)
        assert not torch.equal(logits(fresh.model, self.batch), self.logits)
        base = fresh.state_dict()
        if self.method.freezes:
            own = self.trained.state_dict()
            frozen = base_names(self.trained)
            assert frozen
            assert not any(p.requires_grad for n, p in self.trained.named_parameters() if n in frozen)
            values = {content_hash({"": value}) for value in base.values()}
            floats = [n for n in frozen if own[n].is_floating_point() and not isinstance(own[n], QuantisedTensor)]
            moved = [n for n in floats if content_hash({"": own[n]}) not in values]
            assert not moved, f"frozen, and moved: {moved[:5]}"
        return True

    def resumes(self) -> bool:
        """A run that was killed on an epoch's last batch ends as the other, bit for bit."""
        files = self.place / "killed"
        fit(self.kind, self.method, files, _Stop())
        resumed, trainer = fit(self.kind, self.method, files, ckpt_path=files / "last.ckpt")
        one, other = self.trained.state_dict(), resumed.state_dict()
        assert one.keys() == other.keys()
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, f"not bit-equal: {different[:5]}"
        assert identical(
            [o.state_dict() for o in self.trainer.optimizers], [o.state_dict() for o in trainer.optimizers]
        )
        return True

    def saves(self) -> float:
        """Bytes of the weights in the checkpoint over those of the pretrained model."""
        saved = torch.load(self.checkpoint, weights_only=True)
        if self.method.freezes:
            assert not base_names(self.trained) & saved["state_dict"].keys()
            assert saved[PART]["base"] == _folder(self.kind)
        storages = {t.data_ptr(): t.numel() * t.element_size() for t in saved["state_dict"].values()}
        base = (Path(_folder(self.kind)) / "model.safetensors").stat().st_size
        return sum(storages.values()) / base

    def reloads(self) -> bool:
        """The checkpoint, over the base, gives the same logits, bit for bit."""
        again = load_checkpoint(self.checkpoint)
        assert torch.equal(logits(again.model, self.batch), self.logits)
        return True

    def merges(self) -> float:
        """Largest difference of the logits of a plain model from those of the trained one."""
        plain, _ = baked(core_model(plain_model(self.trained.model)))
        difference = float((logits(plain, self.batch) - self.logits).abs().max())
        assert difference <= self.method.tolerance, f"{difference} > {self.method.tolerance}"
        return difference

    def exports(self) -> float:
        """Largest error of the graph of the checkpoint, which was compared with the checkpoint before it was left."""
        report = export_onnx(self.checkpoint, self.place / "onnx", max_length=16)
        return max(float(row["absolute"]) for row in report.rows)


def measure(method: Method, kind: Kind, *, exports: bool = True) -> dict[str, Any]:
    """A figure or True for each property, or ``{"impossible": reason}`` where just that error was raised.

    Raises:
        AssertionError: A promise is broken.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if reason := method.reason(kind, "share"):
            with pytest.raises(ERRORS, match=re.escape(reason)):
                Cell(method, kind, Path(folder))
            return {what: {"impossible": reason} for what in PROPERTIES}
        cell = Cell(method, kind, Path(folder))
        for what in PROPERTIES:
            if what == "exports" and not exports:
                continue
            if reason := method.reason(kind, what):
                with pytest.raises(ERRORS, match=re.escape(reason)):
                    getattr(cell, what)()
                found[what] = {"impossible": reason}
            else:
                found[what] = getattr(cell, what)()
    return found
