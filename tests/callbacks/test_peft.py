"""Methods of peft on four kinds of models: what trains, resumes, is saved, loads, merges and is exported."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_ft.callbacks import ExactResume
from lightning_ft.callbacks.peft import PEFT
from lightning_ft.core.base_weights import base_names
from lightning_ft.data import ClassificationData
from lightning_ft.export import export_hf, export_onnx, load_session
from lightning_ft.functional.alterations import PART
from lightning_ft.functional.peft_adapters import load_adapter, save_adapter
from lightning_ft.functional.peft_merge import merge
from lightning_ft.functional.peft_parts import adapter_parameters
from lightning_ft.modules import SequenceClassification, load_checkpoint
from tests.pretrained import Kind, pretrained
from tests.strangers import identical, outcome

# Of peft and of transformers about each other.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
KINDS: tuple[Kind, ...] = ("bert", "gpt2", "llama", "t5")
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 100}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1),
    "all-linear": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"),
    "dora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True),
    "rslora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, use_rslora=True),
    "pissa": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights="pissa"),
    "adalora": lambda: peft.AdaLoraConfig(task_type="SEQ_CLS", **ADALORA),
    "ia3": lambda: peft.IA3Config(task_type="SEQ_CLS"),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8),
    "tokens": lambda: peft.TrainableTokensConfig(task_type="SEQ_CLS", token_indices=[5, 6, 7]),
}
PROMPTS = ("prefix", "prompt", "p-tuning")
IMPOSSIBLE = {
    **{(method, kind, "merge"): "prompts are no part of the weights" for method in PROMPTS for kind in KINDS},
    **{
        (method, "t5", "peft"): "PeftModel has no prompts for T5ForSequenceClassification, which takes no embeddings"
        for method in PROMPTS
    },
    **{("tokens", kind, "peft"): "TrainableTokensConfig has no place for the head" for kind in KINDS},
}
USUAL = {("lora", kind) for kind in KINDS} | {
    (method, kind) for i, method in enumerate(METHODS) for j, kind in enumerate(KINDS) if (i + j) % 4 == 0
}
"""Cells of the default suite: LoRA on each kind, and each method on one; the others take a minute."""


def cells(usual: set[tuple[str, str]]) -> Any:
    marks = {cell: () if cell in usual else pytest.mark.slow for cell in itertools.product(METHODS, KINDS)}
    return pytest.mark.parametrize(
        ("method", "kind"), [pytest.param(*cell, marks=mark, id="-".join(cell)) for cell, mark in marks.items()]
    )


class Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if (trainer.current_epoch, args[-1]) == (1, 2):
            raise KeyboardInterrupt


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


def make(folder: str, **options: Any) -> SequenceClassification:
    return SequenceClassification(folder, num_labels=2, learning_rate=1e-2, warmup=0, **options)


def fit(module: Any, rows: str, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **settings, **options})
    trainer.fit(
        module, datamodule=ClassificationData(module.base_weights, rows, rows, batch_size=4), ckpt_path=ckpt_path
    )
    return trainer


def batch(kind: Kind) -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 2] = 5  # a token that TrainableTokens trains
    if kind == "t5":
        ids[:, -1] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: Any, kind: Kind) -> Tensor:
    modes = [(child, child.training) for child in model.modules()]
    result: Tensor = model.eval()(**batch(kind)).logits
    for child, mode in modes:
        child.training = mode
    return result


@cells(USUAL)
def test_every_method_on_every_kind(
    method: str, kind: Kind, folders: dict[str, str], rows: str, tmp_path: Path
) -> None:
    callback = PEFT(METHODS[method]())
    plain = make(folders[kind])
    untouched = logits(plain.model, kind)
    whole = make(folders[kind])
    trainer = fit(whole, rows, callback, ExactResume("1 steps", dirpath=tmp_path / "whole"))
    done = logits(whole.model, kind)
    assert not torch.equal(done, untouched)

    # The base stands still, the head and adapters train.
    assert callback.report is not None
    assert 0 < callback.report.facts["trainable share"] < 0.5
    names = base_names(whole)
    before = dict(plain.named_parameters())
    kept = {name.replace(".base_layer", ""): p for name, p in whole.named_parameters() if name in names}
    assert len(kept) > 10
    assert all(torch.equal(parameter, before[name]) for name, parameter in kept.items())
    trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    head = {name for name in trained if name in before}
    assert head
    assert all(not torch.equal(trained[name], before[name]) for name in head)
    assert {p for n, p in trained.items() if n not in head} <= adapter_parameters(whole)

    # Resumes exactly.
    files = tmp_path / "killed"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make(folders[kind]), rows, PEFT(METHODS[method]()), ExactResume("1 steps", dirpath=files), Stop())
    resumed = fit(
        make(folders[kind]),
        rows,
        PEFT(METHODS[method]()),
        ExactResume("1 steps", dirpath=files),
        ckpt_path=files / "last.ckpt",
    )
    assert identical(outcome(trainer), outcome(resumed))

    # Its checkpoint holds its part, and loads over the base.
    path = tmp_path / "whole" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert set(saved[PART]["keys"]) == {n for n in names if n in whole.state_dict()}
    assert not names & saved["state_dict"].keys()
    assert set(trained) <= saved["state_dict"].keys()
    assert torch.equal(logits(load_checkpoint(path).model, kind), done)

    # Its folder, too, here and in peft.
    save_adapter(whole, tmp_path / "adapter")
    loaded = make(folders[kind])
    load_adapter(loaded, tmp_path / "adapter")
    exact = {"rtol": 0, "atol": 1e-5 if method == "pissa" else 0}
    torch.testing.assert_close(logits(loaded.model, kind), done, **exact)
    if (method, kind, "peft") not in IMPOSSIBLE:
        base = hf.AutoModelForSequenceClassification.from_pretrained(folders[kind])
        base.config.pad_token_id = whole.model.config.pad_token_id
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(logits(theirs, kind), done, rtol=1e-5, atol=1e-5)

    # Merged, it is a plain model that computes the same.
    if (method, kind, "merge") in IMPOSSIBLE:
        with pytest.raises(ValueError, match="puts learnt vectors before each text, which no weights can take in"):
            merge(copy.deepcopy(loaded))
        return
    merged = load_checkpoint(path)
    merge(merged)
    assert {n for n, _ in merged.named_parameters()} == set(before)
    torch.testing.assert_close(logits(merged.model, kind), done, rtol=1e-5, atol=1e-5)
    load_checkpoint(path).save_pretrained(tmp_path / "plain")
    opened = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(opened, kind), done, rtol=1e-5, atol=1e-5)


@cells({("lora", "bert"), ("prompt", "bert")})
def test_every_method_is_exported(method: str, kind: Kind, folders: dict[str, str], rows: str, tmp_path: Path) -> None:
    """Prompts, too: they are constants of the graph."""
    module = make(folders[kind])
    fit(module, rows, PEFT(METHODS[method]())).save_checkpoint(tmp_path / "x.ckpt")
    wanted = logits(module.model, kind)
    report = export_onnx(tmp_path / "x.ckpt", tmp_path / "onnx", max_length=16)
    assert report.facts.get("baked") == (None if method in PROMPTS else ["adapters merged"])
    session = load_session(tmp_path / "onnx", threads=1)
    given = batch(kind)
    feed = {i.name: given.get(i.name, torch.zeros_like(given["input_ids"])).numpy() for i in session.get_inputs()}
    (found,) = session.run(["logits"], feed)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=2e-5)
    if method in PROMPTS:
        with pytest.raises(RuntimeError, match=r"what from_pretrained reads differs .*learnt_prompts"):
            export_hf(tmp_path / "x.ckpt", tmp_path / "hf")
        with pytest.raises(ValueError, match="which no weights can take in"):
            module.save_pretrained(tmp_path / "hf")
        return
    export_hf(tmp_path / "x.ckpt", tmp_path / "hf")
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(again, kind), wanted, rtol=1e-5, atol=1e-5)
