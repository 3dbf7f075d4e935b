"""Changes of a model, and checkpoints that hold only what they train."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_ft.callbacks import ExactResume, LayerReinit
from lightning_ft.callbacks._altering import Altering
from lightning_ft.core.base_weights import base_keys, base_names, mark_base
from lightning_ft.data import ClassificationData
from lightning_ft.functional.alterations import ALTERATIONS, PART, alter, alterations, load_altered
from lightning_ft.modules import Architecture, SequenceClassification, load_checkpoint
from tests.alteration import KIND, make_known
from tests.pretrained import pretrained
from tests.strangers import BATCHES, FILTERED, STRANGERS, Stranger, dataset, identical, outcome


class BesideCallback(Callback):
    def __init__(self, seed: int = 0) -> None:
        self._altering = Altering(KIND, {"seed": seed})

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._altering.setup(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._altering.release()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    make_known(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pretrained(tmp_path_factory.mktemp("hf"), "bert", hf.AutoModelForSequenceClassification)


class _Stop(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise KeyboardInterrupt


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# ---- strangers


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda s: s.name)
def test_a_part_resumes_bit_for_bit(stranger: Stranger, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 0.5, "num_sanity_val_steps": 0}
    if stranger.name != "manual":
        options["accumulate_grad_batches"] = 2
    whole = stranger.fit(BesideCallback(), ExactResume("2 steps", dirpath=tmp_path / "whole"), **options)
    names = base_names(whole.lightning_module)
    assert names
    files = tmp_path / "killed"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stranger.fit(BesideCallback(), ExactResume("2 steps", dirpath=files), _Stop(BATCHES - 1), **options)
    saved = _load(files / "last.ckpt")
    assert saved[ALTERATIONS] == [{"kind": KIND, "settings": {"seed": 0}}]
    assert not names & saved["state_dict"].keys()
    assert saved["state_dict"].keys() | names == whole.lightning_module.state_dict().keys()
    resumed = stranger.fit(
        BesideCallback(), ExactResume("2 steps", dirpath=files), ckpt_path=files / "last.ckpt", **options
    )
    assert identical(outcome(whole), outcome(resumed))


def test_weights_alone_remember_the_change(tmp_path: Path) -> None:
    trained = FILTERED.fit(BesideCallback())
    trained.save_checkpoint(tmp_path / "part.ckpt", weights_only=True)
    fresh = FILTERED.module()
    load_altered(fresh, tmp_path / "part.ckpt")
    tokens = dataset().tensors[0]
    assert torch.equal(fresh.eval()(tokens), trained.lightning_module.eval()(tokens))
    load_altered(fresh, tmp_path / "part.ckpt")  # once more into what is altered already
    assert alterations(fresh) == [{"kind": KIND, "settings": {"seed": 0}}]
    assert not any(p.requires_grad for name, p in fresh.named_parameters() if name in base_names(fresh))


def test_another_base_is_refused(tmp_path: Path) -> None:
    FILTERED.fit(BesideCallback()).save_checkpoint(tmp_path / "part.ckpt")
    other = FILTERED.module()
    with torch.no_grad():
        other.encoder.norm.bias += 1
    with pytest.raises(ValueError, match=r"was trained over base weights with sha256 \w{16}….*same pretrained weights"):
        load_altered(other, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"was trained over base weights"):
        FILTERED.fit(BesideCallback(), module=other, ckpt_path=tmp_path / "part.ckpt", max_epochs=3)


def test_a_model_changed_otherwise_is_refused(tmp_path: Path) -> None:
    FILTERED.fit(BesideCallback()).save_checkpoint(tmp_path / "part.ckpt")
    FILTERED.fit().save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"changed by beside\(\{'seed': 0\}\).*changed by beside\(\{'seed': 1\}\)"):
        FILTERED.fit(BesideCallback(1), ckpt_path=tmp_path / "part.ckpt", max_epochs=3)
    with pytest.raises(ValueError, match=r"changed by nothing, and this one is changed by beside"):
        FILTERED.fit(BesideCallback(), ckpt_path=tmp_path / "plain.ckpt", max_epochs=3)
    changed = FILTERED.module()
    alter(changed, KIND, {"seed": 1})
    with pytest.raises(ValueError, match="holds a model changed by beside"):
        load_altered(changed, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"kind='no' is no change.*'beside'"):
        alter(FILTERED.module(), "no", {})


def test_a_second_fit_does_not_change_the_model_again() -> None:
    trainer = FILTERED.fit(BesideCallback())
    FILTERED.fit(BesideCallback(), module=trainer.lightning_module)
    assert len(alterations(trainer.lightning_module)) == 1


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    original = FILTERED.module()
    alter(original, KIND, {"seed": 0})
    copied = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(2)
    checkpoint = {"state_dict": copied.state_dict()}
    copied.on_save_checkpoint(checkpoint)
    mine = {"state_dict": original.state_dict()}
    original.on_save_checkpoint(mine)
    assert checkpoint[PART]["sha256"] != mine[PART]["sha256"]  # type: ignore[index]
    copied.on_load_checkpoint(checkpoint)
    assert all((value == 2).all() for value in checkpoint["state_dict"].values())


def test_the_hash_is_of_the_base_as_it_is_now_and_hooks_of_the_module_run() -> None:
    module, seen = FILTERED.module(), []
    type(module).on_load_checkpoint = lambda self, checkpoint: seen.append(checkpoint)
    try:
        alter(module, KIND, {"seed": 0})
        first: dict[str, Any] = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(first)
        with torch.no_grad():
            module.encoder.norm.bias += 1
        second: dict[str, Any] = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(second)
        assert first[PART]["sha256"] != second[PART]["sha256"]
        module.on_load_checkpoint(second)
    finally:
        del type(module).on_load_checkpoint
    assert seen == [second]


# ---- modules of lightning_ft


def _data(folder: str, tmp_path: Path) -> ClassificationData:
    rows = "\n".join(f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(16))
    file = tmp_path / "rows.csv"
    file.write_text(f"text,label\n{rows}\n", encoding="utf-8")
    return ClassificationData(folder, str(file), str(file), batch_size=4)


def _fit(module: LightningModule, data: ClassificationData, *callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **{**quiet, **options})
    trainer.fit(module, datamodule=data)
    return trainer


def _logits(module: SequenceClassification, data: ClassificationData) -> Tensor:
    with torch.no_grad():
        return module.eval()(next(iter(data.val_dataloader())))


def test_the_pretrained_folder_is_the_base(folder: str, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "base")
    data = _data(folder, tmp_path)
    module = SequenceClassification(moved, num_labels=2, learning_rate=1e-2)
    trainer = _fit(module, data, BesideCallback())
    trainer.save_checkpoint(path := tmp_path / "part.ckpt")
    saved = _load(path)
    assert saved[PART]["base"] == str(moved)
    assert set(saved[PART]["keys"]) == base_names(module)
    assert {name.rpartition(".")[2] for name in saved["state_dict"]} <= {"up", "down", "weight", "bias"}
    loaded = load_checkpoint(path)
    assert torch.equal(_logits(loaded, data), _logits(module, data))
    assert loaded.base_weights == str(moved)
    # Tested with the callback, and refused without it.
    quiet = Trainer(accelerator="cpu", logger=False, callbacks=[BesideCallback()], enable_progress_bar=False)
    assert quiet.test(SequenceClassification(moved, num_labels=2), data.val_dataloader(), ckpt_path=path, verbose=False)
    bare = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="this one is changed by nothing: use the same callbacks"):
        bare.test(SequenceClassification(moved, num_labels=2), data.val_dataloader(), ckpt_path=path, verbose=False)
    # Trained on from there, it is still only a part.
    _fit(loaded.train(), data, BesideCallback()).save_checkpoint(tmp_path / "again.ckpt")
    assert _load(tmp_path / "again.ckpt")[PART]["base"] == str(moved)
    shutil.rmtree(moved)
    with pytest.raises(FileNotFoundError, match=r"not there any more.*load_altered"):
        load_checkpoint(path)
    elsewhere = SequenceClassification(folder, num_labels=2)
    load_altered(elsewhere, path)
    assert torch.equal(_logits(elsewhere, data), _logits(module, data))


def test_what_the_folder_does_not_hold_is_kept(folder: str, tmp_path: Path) -> None:
    data = _data(folder, tmp_path)
    module = SequenceClassification(folder, num_labels=2, learning_rate=1e-2)
    _fit(module, data)  # all of it trains
    trainer = _fit(module, data, BesideCallback())
    trainer.save_checkpoint(path := tmp_path / "part.ckpt")
    saved = _load(path)
    assert PART not in saved
    assert saved["state_dict"].keys() == module.state_dict().keys()
    assert torch.equal(_logits(load_checkpoint(path), data), _logits(module, data))


def test_without_a_folder_all_is_kept(folder: str, tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    data = _data(folder, tmp_path)
    module = SequenceClassification(Architecture(config, tokenizer), num_labels=2)
    _fit(module, data, BesideCallback()).save_checkpoint(path := tmp_path / "whole.ckpt")
    assert PART not in _load(path)
    assert torch.equal(_logits(load_checkpoint(path), data), _logits(module, data))


def test_layers_drawn_anew_train_and_are_kept(folder: str, tmp_path: Path) -> None:
    data = _data(folder, tmp_path)
    module = SequenceClassification(folder, num_labels=2)
    _fit(module, data, LayerReinit(1, pooler=False), BesideCallback()).save_checkpoint(path := tmp_path / "part.ckpt")
    top = [name for name, p in module.named_parameters() if ".layer.2." in name and p.requires_grad and "base" in name]
    assert top
    assert set(top) <= _load(path)["state_dict"].keys()
    assert torch.equal(_logits(load_checkpoint(path), data), _logits(module, data))


# ---- marks


def test_tied_and_quantised_parameters() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
            self.bias = nn.Parameter(torch.ones(2))

    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2), "low": Quantised()})
    model["two"].weight = model["one"].weight
    mark_base(model, [model["one"].weight, model["low"].weight])
    assert base_names(model) == {"one.weight", "two.weight", "low.weight"}
    keys = [*model.state_dict(), "low.weight.absmax", "low.SCB", "lower.x"]
    assert base_keys(model, keys) == {"one.weight", "two.weight", "low.weight", "low.weight.absmax", "low.SCB"}
