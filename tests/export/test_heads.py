"""Every head on every family: the graph against the model called as anybody would call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_ft.export import GraphWrapper, Head, export_hf, export_onnx
from lightning_ft.modules import (
    Architecture,
    CausalLM,
    Cloze,
    MaskedLM,
    MultipleChoice,
    MultiTask,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from tests.export.test_export_onnx import DEBERTA, DISTILBERT, GPT2, LLAMA, USUAL, tiny_tokenizer

CODER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
STARTS = {"decoder_start_token_id": 1, "eos_token_id": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": USUAL,
    "distilbert": DISTILBERT,
    "roberta": {**USUAL, "type_vocab_size": 1},
    "deberta-v2": DEBERTA,
    "electra": {**USUAL, "embedding_size": 16},
    "albert": {**USUAL, "embedding_size": 16},
    "mpnet": USUAL,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 1,
        "eos_token_id": 3,
    },
    "bart": {**CODER, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 3},
}
ENCODERS = ("bert", "distilbert", "roberta", "deberta-v2", "electra", "albert", "mpnet", "xlnet")
CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "fill-mask": "AutoModelForMaskedLM",
    "feature-extraction": "AutoModel",
}
NO_CLASS = {
    "multiple-choice": set(SETTINGS) - set(ENCODERS),
    "fill-mask": {"xlnet", "gpt2", "llama", "qwen3", "t5", "bart"},  # BART writes the whole text anew
    "token-classification": {"bart"},
}
"""What transformers has no class for."""
CELLS = [(task, family) for family in SETTINGS for task in CLASSES if family not in NO_CLASS.get(task, ())]
LEFT = ("xlnet", "llama", "qwen3")
"""Those that are run with padding on the left."""


def make(task: str, family: str, **options: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    lengths = {} if family == "xlnet" else {"max_position_embeddings": 40}
    # Large weights: with the usual 0.02 the outputs would hardly depend on the mask.
    common = {"vocab_size": 60, "pad_token_id": 1, "initializer_range": 0.2, **lengths}
    config = hf.AutoConfig.for_model(family, **{**common, **SETTINGS[family], **options})
    config.num_labels = 2 if task == "question-answering" else 3
    model: hf.PreTrainedModel = getattr(hf, CLASSES[task]).from_config(config)
    return model


def tokenizer_of(family: str) -> hf.PreTrainedTokenizerFast:
    special = {"eos_token": "w3"} if family in ("t5", "bart") else {}
    # GPT-2 would read types, but a tokenizer of its own makes none.
    return tiny_tokenizer(types=family != "gpt2", side="left" if family in LEFT else "right", **special)


def batch_of(model: hf.PreTrainedModel, task: str, *, rows: int, length: int, left: bool) -> dict[str, Tensor]:
    shape = (rows, 3, length) if task == "multiple-choice" else (rows, length)
    ids = torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, ..., :row] = 0
    mask = mask if left else mask.flip(-1)
    if model.config.is_encoder_decoder:
        ids.scatter_(-1, mask.sum(-1, keepdim=True) - 1, model.config.eos_token_id)
    ids[mask == 0] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * (ids % 2)}


def expected(model: hf.PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """The usual call."""
    with torch.inference_mode():
        if model.config.is_encoder_decoder and type(model).__name__.endswith("Model"):
            model = model.get_encoder()
        output = model(**batch)
    if "logits" in output:
        return [output.logits]
    if "start_logits" in output:
        return [output.start_logits, output.end_logits]
    states = output.last_hidden_state
    means = [row[real.bool()].mean(0) for row, real in zip(states, batch["attention_mask"], strict=True)]
    return [states, torch.stack(means)]


def assert_equal(folder: Path, model: hf.PreTrainedModel, task: str, *, rows: int, length: int, left: bool) -> None:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batch = batch_of(model, task, rows=rows, length=length, left=left)
    batch = {entry.name: batch[entry.name] for entry in session.get_inputs()}
    got = session.run(None, {name: value.numpy() for name, value in batch.items()})
    wanted = expected(model.eval(), batch)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        real = batch["attention_mask"].bool().numpy()
        per_token = one.shape[: real.ndim] == real.shape and task != "multiple-choice"
        values, reference = (one[real], other.numpy()[real]) if per_token else (one, other.numpy())
        np.testing.assert_allclose(values, reference, rtol=1e-5, atol=5e-5)
        assert np.ptp(values) > 0.01  # they differ enough for this to mean something


def usual(task: str, family: str) -> bool:
    """Whether a cell is run each time: every head of BERT, and every family with one head, these in turn."""
    turn = [name for name in CLASSES if (name, family) in CELLS]
    return family == "bert" or task == turn[list(SETTINGS).index(family) % len(turn)]


@pytest.mark.parametrize(
    ("task", "family"),
    [pytest.param(*cell, marks=() if usual(*cell) else pytest.mark.slow) for cell in CELLS],
)
def test_every_head_of_every_family(task: str, family: str, tmp_path: Path) -> None:
    model = make(task, family)
    report = export_onnx(model, tmp_path / "out", tokenizer=tokenizer_of(family), max_length=24)
    assert report.facts["task"] == task
    assert ("token_type_ids" in report.facts["inputs"]) == (family in {"bert", "electra", "albert", "xlnet"})
    for rows, length in ((6, 19), (1, 31)):
        assert_equal(tmp_path / "out", model, task, rows=rows, length=length, left=family in LEFT)


def test_cells_that_are_left_out_have_no_class() -> None:
    for task, families in NO_CLASS.items():
        for family in families - {"bart"}:
            with pytest.raises(ValueError, match="Unrecognized configuration class"):
                make(task, family)


# ---- modules of the library


def _bert(**options: Any) -> Architecture:
    return Architecture(make("feature-extraction", "bert", **options).config, _words())


def _words() -> hf.PreTrainedTokenizerFast:
    return tiny_tokenizer(cls_token="w2", sep_token="w3", mask_token="w4")


MODULES = {
    "text-classification": lambda: SequenceClassification(_bert(), ["no", "yes", "ćma"]),
    "token-classification": lambda: TokenClassification(_bert(), ["O", "B-PER", "I-PER"]),
    "question-answering": lambda: QuestionAnswering(_bert()),
    "multiple-choice": lambda: MultipleChoice(_bert()),
    "fill-mask": lambda: MaskedLM(_bert()),
}


@pytest.mark.parametrize("task", MODULES)
def test_modules_say_what_they_are(task: str, tmp_path: Path) -> None:
    module = MODULES[task]()
    export_onnx(module, tmp_path / "out", max_length=24)
    assert_equal(tmp_path / "out", module.model, task, rows=6, length=19, left=False)
    head = json.loads((tmp_path / "out" / "head.json").read_text("utf-8"))
    labels = {"text-classification": ["no", "yes", "ćma"], "token-classification": ["O", "B-PER", "I-PER"]}
    windows = {"max_length": 128, "stride": None}
    tags = {"types": ["PER"], "table": [[-1, 0, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]}
    settings: dict[str, Any] = {
        "text-classification": {"problem": "single_label"},
        "token-classification": {"scheme": "BIO", **tags, **windows},
        "question-answering": {
            "n_best": 20,
            "max_answer_length": 30,
            "no_answer": True,
            "no_answer_threshold": 0.0,
            "cls": 2,
            "context_first": False,
            **windows,
            "max_length": 384,
        },
        "fill-mask": {"top_k": 5, "mask": 4, "before": [], "after": [], "clean_up": False},
    }
    assert (head["task"], head["labels"]) == (task, labels.get(task, []))
    assert head["settings"] == settings.get(task, {})


@pytest.mark.parametrize("problem", ["regression", "multi_label"])
def test_problems(problem: Any, tmp_path: Path) -> None:
    labels = None if problem == "regression" else ["a", "b"]
    module = SequenceClassification(_bert(), labels, problem=problem)
    export_hf(module, tmp_path / "hf")
    for name, source in (("module", module), ("folder", tmp_path / "hf")):
        export_onnx(source, tmp_path / name, max_length=8)
        head = json.loads((tmp_path / name / "head.json").read_text("utf-8"))
        assert head["labels"] == (labels or [])
        assert head["settings"] == {"problem": problem}


def test_no_infinity_in_json(tmp_path: Path) -> None:
    export_onnx(QuestionAnswering(_bert(), no_answer=False), tmp_path / "out", max_length=8)
    head = json.loads((tmp_path / "out" / "head.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert head["settings"]["no_answer_threshold"] is None


@pytest.mark.parametrize("decoder", [False, True])
def test_cloze_scores_labels_in_the_graph(decoder: bool, tmp_path: Path) -> None:
    """One pattern and words of one token, then two patterns and words of two."""
    family = "gpt2" if decoder else "bert"
    for count, words in ((1, {"no": "w5", "yes": ["w6", "w7"]}), (2, {"no": "w5 w8", "yes": ["w6 w9", "w7 w5"]})):
        if decoder and count == 2:
            continue  # a decoder's word is one token
        gaps = " ".join(["{mask}"] * count)
        patterns = [f"{{text}} w10 {gaps}", f"w11 {{text}} {gaps}"][:count]
        config = make("feature-extraction", family).config
        words_of = tiny_tokenizer(types=False) if decoder else _words()
        module = Cloze(Architecture(config, words_of), words, patterns)
        folder = tmp_path / f"{count}"
        report = export_onnx(module, folder, max_length=24)
        types = [] if decoder else ["token_type_ids"]
        assert report.facts["inputs"] == ["input_ids", "attention_mask", "gap", "pattern", *types]
        batch = batch_of(module.model, "fill-mask", rows=6, length=19, left=False)
        gap = torch.tensor([[2, 5], [1, 9], [0, 3], [7, 8], [4, 12], [2, 3]])[:, : module.masks]
        pattern = torch.arange(6) % count
        if decoder:
            del batch["token_type_ids"]
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        feed = {**batch, "gap": gap, "pattern": pattern}
        (got,) = session.run(["scores"], {name: value.numpy() for name, value in feed.items()})
        marks = torch.zeros_like(batch["input_ids"]).scatter(1, gap, 1)
        with torch.inference_mode():
            wanted = module.eval()({**batch, "mask_positions": marks, "pattern": pattern})
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=5e-5)
        assert np.ptp(got) > 0.01


def test_several_heads_become_a_folder_each(tmp_path: Path) -> None:
    module = MultiTask({"mood": SequenceClassification(_bert(), ["no", "yes"]), "choice": MultipleChoice(_bert())})
    report = export_onnx(module, tmp_path / "out", max_length=8)
    assert {row["task"] for row in report.rows} == {"mood", "choice"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "choice", "mood", "report.json"]
    for name, task in (("mood", "text-classification"), ("choice", "multiple-choice")):
        assert_equal(tmp_path / "out" / name, module.heads[name].model, task, rows=4, length=9, left=False)
    export_hf(module, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["README.md", "choice", "mood", "report.json"]
    # One of them fails: nothing is written.
    with torch.no_grad():
        module.heads["choice"].model.classifier.weight.fill_(float("nan"))
    with pytest.raises(Exception, match="nan"):
        export_onnx(module, tmp_path / "broken", max_length=8)
    assert not (tmp_path / "broken").exists()


# ---- where it comes from


def test_hugging_face_folder(tmp_path: Path) -> None:
    module = MODULES["token-classification"]()
    report = export_hf(module, tmp_path / "hf")
    (row,) = report.rows
    assert (row["model"], row["tokenizer"]) == ("BertForTokenClassification", True)
    again = hf.AutoModelForTokenClassification.from_pretrained(tmp_path / "hf")
    assert again.config.id2label == {0: "O", 1: "B-PER", 2: "I-PER"}
    for name, value in module.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    export_onnx(tmp_path / "hf", tmp_path / "out", max_length=24)
    assert_equal(tmp_path / "out", module.model, "token-classification", rows=6, length=19, left=False)
    assert json.loads((tmp_path / "out" / "head.json").read_text("utf-8"))["labels"] == ["O", "B-PER", "I-PER"]


def test_tags_of_no_scheme(tmp_path: Path) -> None:
    model = make("token-classification", "bert")
    model.config.id2label = {0: "NOUN", 1: "VERB", 2: "X"}
    model.save_pretrained(tmp_path / "hf")
    _words().save_pretrained(tmp_path / "hf")
    export_onnx(tmp_path / "hf", tmp_path / "out", max_length=8)
    assert json.loads((tmp_path / "out" / "head.json").read_text("utf-8"))["labels"] == ["NOUN", "VERB", "X"]


def test_hugging_face_folder_of_what_generates(tmp_path: Path) -> None:
    """A decoder, too, comes back from its folder."""
    module = CausalLM(Architecture(make("feature-extraction", "gpt2").config, tiny_tokenizer(types=False)))
    export_hf(module, tmp_path / "hf")
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.model_type == "gpt2"


def test_a_folder_that_reads_back_otherwise_is_refused(tmp_path: Path) -> None:
    module = MODULES["text-classification"]()
    module.model.classifier.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(RuntimeError, match=r"differs from the model in classifier.*nothing was written"):
        export_hf(module, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


class Strange(nn.Module):
    """Not of transformers: a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(60, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(-1).float()
        result: Tensor = self.out((self.table(ids) * weights).sum(1) / weights.sum(1))
        return result


class Bag(GraphWrapper):
    outputs = ("verdict",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Any = None) -> tuple[Tensor, ...]:
        return (self.model(input_ids, attention_mask),)


def test_a_module_of_any_kind(tmp_path: Path) -> None:
    module = Strange().train()
    export_onnx(
        module, tmp_path / "out", head=Head("mood", Bag, ("no", "yes")), tokenizer=tiny_tokenizer(), max_length=8
    )
    assert module.training
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    ids, mask = torch.tensor([[4, 5, 1], [6, 7, 8]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    (got,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(got, module(ids, mask).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "out" / "config.json").exists()
    assert json.loads((tmp_path / "out" / "head.json").read_text("utf-8"))["labels"] == ["no", "yes"]


@pytest.mark.parametrize(
    ("make_source", "error", "message"),
    [
        (lambda path: path / "none", FileNotFoundError, "none does not exist: give a checkpoint"),
        (lambda path: path, FileNotFoundError, "a folder without a config.json"),
        (lambda path: Strange(), TypeError, "got Strange: give a `head`"),
        (lambda path: make("fill-mask", "bert"), ValueError, "tokenizer: BertForMaskedLM holds none: pass"),
        (
            lambda path: SequenceClassification(Architecture(make("fill-mask", "bert").config), num_labels=2),
            ValueError,
            "tokenizer: SequenceClassification holds none",
        ),
    ],
)
def test_sources_that_cannot_be_exported(make_source: Any, error: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(error, match=message):
        export_onnx(make_source(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_may_have_the_name_of_a_value_inside(tmp_path: Path) -> None:
    """BERT's code has a variable `embedding`, which is an output's name here."""
    names = {"last_hidden_state", "embedding"}
    report = export_onnx(make("feature-extraction", "bert"), tmp_path / "o", tokenizer=tiny_tokenizer(), max_length=8)
    assert set(report.facts["outputs"]) == names
