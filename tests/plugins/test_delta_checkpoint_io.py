"""Delta checkpoints in a Trainer: exact resume, size, other readers, other bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ft.callbacks import ExactResume, Freeze
from lightning_ft.functional.delta_checkpoint import DELTA, restore_delta, save_base
from lightning_ft.modules import SequenceClassification, load_checkpoint
from lightning_ft.plugins import AtomicCheckpointIO
from lightning_ft.plugins.delta_checkpoint_io import DeltaCheckpointIO
from tests.callbacks.test_exact_resume import Kill, Killed
from tests.pretrained import pretrained
from tests.strangers import FILTERED, Filtered, identical, outcome, weights

OPTIONS = {"accumulate_grad_batches": 2, "val_check_interval": 3}


def base_of(folder: Path) -> Path:
    save_base(Filtered().state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


@pytest.mark.parametrize("freeze", [False, True])
def test_a_run_resumes_exactly_from_deltas(freeze: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path)

    def run(folder: Path, *more: Any, plugin: Any, **options: Any) -> Any:
        callbacks = [ExactResume("1 steps", dirpath=folder), *([Freeze(["block.2", "head"])] if freeze else []), *more]
        return FILTERED.fit(*callbacks, plugins=[plugin], **OPTIONS, **options)

    expected = outcome(run(tmp_path / "plain", plugin=AtomicCheckpointIO()))
    plugin = DeltaCheckpointIO(base)
    with pytest.raises(Killed):
        run(tmp_path / "delta", Kill("on_after_backward", 1, 3), plugin=plugin)
    last = tmp_path / "delta" / "last.ckpt"
    assert DELTA in torch.load(last, weights_only=True)
    resumed = run(tmp_path / "delta", plugin=DeltaCheckpointIO(base), ckpt_path=last)
    assert identical(outcome(resumed), expected)
    assert identical(restore_delta(last)["state_dict"], weights(resumed.lightning_module))
    assert plugin.report is not None
    kept = plugin.report.facts["kept, bytes"] / plugin.report.facts["weights, bytes"]
    assert kept < 0.45 if freeze else kept <= 1


def test_others_open_it_while_the_base_is_there(tmp_path: Path) -> None:
    """The atomic plugin, which is the command line's, and a plain trainer with what restore_delta writes."""
    base = base_of(tmp_path)
    trainer = FILTERED.fit(plugins=[DeltaCheckpointIO(base)], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = outcome(FILTERED.fit(max_epochs=2, plugins=[AtomicCheckpointIO()], ckpt_path=tmp_path / "a.ckpt"))
    restore_delta(tmp_path / "a.ckpt", out=tmp_path / "whole.ckpt")
    assert identical(outcome(FILTERED.fit(max_epochs=2, ckpt_path=tmp_path / "whole.ckpt")), expected)
    base.unlink()
    with pytest.raises(FileNotFoundError, match="which is not there any more: say where it is now"):
        FILTERED.fit(max_epochs=2, plugins=[AtomicCheckpointIO()], ckpt_path=tmp_path / "a.ckpt")


def test_another_base_is_refused(tmp_path: Path) -> None:
    FILTERED.fit(plugins=[DeltaCheckpointIO(base_of(tmp_path))], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    module = Filtered()
    module.encoder.norm.weight.data[0] += 1
    save_base(module.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="give the base that it was saved with"):
        FILTERED.fit(plugins=[DeltaCheckpointIO(tmp_path / "other.safetensors")], ckpt_path=tmp_path / "a.ckpt")


def test_our_heads_are_rebuilt_from_it(tmp_path: Path) -> None:
    """The base is the pretrained folder itself: a frozen body costs nothing."""
    folder = pretrained(tmp_path / "model", "bert", hf.AutoModel)
    module = SequenceClassification(folder, labels=["a", "b"])
    plugin = DeltaCheckpointIO(folder)
    trainer = FILTERED.trainer(plugins=[plugin])
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert plugin.report is not None
    assert plugin.report.facts["kept, bytes"] == 4 * sum(p.numel() for p in module.model.classifier.parameters())
    assert identical(weights(load_checkpoint(tmp_path / "a.ckpt")), weights(module))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = DeltaCheckpointIO(base_of(tmp_path)), tmp_path / "checkpoints" / "last.ckpt"
    state = weights(Filtered())
    io.save_checkpoint({"state_dict": state, "step": 1}, path)

    def breaks_off(content: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", breaks_off)
    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({"state_dict": state, "step": 2}, path)
    loaded = io.load_checkpoint(path)
    assert loaded["step"] == 1
    assert identical(dict(loaded["state_dict"]), state)


def test_model_checkpoint_removes_what_it_no_longer_keeps(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_top_k=1)
    plugin = DeltaCheckpointIO(base_of(tmp_path))
    FILTERED.fit(keeper, plugins=[plugin], enable_checkpointing=True, max_epochs=3)
    assert len(list((tmp_path / "kept").iterdir())) == 1
