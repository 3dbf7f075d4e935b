"""Heads measured, and silenced, when training ends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ft.callbacks import ExactResume
from lightning_ft.callbacks.head_importance import HeadImportance
from lightning_ft.data import ClassificationData
from lightning_ft.export import export_onnx
from lightning_ft.functional.head_importance import head_importance
from lightning_ft.modules import SequenceClassification, load_checkpoint
from tests.pretrained import Kind, pretrained
from tests.strangers import FILTERED, STRANGERS, Filtered, Stranger, dataset, identical, outcome, weights

KINDS: tuple[Kind, ...] = ("bert", "gpt2", "llama", "t5")


def loss_of(module: Any, batch: list[Tensor]) -> Tensor:
    """For the project that steps its optimiser itself."""
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda s: s.name)
def test_measures_when_training_ends_and_changes_nothing(stranger: Stranger, tmp_path: Path) -> None:
    callback = HeadImportance(examples=12, loss=loss_of if stranger.name == "manual" else None)
    trainer = stranger.fit(callback, default_root_dir=tmp_path)
    assert identical(outcome(trainer), outcome(stranger.fit()))
    assert callback.scores is not None
    assert callback.report is not None
    assert len(callback.scores.importance) == 3
    assert all(float(values.norm()) == pytest.approx(1) for values in callback.scores.importance.values())
    assert len(callback.report.rows) == 6
    assert callback.scores.examples == 12
    assert (tmp_path / "head_importance.png").is_file()
    # Every second batch of the set: the rows are spread over it.
    tokens, labels = dataset().tensors
    rows = [[tokens[i : i + 4], labels[i : i + 4]] for i in (0, 8, 16)]
    again = head_importance(trainer.lightning_module, rows, loss=loss_of)
    for name, values in again.importance.items():
        torch.testing.assert_close(callback.scores.importance[name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda s: s.name)
def test_prunes_and_saves_what_is_left(stranger: Stranger, tmp_path: Path) -> None:
    callback = HeadImportance(0.5, examples=8, loss=loss_of if stranger.name == "manual" else None)
    trainer = stranger.fit(callback, ExactResume(dirpath=tmp_path), default_root_dir=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    now = weights(trainer.lightning_module)
    assert callback.scores is not None
    assert sum(map(len, callback.scores.silent.values())) == 3
    for name, heads in callback.scores.silent.items():
        columns = now[f"{name}.weight"].view(8, 2, 4)
        assert [h for h in range(2) if not columns[:, h].any()] == sorted(heads)
        assert torch.equal(saved[f"{name}.weight"], now[f"{name}.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_pruned_saved_and_loaded(kind: Kind, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "base", kind, hf.AutoModelForSequenceClassification)
    rows = "\n".join(f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(16))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    data = ClassificationData(folder, str(tmp_path / "rows.csv"), str(tmp_path / "rows.csv"), batch_size=4)
    module = SequenceClassification(folder, num_labels=2, learning_rate=1e-3)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    callback = HeadImportance(0.3, per_round=0.15, examples=16)
    files = ExactResume(dirpath=tmp_path / "files")
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback, files], default_root_dir=tmp_path, **quiet)
    trainer.fit(module, datamodule=data)
    assert callback.report is not None
    assert callback.report.facts["silent"] == {9: 5, 3: 1}[len(callback.report.rows)]
    loaded = load_checkpoint(tmp_path / "files" / "last.ckpt").eval()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval()(batch))
    if kind == "bert":
        assert export_onnx(tmp_path / "files" / "last.ckpt", tmp_path / "onnx").facts


def test_refuses_bad_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"share=1.5 must be in \(0, 1\)"):
        HeadImportance(1.5)
    with pytest.raises(ValueError, match="examples=0 must be 1 or more"):
        HeadImportance(examples=0)
    monkeypatch.setattr("lightning_ft.callbacks.head_importance.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"heads.png' needs matplotlib: pip install"):
        FILTERED.fit(HeadImportance(path="heads.png"))
    callback = HeadImportance(examples=4)
    FILTERED.fit(callback, default_root_dir=tmp_path)  # no picture, and no error
    assert callback.scores is not None
    assert not (tmp_path / "head_importance.png").exists()
    assert importlib.util.find_spec("matplotlib")


def test_refuses_training_rows_that_cannot_be_read_twice() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return zip(*dataset().tensors, strict=True)

    class Streamed(Filtered):
        def train_dataloader(self) -> Any:
            return DataLoader(Stream(), 4)

    with pytest.raises(ValueError, match="reads the training rows once more, which an iterable data set"):
        FILTERED.fit(HeadImportance(), module=Streamed(), max_steps=2)


def test_refuses_sharded_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_ft.callbacks.head_importance.is_sharded", lambda p: True)
    with pytest.raises(ValueError, match=r"runs the model by itself, and under FSDP.*call head_importance"):
        FILTERED.fit(HeadImportance())
