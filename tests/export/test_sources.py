"""Sources whose weights are computed as they run, averaged, or several: the graph against the source's answers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_ft.callbacks import EMA, CheckpointAverage, LayerRemoval, SnapshotEnsemble, WiSEFT
from lightning_ft.export import ExportError, ParityError, Predictor, export_hf, export_onnx, load_session, verify
from lightning_ft.export.bake import baked
from lightning_ft.functional.layer_removal import remove_layers
from lightning_ft.modules import QuestionAnswering, SequenceClassification
from tests.export.test_export_onnx import tiny_model, tiny_tokenizer
from tests.export.test_heads import _bert, _words

FALLBACK = importlib.import_module("lightning_ft.export.fallback")
# Of peft, about transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"], "init_lora_weights": False}


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that may not change."""
    return {
        "modules": [(name, id(child), type(child), child.training) for name, child in module.named_modules()],
        "tensors": [(name, id(t), t.clone()) for name, t in [*module.named_parameters(), *module.named_buffers()]],
        "hooks": [len(child._forward_pre_hooks) for child in module.modules()],
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"]
    assert before["hooks"] == after["hooks"]
    for (name, key, old), (other, other_key, new) in zip(before["tensors"], after["tensors"], strict=True):
        assert (name, key) == (other, other_key)
        assert torch.equal(old, new)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (5, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, 5):
        mask[row, 13 - 2 * row :] = 0
    ids[mask == 0] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def logits(folder: Path) -> np.ndarray[Any, Any]:
    session = load_session(folder, threads=1)
    feed = {entry.name: batch()[entry.name].numpy() for entry in session.get_inputs()}
    (found,) = session.run(["logits"], feed)
    assert np.ptp(found) > 0.01
    result: np.ndarray[Any, Any] = found
    return result


def close(folder: Path, wanted: Tensor) -> None:
    np.testing.assert_allclose(logits(folder), wanted.detach().numpy(), rtol=1e-5, atol=2e-5)


@torch.no_grad()
def usual(model: nn.Module) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    result: Tensor = model(**batch()).logits
    for module, mode in modes:
        module.training = mode
    return result


# ---- adapters, masks, parametrisations, compiled parts


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["classifier"]))


def with_two_kinds(model: nn.Module) -> nn.Module:
    """An adapter by transformers' own hand, and IA3's factors are no products."""
    model.add_adapter(peft.LoraConfig(**LORA))  # type: ignore[operator]
    return model


def with_ia3(model: nn.Module) -> nn.Module:
    settings = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    made: nn.Module = peft.get_peft_model(model, peft.IA3Config(**settings, init_ia3_weights=False))
    return made


def pruned(model: Any) -> nn.Module:
    for layer in model.bert.encoder.layer:
        prune.l1_unstructured(layer.intermediate.dense, "weight", 0.5)
        prune.ln_structured(layer.output.dense, "weight", 0.25, n=2, dim=0)
    prune.random_unstructured(model.classifier, "bias", 1)
    model(**batch())  # layers now hold weights that autograd knows of
    return model


def parametrised(model: Any) -> nn.Module:
    parametrizations.weight_norm(model.classifier)
    parametrizations.spectral_norm(model.bert.encoder.layer[0].output.dense)
    parametrizations.orthogonal(model.bert.pooler.dense)
    return model


def compiled_inside(model: Any) -> nn.Module:
    model.bert.encoder.layer[1] = torch.compile(model.bert.encoder.layer[1], backend="eager")
    model.bert.pooler.compile(backend="eager")
    return model


def compiled(model: Any) -> nn.Module:
    return torch.compile(model, backend="eager")


CHANGES = {
    "lora": (with_lora, "adapters merged"),
    "transformers' adapter": (with_two_kinds, "adapters merged"),
    "ia3": (with_ia3, "adapters merged"),
    "pruned": (pruned, "pruning applied"),
    "parametrised": (parametrised, "parametrisations applied"),
    "compiled": (compiled, None),
    "compiled inside": (compiled_inside, "compiled parts as they were written"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_baked(change: str, tmp_path: Path) -> None:
    make, done = CHANGES[change]
    model = make(tiny_model())
    model.train()
    before, wanted = state_of(model), usual(model)
    report = export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
    assert_unchanged(before, state_of(model))
    close(tmp_path / "out", wanted)
    assert report.facts.get("baked") == ([done] if done else None)
    assert report.facts["worst relative difference"] <= 1e-5
    assert report.facts["exporter"] == "torch"
    # A Hugging Face folder of the same opens with plain weights.
    export_hf(model, tmp_path / "hf")
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(usual(again), wanted, rtol=1e-5, atol=2e-5)
    assert_unchanged(before, state_of(model))


def test_adapters_inside_a_module_of_ours(tmp_path: Path) -> None:
    module = SequenceClassification(_bert(), ["no", "yes"])
    plain = usual(module.model)
    module.model = with_lora(module.model)  # type: ignore[assignment]
    wanted = usual(module.model)
    assert (wanted - plain).abs().max() > 0.01
    export_onnx(module, tmp_path / "out", max_length=8)
    close(tmp_path / "out", wanted)
    verify(tmp_path / "out", source=module)
    compiled_module = torch.compile(module, backend="eager")
    export_onnx(compiled_module, tmp_path / "out", max_length=8)
    close(tmp_path / "out", wanted)


def test_a_wrong_merge_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity is with the unmerged model."""
    model = with_lora(tiny_model())
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda self, **_: None)
    with pytest.raises(ParityError, match="differs from the model"):
        export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)


def test_adapters_that_cannot_be_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    prompted = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(**settings))
    with pytest.raises(ValueError, match=r"source: PROMPT_TUNING puts learnt vectors before each text.*train LoRA"):
        export_onnx(prompted, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)

    def refuse(self: Any, **_: Any) -> None:
        raise NotImplementedError("not this one")

    model = with_lora(tiny_model())
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", refuse)
    with pytest.raises(ValueError, match=r"adapter Linear at .*query cannot be merged .*\(not this one\): export"):
        export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)


def test_nothing_is_copied_without_need() -> None:
    model = tiny_model()
    assert baked(model) == (model, [])


def test_ties_outlive_a_copy() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
            self.other.weight = self.one.weight
            parametrize.register_parametrization(nn.Linear(1, 1), "weight", nn.Identity())
            prune.random_unstructured(self.one, "bias", 0.5)

    copied, _ = baked(Tied())
    assert copied.one.weight is copied.other.weight  # type: ignore[union-attr]


# ---- depth


def test_removed_layers(tmp_path: Path) -> None:
    model = tiny_model()
    remove_layers(model, "top:1")
    export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
    close(tmp_path / "out", usual(model))
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 1
    by_hand: Any = tiny_model()
    del by_hand.bert.encoder.layer[1]
    with pytest.raises(ValueError, match=r"configuration says 2 layers, and bert.encoder.layer has 1: .*remove_layers"):
        export_onnx(by_hand, tmp_path / "no", tokenizer=tiny_tokenizer(), max_length=8)


# ---- what callbacks leave


def fit(folder: Path, *callbacks: Any) -> tuple[Trainer, SequenceClassification]:
    torch.manual_seed(0)
    module = SequenceClassification(_bert(), ["no", "yes"], learning_rate=0.01)
    rows = batch()
    data = [{**{n: v[i] for n, v in rows.items()}, "labels": torch.tensor(i % 2)} for i in range(4)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    return trainer, module


@pytest.mark.parametrize("callback", [EMA(0.5), CheckpointAverage(), LayerRemoval("top:1"), WiSEFT(0.5)])
def test_checkpoint_holds_what_the_callback_says(callback: Any, tmp_path: Path) -> None:
    trainer, module = fit(tmp_path, callback)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    report = export_onnx(path, tmp_path / "out", max_length=8)
    close(tmp_path / "out", usual(module.model))  # after the fit the module holds it
    name = type(callback).__name__
    assert report.facts.get("averaged") == (name if name in ("EMA", "CheckpointAverage") else None)
    assert verify(tmp_path / "out", source=path).facts["parity"] <= 1e-5
    if name == "WiSEFT":
        export_onnx(callback.checkpoint(trainer), tmp_path / "out", max_length=8)
        close(tmp_path / "out", usual(module.model))


def test_a_checkpoint_from_before_the_mean_says_so(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LambdaCallback

    path = tmp_path / "early.ckpt"
    save = LambdaCallback(on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(path))
    _, module = fit(tmp_path, CheckpointAverage(), save)
    report = export_onnx(path, tmp_path / "out", max_length=8)
    assert report.facts["averaged"] == (
        "no: written before CheckpointAverage put its mean in; take the checkpoint of the end"
    )
    assert np.abs(logits(tmp_path / "out") - usual(module.model).numpy()).max() > 1e-3


def test_averaged_model_of_torch(tmp_path: Path) -> None:
    model = tiny_model()
    mean = AveragedModel(model)
    with torch.no_grad():
        model.classifier.weight += 1
    mean.update_parameters(model)
    mean.update_parameters(model)
    export_onnx(mean, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
    close(tmp_path / "out", usual(mean.module))


def test_snapshot_ensemble(tmp_path: Path) -> None:
    """One graph against what the callback answers in `trainer.predict`."""
    callback = SnapshotEnsemble(cycles=2)
    trainer, module = fit(tmp_path, callback)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    rows = [{n: v[i] for n, v in batch().items()} for i in range(5)]
    (answers,) = trainer.predict(module, DataLoader(rows, batch_size=5))
    report = export_onnx(path, tmp_path / "out", members=tmp_path / "snapshots", max_length=8)
    probabilities = torch.from_numpy(logits(tmp_path / "out")).softmax(-1)
    wanted = torch.tensor(answers["probabilities"])
    torch.testing.assert_close(probabilities, wanted, rtol=1e-5, atol=1e-6)
    alone = usual(module.model).softmax(-1)
    assert (alone - wanted).abs().max() > 1e-4
    assert report.facts["members"] == 2
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").architectures == ["BertForSequenceClassification"]
    ids = [5, 6, 50, 17, 8]
    feed = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, 5), int),
        "token_type_ids": np.zeros((1, 5), int),
    }
    (found,) = load_session(tmp_path / "out", threads=1).run(["logits"], feed)
    answer = Predictor(tmp_path / "out")(" ".join(f"w{i}" for i in ids))["probabilities"]
    np.testing.assert_allclose(answer, np.exp(found[0]) / np.exp(found[0]).sum(), atol=1e-6)
    verify(tmp_path / "out", source=path, members=tmp_path / "snapshots")
    # One of them, by name, is a model.
    one = [tmp_path / "snapshots" / "cycle_002.safetensors"]
    export_onnx(path, tmp_path / "one", members=one, max_length=8)
    np.testing.assert_allclose(torch.from_numpy(logits(tmp_path / "one")).softmax(-1).numpy(), alone.numpy(), atol=1e-5)


def test_ensembles_that_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = SequenceClassification(_bert(), ["no", "yes"])
    with pytest.raises(FileNotFoundError, match="members: expected the folder of a SnapshotEnsemble"):
        export_onnx(module, tmp_path / "out", members=tmp_path, max_length=8)
    save_file({"other": torch.ones(1)}, tmp_path / "cycle_001.safetensors")
    with pytest.raises(FileNotFoundError, match=r"without .*base\.safetensors"):
        export_onnx(module, tmp_path / "out", members=tmp_path, max_length=8)
    save_file({"other": torch.ones(1)}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"members: .*cycle_001.safetensors holds other \(1,\), which is not in"):
        export_onnx(module, tmp_path / "out", members=tmp_path, max_length=8)
    with pytest.raises(TypeError, match="members: they are snapshots of a LightningModule, and BertFor"):
        export_onnx(tiny_model(), tmp_path / "out", members=tmp_path, tokenizer=tiny_tokenizer(), max_length=8)
    questions = QuestionAnswering(_bert())
    bias = {"model.qa_outputs.bias": torch.ones(2)}
    for name in ("base", "cycle_001"):
        save_file(bias, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="an ensemble averages one tensor of logits, and this head gives start_logits"):
        export_onnx(questions, tmp_path / "out", members=tmp_path, max_length=8)


# ---- the second exporter


@pytest.mark.parametrize("head", ["text-classification", "question-answering", "feature-extraction"])
def test_the_second_exporter(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no decomposition")

    monkeypatch.setattr(FALLBACK, "trace", fail)
    from tests.export.test_heads import assert_equal, make

    model, lines = make(head, "bert"), []
    report = export_onnx(model, tmp_path / "out", tokenizer=_words(), max_length=24, progress=lines.append)
    assert report.facts["exporter"] == "transformers"
    assert any("torch.onnx.export failed (RuntimeError: no decomposition)" in line for line in lines)
    for rows, length in ((6, 19), (1, 31), (4, 24)):
        assert_equal(tmp_path / "out", model, head, rows=rows, length=length, left=False)
    axes = {entry.name: entry.shape for entry in load_session(tmp_path / "out").get_inputs()}
    assert axes["input_ids"] == ["batch", "sequence"]
    raw = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b".py" not in raw


def test_both_exporters_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(which: str) -> Any:
        def raising(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{which} cannot")

        return raising

    monkeypatch.setattr(FALLBACK, "trace", fail("the first"))
    monkeypatch.setattr("transformers.exporters.OnnxExporter.export_program", fail("the second"))
    message = r"no exporter makes a graph of BertFor.*RuntimeError: the first cannot; .*RuntimeError: the second cannot"
    with pytest.raises(ExportError, match=message):
        export_onnx(tiny_model(), tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
    assert not list(tmp_path.iterdir())
