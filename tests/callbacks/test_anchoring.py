"""Where and when the pretrained weights are taken, and that callbacks share them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule
from safetensors import safe_open
from torch.utils.data import DataLoader

from lightning_ft.callbacks import L2SP
from lightning_ft.callbacks._anchoring import _KEPT
from tests.strangers import FILTERED, STILL, STRANGERS, Stranger, identical, outcome, weights


@pytest.mark.parametrize("storage", ["cpu", "disk"])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_storage_changes_no_training(stranger: Stranger, mode: Any, storage: Any, tmp_path: Path) -> None:
    plain = stranger.fit(L2SP(0.5, mode))
    stored = stranger.fit(L2SP(0.5, mode, storage=storage), default_root_dir=tmp_path)
    # In place of a fused interpolation: the last bit may differ.
    theirs = weights(stored.lightning_module)
    for name, value in weights(plain.lightning_module).items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)
    files = list(tmp_path.glob("anchors/*.safetensors"))
    assert len(files) == (storage == "disk")


@pytest.mark.parametrize("storage", ["cpu", "disk", "bf16"])
def test_storage_resumes(storage: Any, tmp_path: Path) -> None:
    options = {"default_root_dir": tmp_path}
    straight = STILL.fit(L2SP(0.5, storage=storage), **options)
    STILL.fit(L2SP(0.5, storage=storage), max_epochs=1, **options).save_checkpoint(tmp_path / "first.ckpt")
    # The fingerprint is that of the weights, however they are kept.
    STILL.fit(L2SP(0.5, storage="device"), ckpt_path=tmp_path / "first.ckpt", **options)
    resumed = STILL.fit(L2SP(0.5, storage=storage), ckpt_path=tmp_path / "first.ckpt", **options)
    assert identical(outcome(straight), outcome(resumed))


def mapped_from(tensor: torch.Tensor) -> Path:
    """The file that the tensor's memory is a view of, as the kernel has it."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, last = line.split()
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return Path(last)
    raise AssertionError("not mapped")


class FromFolder(LightningModule):
    """Loads a saved encoder as the backbone of a head of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.backbone = hf.AutoModel.from_pretrained(folder).train()
        self.verdict = torch.nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.verdict(self.backbone(batch).last_hidden_state[:, 0]).square().mean()

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 3, dtype=torch.int64), batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what memory is a view of")
@pytest.mark.parametrize("saved", [hf.BertForSequenceClassification, hf.BertModel])
def test_on_disk_is_the_pretrained_checkpoint_itself(saved: Any, tmp_path: Path) -> None:
    """No copy is written of what the checkpoint holds bit for bit, whatever prefix it has there."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    config = hf.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)
    saved(config).save_pretrained(tmp_path / "pretrained")
    module = FromFolder(tmp_path / "pretrained")
    with torch.no_grad():
        module.backbone.encoder.layer[1].output.dense.weight.add_(1)  # changed since: the file does not hold it

    seen: dict[str, Any] = {}

    class Look(L2SP):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            seen.update(self._anchoring.take().tensors)

    start = weights(module)
    FILTERED.fit(Look(0.1, kernels_only=False, storage="disk"), module=module, max_epochs=1, default_root_dir=tmp_path)
    places = {name: mapped_from(tensor).parent.name for name, tensor in seen.items()}
    changed = "backbone.encoder.layer.1.output.dense.weight"
    assert places == {name: "anchors" if name == changed else "pretrained" for name in start if "verdict" not in name}
    assert all(torch.equal(tensor, start[name]) for name, tensor in seen.items())
    (file,) = tmp_path.glob("anchors/*.safetensors")
    with safe_open(file, framework="pt") as ours:
        assert list(ours.keys()) == [changed]


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)
def test_callbacks_share_one_copy(stranger: Stranger) -> None:
    class Second(L2SP):
        pass

    matrices, everything = L2SP(0.1), Second(0.1, kernels_only=False, storage="device")
    shared: list[bool] = []

    class Look(L2SP):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            one, other = (callback._anchoring.take().tensors for callback in (matrices, everything))
            shared.extend(tensor is other[name] for name, tensor in one.items())
            assert len(other) > len(one)

    stranger.fit(matrices, everything, Look(0.0), max_epochs=1)
    assert shared
    assert all(shared)
    assert not _KEPT


def test_refuses_two_places(tmp_path: Path) -> None:
    class Second(L2SP):
        pass

    with pytest.raises(ValueError, match="storage='cpu' in L2SP and 'bf16' in Second: write the same"):
        FILTERED.fit(L2SP(0.1, storage="cpu"), Second(0.1, storage="bf16"))
    assert not _KEPT


# --- strength as a pull rate --------------------------------------------------------------------------------------


def test_pull_rate_is_the_strength_over_the_base_learning_rate() -> None:
    """FILTERED's schedule starts at its base rate, 1e-2, and falls: the pull follows."""
    by_rate = STILL.fit(L2SP(pull_rate=1e-3, mode="decoupled"))
    by_strength = STILL.fit(L2SP(0.1, "decoupled"))
    theirs = weights(by_strength.lightning_module)
    for name, value in weights(by_rate.lightning_module).items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_total_contraction_is_the_product_over_the_steps_and_survives_a_resume(mode: Any, tmp_path: Path) -> None:
    straight = L2SP(2.0, mode)
    STILL.fit(straight)
    rates = [1e-2 / (1 + 0.1 * step) for step in range(12)]
    expected = math.prod(1 - 2.0 * rate for rate in rates)
    assert straight.report is not None
    assert straight.report.facts["total contraction"] == pytest.approx(expected, rel=1e-9)
    assert straight.report.facts["optimiser steps"] == 12

    STILL.fit(L2SP(2.0, mode), max_epochs=1).save_checkpoint(tmp_path / "first.ckpt")
    resumed = L2SP(2.0, mode)
    STILL.fit(resumed, ckpt_path=tmp_path / "first.ckpt")
    assert resumed.report == straight.report
    STILL.fit(resumed, max_epochs=1)  # a fit of its own begins anew
    assert resumed.report.facts["optimiser steps"] == 6


# --- adapters -----------------------------------------------------------------------------------------------------


class Adapted(FromFolder):
    """LoRA on a backbone; ``norms`` train beside it."""

    def __init__(self, folder: Path, *, norms: bool) -> None:
        super().__init__(folder)
        self.backbone = peft.get_peft_model(self.backbone, peft.LoraConfig(r=2, init_lora_weights=False))
        for name, parameter in self.backbone.named_parameters():
            if norms and "LayerNorm" in name:
                parameter.requires_grad_(True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    hf.BertModel(hf.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_under_lora_there_is_nothing_to_anchor(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"no pretrained parameter that trains.* Under LoRA the change is centred"):
        FILTERED.fit(L2SP(0.1), module=Adapted(saved, norms=False))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_beside_lora_only_what_is_pretrained_is_anchored(saved: Path) -> None:
    seen: list[str] = []

    class Look(L2SP):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.extend(self._anchoring.take().tensors)

    FILTERED.fit(Look(0.1, kernels_only=False, head_strength=0.1), module=Adapted(saved, norms=True), max_epochs=1)
    assert len(seen) == 2 * (1 + 2 * 2)
    assert all("LayerNorm" in name for name in seen)
