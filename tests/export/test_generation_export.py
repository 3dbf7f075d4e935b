"""Models that write text as graphs: equal to the model, to its module's predictions, and judged in fewer bits."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers as hf

from lightning_ft.data import LanguageModelingData, Seq2SeqData
from lightning_ft.export import Gate, ParityError, Predictor, export_onnx
from lightning_ft.export.generation import CausalDecoder, GenerationSettings
from lightning_ft.export.generative_graphs import CausalGraphs, Seq2SeqGraphs, generation_settings
from lightning_ft.export.heads import own_head
from lightning_ft.export.judge import drop, judge
from lightning_ft.export.quantize import quantizable, quantize
from lightning_ft.modules import CausalLM, Seq2Seq
from tests.export.conftest import Written
from tests.export.test_export_onnx import tiny_tokenizer
from tests.export.test_heads import LLAMA, SETTINGS
from tests.pretrained import CORPUS, pretrained

open_cpu = partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])


def generator(made: Written, max_length: int | None = None, **generation: Any) -> Predictor:
    return Predictor(made.folder, max_length=max_length, settings={"generation": generation})


# ---- graphs


def causal(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 40}
    given = SETTINGS.get(family, LLAMA)
    return hf.AutoModelForCausalLM.from_config(
        hf.AutoConfig.for_model(family, **{**common, "initializer_range": 0.2, **given, **options})
    )


def left_tokenizer() -> hf.PreTrainedTokenizerFast:
    return tiny_tokenizer(types=False, side="left", bos_token="w2", eos_token="w3")


STRANGERS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},  # positions of its own making
    "bloom": {"n_layer": 2, "n_head": 4},  # no position_ids at all
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},  # windows
    "gpt_neox": {},
    "mistral": {"sliding_window": 8},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in STRANGERS]


@pytest.mark.parametrize("family", ["qwen3", *SLOW])
def test_steps_equal_the_whole_text(family: str, tmp_path: Path) -> None:
    """Prompts of different lengths, padded on the left, read in pieces, against each text read alone at once."""
    model = causal(family, **STRANGERS.get(family, {})).eval()
    report = export_onnx(model, tmp_path / "out", tokenizer=left_tokenizer(), max_length=24)
    assert len(report.rows) == 10
    assert report.facts["written alike"]["tokens"] > 50
    session = open_cpu(tmp_path / "out" / "model.onnx")
    ids = torch.randint(4, 60, (3, 21), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :14] = 0, 0
    decoder = CausalDecoder(session)
    numbers, real = ids.where(mask.bool(), 1).numpy(), mask.numpy()
    parts = [decoder.begin(numbers[:, :15], real[:, :15], every=True)]
    for begin, end in ((15, 18), (18, 19), (19, 20), (20, 21)):
        parts.append(decoder.extend(numbers[:, begin:end], every=True))
    got = np.concatenate(parts, 1)
    for row, padding in enumerate((0, 6, 14)):
        with torch.inference_mode():
            wanted = model(input_ids=ids[row : row + 1, padding:]).logits[0].numpy()
        np.testing.assert_allclose(got[row, padding:], wanted, rtol=1e-4, atol=5e-5)
    assert np.ptp(got) > 1
    # Of a prompt, the last token's logits alone leave the graph.
    last = decoder.begin(numbers[:, :15], real[:, :15])
    np.testing.assert_allclose(last, parts[0][:, -1], rtol=1e-5, atol=1e-5)


def test_axes_and_settings(written: Callable[[str], Written]) -> None:
    made = written("llama")
    shapes = {entry.name: entry.shape for entry in open_cpu(made.folder / "model.onnx").get_inputs()}
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["logits_to_keep"] == ["kept"]
    assert shapes["past.2.value"] == ["batch", 1, "past", 8]
    head = json.loads((made.folder / "head.json").read_text("utf-8"))
    assert (head["task"], head["settings"]["graphs"]) == ("text-generation", {"decoder": "model.onnx"})
    assert head["settings"]["generation"]["eos_token_id"] == [0]
    assert head["settings"]["generation"]["max_new_tokens"] == 128
    assert made.report.facts["source"]["path"] == str(made.source)
    paired = written("t5")
    shapes = {entry.name: entry.shape for entry in open_cpu(paired.folder / "decoder.onnx").get_inputs()}
    assert shapes["encoder_attention_mask"] == ["batch", "source"]
    assert shapes["cross.0.key"] == ["batch", 2, "source", 8]
    head = json.loads((paired.folder / "head.json").read_text("utf-8"))
    assert head["settings"]["graphs"] == {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}
    # Weights are written once, but for the embeddings, which both graphs read.
    sizes = [
        sum(np.prod(t.dims) for t in onnx.load(paired.folder / f"{part}.onnx").graph.initializer)
        for part in ("encoder", "decoder")
    ]
    model = paired.model()
    assert sum(sizes) < sum(p.numel() for p in model.parameters()) + model.shared.weight.numel() + 2000


def test_a_graph_that_errs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads prompts rightly, and its cache a little wrongly."""
    module = importlib.import_module("lightning_ft.export.generative_wrappers")
    model, cache_of = causal("gpt2").eval(), module.cache_of
    monkeypatch.setattr(module, "cache_of", lambda past: cache_of([1.001 * tensor for tensor in past]))
    with pytest.raises(ParityError, match="differs from the model"):
        export_onnx(model, tmp_path / "out", tokenizer=left_tokenizer(), max_length=24)
    assert not (tmp_path / "out").exists()


def test_other_tokens_than_those_of_generate_are_refused(
    written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written("gpt2")
    graphs = CausalGraphs(made.model(), GenerationSettings(eos_token_id=(0,)))
    sessions = {"model.onnx": open_cpu(made.folder / "model.onnx")}
    tokenizer = hf.AutoTokenizer.from_pretrained(made.source)
    tokenizer.pad_token = tokenizer.eos_token
    probes = graphs.probes(tokenizer, max_length=24)
    found = graphs.prove(sessions, probes, error=1e-5)
    assert found["texts"] == 9
    module = importlib.import_module("lightning_ft.export.generative_graphs")
    write = module.generate
    monkeypatch.setattr(module, "generate", lambda *args, **given: write(*args, **given) + 1)
    with pytest.raises(
        ParityError, match=r"write other tokens than the model does: \[.*instead of.*nothing was written"
    ):
        graphs.prove(sessions, probes, error=1e-5)


# ---- what they write


WRITERS: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": {}, "t5": {}, "bart": {"num_beams": 2}}


@pytest.mark.parametrize(
    "kind", ["gpt2", "bart", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "t5"))]
)
def test_texts_are_the_modules_predictions(kind: str, written: Callable[[str], Written]) -> None:
    options = WRITERS[kind]
    made = written(kind)
    texts = [*CORPUS[:3], "a b c"]
    paired = kind in ("t5", "bart")
    module: Any = (Seq2Seq if paired else CausalLM)(made.source, max_new_tokens=9, **options)
    module.eval()
    before = json.loads((made.folder / "head.json").read_text("utf-8"))["settings"].get("prompt", {}).get("before")
    assert before in (None, [])
    batch = module.tokenizer(texts, padding=True, return_tensors="pt")
    wanted = module.predictions(batch)
    assert len(set(wanted["text"])) > 1
    write = generator(made, **{"max_new_tokens": 9, **options})
    got = write(texts)
    assert [row["text"] for row in got] == wanted["text"]
    assert write({"text": texts[1]}) == write(texts[1])
    if paired:
        assert [row["score"] for row in got] == pytest.approx(wanted["score"], abs=1e-4)
    if not options:
        assert "".join(write.stream(texts[0])).strip() == wanted["text"][0].strip()


def test_labels_are_the_modules(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "source", "t5", hf.AutoModelForSeq2SeqLM, initializer_factor=3.0)
    for normalised in (False, True):
        module = Seq2Seq(
            source, label_texts=["good", "terrible", "maybe unlikely"], length_normalised=normalised
        ).eval()
        out = tmp_path / str(normalised)
        if normalised:  # the graphs are the same
            head = json.loads((tmp_path / "False" / "head.json").read_text("utf-8"))
            head["settings"]["length_normalised"] = True
            out = tmp_path / "False"
            (out / "head.json").write_text(json.dumps(head), "utf-8")
        else:
            export_onnx(module, out, max_length=16)
        assert module.tokenizer is not None
        wanted = module.predictions(module.tokenizer(CORPUS[:3], padding=True, return_tensors="pt"))
        write = Predictor(out)
        got = write(list(CORPUS[:3]))
        assert [row["label"] for row in got] == wanted["label"]
        for row, shares in zip(got, wanted["probabilities"], strict=True):
            assert row["probabilities"] == pytest.approx(shares, abs=1e-3)
        with pytest.raises(ValueError, match="chooses among labels"):
            next(write.stream("good"))


CHAT = (
    "{% for turn in messages %}{% if turn['role'] == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "{{ turn['role'] }} : {{ turn['content'] }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def test_prompts_are_those_of_the_data(written: Callable[[str], Written]) -> None:
    from datasets import Dataset

    from lightning_ft.data import InstructionData

    made = written("llama")
    rows = [{"instruction": "say yes", "input": ""}, {"instruction": "say", "input": "no {x}"}]
    table = Dataset.from_list(rows)
    write = generator(made, max_new_tokens=1)
    for chat in (None, CHAT):
        folder = made.source
        if chat is not None:
            write = Predictor(
                made.folder, settings={"generation": {"max_new_tokens": 1}, "prompt": {"chat_template": chat}}
            )
            tokenizer = hf.AutoTokenizer.from_pretrained(made.source)
            tokenizer.chat_template = chat
            folder = made.folder.parent / "chats"
            tokenizer.save_pretrained(folder)
        data = InstructionData(str(folder), predict=table, batch_size=2)
        data.setup("predict")
        batch = next(iter(data.predict_dataloader()))
        wanted = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert [list(item.parts[0].ids[0]) for item in write.encode(rows)] == wanted
    asked = [{"role": "user", "content": "say yes"}]
    assert write.encode([{"messages": asked}]) == write.encode([rows[0]])
    with pytest.raises(ValueError, match=r"row 0: the chat template refuses the conversation \(no judges\)"):
        write([{"messages": [{"role": "judge", "content": "x"}]}])


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (3, TypeError, "row 0: expected a text or a mapping with text, got 3"),
        ({"texts": "a"}, TypeError, "row 0: expected a text"),
        ({"instruction": 3}, TypeError, "row 0: expected texts as instruction and input"),
        ({"messages": []}, ValueError, "row 0: the model has no chat template"),
        ("", ValueError, "row 0: the tokenizer makes no token of it"),
        ("a " * 200, ValueError, r"row 0: a prompt of \d+ tokens and max_new_tokens=128 exceed the model's 128"),
    ],
)
def test_rows_that_are_refused(row: Any, error: Any, message: str, written: Callable[[str], Written]) -> None:
    with pytest.raises(error, match=message):
        generator(written("gpt2"))([row])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be 1 or more"),
        ({"tokens": 1}, ValueError, "settings: tokens is none of max_new_tokens, num_beams"),
        ({"max_length": 1000}, ValueError, "max_length=1000 is more than the 128 tokens"),
    ],
)
def test_settings_that_are_refused(settings: Any, error: Any, message: str, written: Callable[[str], Written]) -> None:
    with pytest.raises(error, match=message):
        generator(written("gpt2"), **settings)


def test_models_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="MambaForCausalLM keeps no keys and values"):
        export_onnx(
            hf.MambaForCausalLM(hf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, pad_token_id=1)),
            tmp_path / "out",
            tokenizer=left_tokenizer(),
        )
    with pytest.raises(ValueError, match=r"generation_config has penalty_alpha=0.5, which exported text generation"):
        generation_settings(hf.GenerationConfig(penalty_alpha=0.5))
    model = hf.AutoModelForSeq2SeqLM.from_config(hf.T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1))
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no decoder_start_token_id"):
        export_onnx(model, tmp_path / "out", tokenizer=left_tokenizer())


# ---- fewer bits


def lines(count: int) -> Any:
    from datasets import Dataset

    words = " ".join(CORPUS).split()
    texts = [" ".join(words[i % 40 : i % 40 + 4 + i % 9]) for i in range(count)]
    return Dataset.from_dict({"source": texts, "target": [text[: 4 + i % 7] for i, text in enumerate(texts)]})


def test_a_decoder_in_fewer_bits_is_judged(written: Callable[[str], Written], tmp_path: Path) -> None:
    made = written("gpt2")
    data = LanguageModelingData(str(made.source), val=lines(12), text="source", objective="clm", max_length=16)
    module = CausalLM(made.source).eval()
    out = tmp_path / "out"
    report = export_onnx(module, out, precision="int8-weights", gate=Gate(data, max_drop=0.2), max_length=16)
    full, small = report.facts["gate"]
    # The fp32 graph does what the module does, padded or not.
    assert full["val_perplexity"] == pytest.approx(judge(module, data).metrics["val_perplexity"], rel=1e-4)
    assert small["drop"] == pytest.approx(small["val_perplexity"] / full["val_perplexity"] - 1)
    assert small["val_perplexity"] != full["val_perplexity"]
    assert small["drop"] <= 0.2
    kinds = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
    # The output layer too, whose weight is the embedding table: four products a layer and one.
    assert kinds.count("MatMulNBits") == 3 * 4 + 1
    assert Predictor(out, settings={"generation": {"max_new_tokens": 3}})("the film")["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_encoder_decoder_in_fewer_bits_is_judged(written: Callable[[str], Written], tmp_path: Path) -> None:
    made = written("t5")
    data = Seq2SeqData(str(made.source), val=lines(8), max_length=16, max_target_length=8)
    module = Seq2Seq(made.source, max_new_tokens=4).eval()
    gate = Gate(data, max_drop=1.0 - 1e-9, metric="val_rouge1")
    report = export_onnx(module, tmp_path / "out", precision="int8", gate=gate, max_length=16)
    full, small = report.facts["gate"]
    own = judge(module, data).metrics
    assert full["val_rouge1"] == pytest.approx(own["val_rouge1"], abs=1e-6)
    assert small["precision"] == "int8"
    sessions = {part: open_cpu(tmp_path / "out" / part) for part in ("encoder.onnx", "decoder.onnx")}
    graphs = own_head(module).wrap(module.model)
    assert isinstance(graphs, Seq2SeqGraphs)
    found = judge(module, data, graphs.replacements(module, sessions)).metrics
    assert found["val_loss"] != own["val_loss"]
    assert found["val_loss"] == pytest.approx(own["val_loss"], rel=0.2)
    assert "generate" not in vars(module)


def test_what_a_drop_is() -> None:
    module: Any = object()
    assert drop(module, "val_perplexity", 10.0, 11.0) == pytest.approx(0.1)
    assert drop(module, "val_loss", 2.0, 2.01) == pytest.approx(0.01)
    assert drop(module, "val_accuracy", 0.9, 0.8) == pytest.approx(0.1)


def test_a_tied_table_is_quantised_where_it_multiplies_alone(tmp_path: Path) -> None:
    """As exporters leave large ones: the table transposed in the graph."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["states"]),
        helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["states", "turned"], ["logits"], name="product"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tied",
        [value("ids", onnx.TensorProto.INT64, ["n"])],
        [value("logits", onnx.TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(table, "table")],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "tied.onnx")
    assert "product" in quantizable(onnx.load(tmp_path / "tied.onnx"))
    ids = np.arange(5)
    for precision in ("int4", "int8-weights"):
        quantize(tmp_path / "tied.onnx", tmp_path / "small.onnx", precision)  # type: ignore[arg-type]
        small = onnx.load(tmp_path / "small.onnx")
        assert [node.op_type for node in small.graph.node] == ["Gather", "MatMulNBits"]
        np.testing.assert_array_equal(numpy_helper.to_array(small.graph.initializer[0]), table)
        (got,) = open_cpu(tmp_path / "small.onnx").run(None, {"ids": ids})
        wanted = table[ids] @ table.T
        assert np.abs(got - wanted).max() < (1.5 if precision == "int4" else 0.15) * np.abs(wanted).std()


def test_graphs_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    """The same tokens' logits from weights beside the graph, in each precision."""
    monkeypatch.setattr(importlib.import_module("lightning_ft.export.quantize"), "LARGE", 1000)
    made = written("gpt2")
    ids = np.array([[5, 9, 30]])
    wanted = CausalDecoder(open_cpu(made.folder / "model.onnx")).begin(ids, np.ones_like(ids))
    for precision in ("fp32", "fp16", "int8", "int8-weights", "int4"):
        place = tmp_path / precision
        place.mkdir()
        quantize(made.folder / "model.onnx", place / "model.onnx", precision)
        assert (place / "model.onnx.data").stat().st_size > 1000
        got = CausalDecoder(open_cpu(place / "model.onnx")).begin(ids, np.ones_like(ids))
        assert np.abs(got - wanted).max() < (0.6 if precision in ("int4", "int8") else 0.1) * np.abs(wanted).max()
