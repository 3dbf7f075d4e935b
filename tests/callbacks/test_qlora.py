"""LoRA over a base in few bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_ft.callbacks import ExactResume
from lightning_ft.callbacks.peft import PEFT
from lightning_ft.export.bake import baked
from lightning_ft.functional.peft_adapters import load_adapter, save_adapter
from lightning_ft.functional.peft_merge import merge
from lightning_ft.modules import SequenceClassification, load_checkpoint
from lightning_ft.plugins import four_bit
from tests.callbacks.test_peft import Stop, batch, fit, logits, make
from tests.pretrained import Kind, pretrained

KINDS: tuple[Kind, ...] = ("bert", "gpt2", "llama")
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1),
    "pissa": lambda: peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"),
    "ia3": lambda: peft.IA3Config(),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {kind: pretrained(root / kind, kind, hf.AutoModelForSequenceClassification) for kind in KINDS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "rows.csv"
    lines = "\n".join(f"{'a good film' if i % 2 else 'bad'} {i} said Anna,{i % 2}" for i in range(16))
    file.write_text(f"text,label\n{lines}\n", encoding="utf-8")
    return str(file)


def qlora(module: Any, rows: str, method: str, *callbacks: Any, ckpt_path: Any = None) -> Trainer:
    plugin = four_bit.FourBit(compute="bf16-mixed", block_size=64)
    return fit(module, rows, PEFT(CONFIGS[method]()), *callbacks, ckpt_path=ckpt_path, plugins=[plugin])


def packed(module: Any) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in module.named_parameters() if not p.is_floating_point()}


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", k) for k in KINDS] + [(m, "bert") for m in CONFIGS if m != "lora"]
)
def test_adapter_and_head_train_over_packed_weights(
    method: str, kind: Kind, folders: dict[str, str], rows: str, tmp_path: Path
) -> None:
    module: SequenceClassification = make(folders[kind])
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    qlora(module, rows, method, ExactResume("1 steps", dirpath=tmp_path / "whole"))
    assert packed(module)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    moved = {
        n for n, p in module.named_parameters() if n in start and p.is_floating_point() and not torch.equal(p, start[n])
    }
    assert moved
    assert moved <= trained  # in bf16 a gradient may round to nothing
    assert all(p.dtype == torch.float32 for p in module.parameters() if p.is_floating_point())
    done = logits(module.model, kind)

    files = tmp_path / "killed"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        qlora(make(folders[kind]), rows, method, ExactResume("1 steps", dirpath=files), Stop())
    again = make(folders[kind])
    qlora(again, rows, method, ExactResume("1 steps", dirpath=files), ckpt_path=files / "last.ckpt")
    assert torch.equal(logits(again.model, kind), done)
    loaded = load_checkpoint(tmp_path / "whole" / "last.ckpt")
    torch.testing.assert_close(logits(loaded.model, kind), done, rtol=1e-5, atol=1e-5)

    if method != "prompt":
        with pytest.raises(ValueError, match=r"layers are quantised .*merge\(module, dequantise=True\)"):
            merge(copy.deepcopy(loaded))
        merged = copy.deepcopy(loaded)
        report = merge(merged, dequantise=True)
        assert report.facts["dequantised"] > 0
        assert merged.state_dict().keys() == make(folders[kind]).state_dict().keys()
        torch.testing.assert_close(logits(merged.model, kind), done, rtol=1e-4, atol=1e-4)
        plain, changes = baked(loaded.model)
        assert changes == ["adapters merged", "quantised weights as floats"]
        torch.testing.assert_close(logits(plain, kind), done, rtol=1e-4, atol=1e-4)
    if method != "pissa":
        save_adapter(module, tmp_path / "adapter")
        over = make(folders[kind])
        load_adapter(over, tmp_path / "adapter")  # over the floating-point base
        assert (logits(over.model, kind) - done).abs().max() < 0.5
        assert batch(kind)


def test_dora_is_refused(folders: dict[str, str], rows: str) -> None:
    with pytest.raises(ValueError, match="DoRA measures the base's weights, which FourBit quantises"):
        fit(make(folders["bert"]), rows, PEFT(peft.LoraConfig(use_dora=True)), plugins=[four_bit.FourBit()])
