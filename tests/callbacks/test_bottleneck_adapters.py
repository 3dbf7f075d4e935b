from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_ft.callbacks import ExactResume
from lightning_ft.callbacks.adapter_fusion import AdapterFusion
from lightning_ft.callbacks.bit_fit import BitFit
from lightning_ft.callbacks.bottleneck_adapters import BottleneckAdapters
from lightning_ft.core.base_weights import base_names
from lightning_ft.data import LanguageModelingData
from lightning_ft.export import export_onnx
from lightning_ft.functional.adapter_files import load_adapter, read_adapter
from lightning_ft.functional.adapter_layers import BottleneckConfig
from lightning_ft.functional.alterations import PART, alterations, load_altered
from lightning_ft.functional.bottleneck import active_adapters
from lightning_ft.functional.invertible_adapter import all_couplings
from lightning_ft.modules import CausalLM, MaskedLM, SequenceClassification, load_checkpoint
from tests import methods
from tests.methods import KINDS, Method, measure
from tests.pretrained import CORPUS, pretrained
from tests.ranks import run_ranks
from tests.strangers import BATCHES, FILTERED, STRANGERS, Stranger, dataset, identical, outcome, weights

SMALL = BottleneckConfig(2)
each_stranger = pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.name)


def adapters(*names: str, **arguments: Any) -> Callable[[], Callback]:
    return lambda: BottleneckAdapters(*names, **{"config": SMALL, **arguments})  # type: ignore[arg-type]


MADE: dict[str, Callable[[], Callback]] = {
    "pfeiffer": adapters(),
    "houlsby": adapters("houlsby", train_norms=True),
    "parallel": adapters("parallel"),
    "mad-x": adapters("mad-x"),
    "bit-fit": BitFit,
}
# The rows of the table of methods.
WITHOUT = "BitFit trains biases"
ROWS: dict[str, Method] = {
    "Pfeiffer": Method(lambda: ([BottleneckAdapters(config=BottleneckConfig(4))], [])),
    "Houlsby": Method(lambda: ([BottleneckAdapters("houlsby", config=BottleneckConfig(4), train_norms=True)], [])),
    "parallel adapter": Method(lambda: ([BottleneckAdapters("parallel")], [])),
    "MAD-X": Method(lambda: ([BottleneckAdapters("mad-x")], [])),
    "BitFit": Method(lambda: ([BitFit()], []), impossible={(kind, "share"): WITHOUT for kind in ("llama", "t5")}),
}
# In the default suite each method, each kind, and a graph of the two that change the most.
QUICK = {("Pfeiffer", "llama"), ("Houlsby", "t5"), ("parallel adapter", "gpt2"), ("MAD-X", "bert"), ("BitFit", "bert")}
EXPORTED = {("MAD-X", "bert"), ("parallel adapter", "gpt2")}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(n, k, marks=() if (n, k) in QUICK or ROWS[n].impossible else pytest.mark.slow)
        for n in ROWS
        for k in KINDS
    ],
)
def test_the_table(name: str, kind: Any, request: pytest.FixtureRequest) -> None:
    slow = request.node.get_closest_marker("slow") is not None
    row = measure(ROWS[name], kind, exports=slow or (name, kind) in EXPORTED)
    if ROWS[name].reason(kind, "share") is None:
        assert row["trains"] is row["resumes"] is row["reloads"] is True
        assert row["share"] < 0.15
        assert row["saves"] == pytest.approx(row["share"], rel=0.15)


# ---- strangers


class Stop(Callback):
    """Kills the run on the first epoch's last batch."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if args[-1] == BATCHES - 1:
            raise KeyboardInterrupt


@each_stranger
@pytest.mark.parametrize("name", MADE)
def test_a_stranger_trains_its_part_and_resumes_bit_for_bit(name: str, stranger: Stranger, tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 0.5, "num_sanity_val_steps": 0}
    if stranger.name != "manual":
        options["accumulate_grad_batches"] = 2

    start = weights(stranger.fit(max_epochs=0).lightning_module)
    whole = stranger.fit(MADE[name](), ExactResume("2 steps", dirpath=tmp_path / "whole"), **options)
    module = whole.lightning_module
    base, trained = base_names(module), weights(module)
    assert base
    assert all(torch.equal(trained[n], start[n]) for n in base)
    moved = {n for n, p in module.named_parameters() if p.requires_grad and not torch.equal(p, start.get(n, p * 0))}
    assert moved == {n for n, p in module.named_parameters() if p.requires_grad}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stranger.fit(MADE[name](), ExactResume("2 steps", dirpath=tmp_path / "cut"), Stop(), **options)
    file = tmp_path / "cut" / "last.ckpt"
    saved = torch.load(file, weights_only=True)
    assert not base & saved["state_dict"].keys()
    assert set(saved[PART]["keys"]) == base
    resumed = stranger.fit(MADE[name](), ExactResume("2 steps", dirpath=tmp_path / "cut"), ckpt_path=file, **options)
    assert identical(outcome(whole), outcome(resumed))


def test_evaluation_loads_a_part(tmp_path: Path) -> None:
    trainer = FILTERED.fit(MADE["houlsby"]())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    wanted = trainer.lightning_module.eval()(dataset().tensors[0])
    fresh = FILTERED.module()
    load_altered(fresh, tmp_path / "part.ckpt")
    assert torch.equal(fresh.eval()(dataset().tensors[0]), wanted)
    again = FILTERED.module()
    tester = FILTERED.trainer([MADE["houlsby"]()])
    tester.test(again, ckpt_path=tmp_path / "part.ckpt", verbose=False)
    assert torch.equal(again.eval()(dataset().tensors[0]), wanted)


def test_layers_that_a_later_step_replaced_are_noticed() -> None:
    class Replace(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            layer = pl_module.encoder.layers[0]
            old, layer.linear2 = layer.linear2, torch.nn.Linear(16, 8)
            layer.linear2.adapters = old.adapters

    with pytest.raises(RuntimeError, match=r"linear2 has adapters and does not call them"):
        FILTERED.fit(MADE["pfeiffer"](), Replace())


def test_arguments() -> None:
    with pytest.raises(ValueError, match="kind='x' must be one of"):
        BottleneckAdapters("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"save= writes adapters alone"):
        BottleneckAdapters(train_norms=True, save="folder")
    with pytest.raises(ValueError, match="must be the folders of two adapters or more"):
        AdapterFusion(["one"])
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        FILTERED.fit(BottleneckAdapters(below=["nowhere"]))


# ---- MAD-X and fusion, from folders


def _languages(place: Path, *names: str, kind: str = "mad-x") -> list[str]:
    for seed, name in enumerate(names):
        config = BottleneckConfig(2, seed=seed)
        FILTERED.fit(BottleneckAdapters(kind, name=name, config=config, save=place / name))  # type: ignore[arg-type]
    return [str(place / name) for name in names]


def test_a_task_is_stacked_on_a_language_and_the_language_swapped(tmp_path: Path) -> None:
    english, german = _languages(tmp_path, "en", "de")
    task = BottleneckAdapters(name="task", below=[english], config=SMALL)
    trainer = FILTERED.fit(task, ExactResume(dirpath=tmp_path))
    module = trainer.lightning_module
    assert active_adapters(module) == ["en", "task"]
    held = read_adapter(english).tensors
    assert torch.equal(held["block.0.0.up.weight"], module.encoder.layers[0].linear2.adapters.en.up.weight)
    assert held["embeddings.first.up.weight"].any()
    assert not any(p.requires_grad for n, p in module.named_parameters() if ".en." in n)
    before = weights(module)
    load_adapter(module, german, name="en")
    after = weights(module)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if ".adapters.en." in n}
    # The next fit with the same callbacks does not bring the first language back.
    FILTERED.fit(task, module=module, max_epochs=1)
    assert all(torch.equal(value, after[n]) for n, value in weights(module).items() if ".en." in n)
    # A checkpoint needs the language's folder no more.
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {n for n in saved["state_dict"] if ".en." in n} == {n for n in before if ".en." in n}
    fresh = FILTERED.module()
    load_altered(fresh, tmp_path / "last.ckpt")
    assert identical(weights(fresh), before)
    assert active_adapters(fresh) == ["en", "task"]
    assert all_couplings(fresh)[0].active == ["en"]


def test_a_fusion_trains_and_resumes(tmp_path: Path) -> None:
    one, two = _languages(tmp_path, "one", "two", kind="houlsby")
    (language,) = _languages(tmp_path, "lang")

    def fusion() -> AdapterFusion:
        return AdapterFusion([one, two], below=[language])

    whole = FILTERED.fit(fusion(), ExactResume("2 steps", dirpath=tmp_path / "whole"))
    module = whole.lightning_module
    assert active_adapters(module) == ["lang", ["one", "two"]]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n.partition(".fusion.")[2] for n in trained if ".fusion." in n} == {
        *("query.weight", "query.bias", "key.weight", "key.bias", "value_delta")
    }
    assert {n for n in trained if ".fusion." not in n} == {"classifier.weight", "classifier.bias"}
    assert module.encoder.layers[2].linear2.adapters.fusion.value_delta.any()
    assert torch.equal(
        module.encoder.layers[0].self_attn.adapters.two.up.weight, read_adapter(two).tensors["block.0.0.up.weight"]
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        FILTERED.fit(fusion(), ExactResume("2 steps", dirpath=tmp_path / "cut"), Stop())
    resumed = FILTERED.fit(
        fusion(), ExactResume("2 steps", dirpath=tmp_path / "cut"), ckpt_path=tmp_path / "cut" / "last.ckpt"
    )
    assert identical(outcome(whole), outcome(resumed))
    fresh = FILTERED.module()
    load_altered(fresh, tmp_path / "whole" / "last.ckpt")
    assert identical(weights(fresh), weights(module))
    assert [record["kind"] for record in alterations(fresh)] == ["frozen_adapters", "adapter_fusion"]
    with pytest.raises(ValueError, match=r"the names one, one must differ: pass them as \{name: folder\}"):
        FILTERED.fit(AdapterFusion([one, one]))
    renamed = FILTERED.fit(AdapterFusion({"a": one, "b": one}), max_steps=1).lightning_module
    assert active_adapters(renamed) == [["a", "b"]]


@pytest.mark.parametrize("kind", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_language_adapter_of_our_masked_lm_serves_a_classifier(kind: Any, tmp_path: Path) -> None:
    """Trained by MLM over a tied output layer; the part is small; then under a task, whose graph is exported."""
    auto = hf.AutoModelForMaskedLM if kind == "bert" else hf.AutoModelForCausalLM
    folder = pretrained(tmp_path / "lm", kind, auto)
    texts = Dataset.from_dict({"text": CORPUS * 2})
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 2}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False}
    objective: Any = "mlm" if kind == "bert" else "clm"
    data = LanguageModelingData(folder, texts, texts, objective=objective, batch_size=2, max_length=24)
    module: Any = (MaskedLM if kind == "bert" else CausalLM)(folder, learning_rate=1e-2)
    trainer = Trainer(**quiet, callbacks=[BottleneckAdapters("mad-x", name="lang", save=tmp_path / "lang")])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "lm.ckpt")
    couplings = all_couplings(module)[0]
    assert couplings.get_submodule("lang").first.up.weight.any()  # type: ignore[union-attr, operator]
    saved = torch.load(tmp_path / "lm.ckpt", weights_only=True)["state_dict"]
    assert not any("word_embeddings.weight" in n or n.endswith("wte.weight") for n in saved)
    ids = {"input_ids": torch.arange(5, 15)[None]}
    reloaded = load_checkpoint(tmp_path / "lm.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(reloaded.model(**ids).logits, module.eval().model(**ids).logits)

    method = Method(lambda: ([BottleneckAdapters(name="task", below=[tmp_path / "lang"])], []))
    task = SequenceClassification(folder, ["0", "1"], learning_rate=1e-2)
    trainer = Trainer(**quiet, callbacks=method.make()[0])
    trainer.fit(task, datamodule=methods.data(kind))
    trainer.save_checkpoint(tmp_path / "task.ckpt")
    assert active_adapters(task) == ["lang", "task"]
    export_onnx(tmp_path / "task.ckpt", tmp_path / "onnx", max_length=16)


# ---- two processes


def ranks() -> dict[str, Any]:
    """All trained weights after a DDP run, of this rank."""
    strategy = DDPStrategy(process_group_backend="gloo")
    callback = BottleneckAdapters("mad-x", config=SMALL)
    trainer = FILTERED.fit(callback, strategy=strategy, devices=2, max_epochs=1, limit_val_batches=0)
    return {n: p.detach().clone() for n, p in trainer.lightning_module.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_hold_the_same(tmp_path: Path) -> None:
    first, second = run_ranks("tests.callbacks.test_bottleneck_adapters:ranks", tmp_path)
    assert identical(first, second)
    assert all(value.any() for name, value in first.items() if name.endswith("up.weight"))
