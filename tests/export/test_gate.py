"""Graphs in fewer bits: judged by their task, mended where a layer cannot bear it, refused where nothing helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as hf
from datasets import Dataset

from lightning_ft.data import (
    ClassificationData,
    ClozeData,
    LanguageModelingData,
    MultipleChoiceData,
    QuestionAnsweringData,
    TokenClassificationData,
)
from lightning_ft.export import Gate, GateError, GraphWrapper, Head, export_hf, export_onnx, load_session
from lightning_ft.export.judge import judge
from lightning_ft.export.quantize import quantizable, quantize
from lightning_ft.modules import (
    Cloze,
    MaskedLM,
    MultipleChoice,
    MultiTask,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    TransformerModule,
)
from tests.data.test_multiple_choice_data import rows as choices
from tests.modules.test_cloze import rows as texts
from tests.modules.test_cloze import task as cloze_task
from tests.modules.test_masked_lm import texts as documents
from tests.modules.test_question_answering import rows as questions
from tests.modules.test_token_classification import LABELS
from tests.modules.test_token_classification import rows as tagged
from tests.pretrained import CORPUS, pretrained

WORDS = " ".join(CORPUS).split()


def sentences(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 12))) for _ in range(count)]


def classifier(folder: Path, *, outlier: float = 1.0, problem: Any = "single_label") -> SequenceClassification:
    """A tiny classifier whose outputs vary.

    One unit of each feed-forward layer may be as much larger as the weights that read it are smaller: the function is
    the same, but the scale of all activations is that unit's.
    """
    path = pretrained(folder / "model", "bert", hf.AutoModel, initializer_range=0.4, hidden_act="relu")
    labels = None if problem == "regression" else ["no", "yes", "maybe"]
    module = SequenceClassification(path, labels, problem=problem)
    with torch.no_grad():
        for layer in module.model.bert.encoder.layer:
            layer.intermediate.dense.weight[3] *= outlier
            layer.intermediate.dense.bias[3] = outlier
            layer.output.dense.weight[:, 3] /= outlier
        module.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    return module.eval()


def own_answers(module: SequenceClassification) -> ClassificationData:
    """Texts labelled as the module in fp32 labels them: it is always right."""
    found = sentences(200)
    assert module.tokenizer is not None
    batch = module.tokenizer(found, padding=True, return_tensors="pt")
    with torch.inference_mode():
        values = module.model(**batch).logits
    answers: dict[str, list[Any]] = {
        "single_label": [module.labels[i] for i in values.argmax(-1).tolist()],
        "multi_label": [[n for n, v in zip(module.labels, row, strict=True) if v > 0] for row in values.tolist()],
        "regression": values.squeeze(-1).tolist() if values.shape[1] == 1 else [],
    }
    assert len({str(answer) for answer in answers[module.problem]}) > 1
    table = Dataset.from_dict({"text": found, "label": answers[module.problem]})
    labels = None if module.problem == "regression" else module.labels
    return ClassificationData(str(module._source), val=table, labels=labels, problem=module.problem, eval_batch_size=16)


def test_int8_passes(tmp_path: Path) -> None:
    module = classifier(tmp_path)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    told: list[str] = []
    report = export_onnx(
        module,
        tmp_path / "out",
        precision="int8",
        gate=Gate(own_answers(module), max_drop=0.1),
        max_length=24,
        progress=told.append,
    )
    full, small = report.facts["gate"]
    assert (full["precision"], full["val_accuracy"], full["drop"], full["agreement"]) == ("fp32", 1.0, 0.0, 1.0)
    assert (small["precision"], small["nodes in fp32"]) == ("int8", 0)
    assert 0.9 <= small["val_accuracy"] == pytest.approx(small["agreement"]) == pytest.approx(1 - small["drop"])
    assert 0 < small["distance"] < 0.2
    assert small["MB"] < full["MB"]
    assert report.facts["files"]["model.onnx"]["bytes"] == pytest.approx(1e6 * small["MB"], abs=5000)
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["facts"]["precision"] == "int8"
    kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert kinds & {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"}
    assert not kinds & {"SkipLayerNormalization", "BiasGelu"}
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("trial")]
    assert any("judging int8" in line for line in told)
    # The module is as it was.
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert "forward" not in vars(module)
    assert module._trainer is None


def test_a_fragile_layer_stays_in_fp32(tmp_path: Path) -> None:
    module = classifier(tmp_path, outlier=3000.0)
    data = own_answers(module)
    report = export_onnx(module, tmp_path / "out", precision="int8", gate=Gate(data, max_drop=0.03), max_length=24)
    full, *failed, last = report.facts["gate"]
    assert full["val_accuracy"] == 1.0
    assert failed
    assert all(row["drop"] > 0.03 for row in failed)
    assert last["drop"] <= 0.03
    assert [row["nodes in fp32"] for row in (*failed, last)] == [0, 1, 2, 4, 8][: len(failed) + 1]
    # What was written is what passed.
    found = judge(module, data, load_session(tmp_path / "out"))
    assert found.metrics["val_accuracy"] == last["val_accuracy"]


def test_what_cannot_be_mended_is_refused(tmp_path: Path) -> None:
    module = classifier(tmp_path, outlier=3000.0)
    gate = Gate(own_answers(module), max_drop=0.0)
    with pytest.raises(GateError, match=r"in int4 the graph loses more than max_drop=0 of val_accuracy(?s:.)*nodes in"):
        export_onnx(module, tmp_path / "out", precision="int4", gate=gate, max_length=24)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("precision", ["fp16", "int8-weights", "int4"])
def test_other_precisions(precision: Any, tmp_path: Path) -> None:
    module = classifier(tmp_path)
    gate = Gate(own_answers(module), max_drop=0.5)
    report = export_onnx(module, tmp_path / "out", precision=precision, gate=gate, max_length=24)
    full, small = report.facts["gate"]
    assert small["MB"] < full["MB"]
    assert 0 < small["distance"] < {"fp16": 0.01, "int8-weights": 0.05, "int4": 0.5}[precision]
    inputs = [entry.type for entry in load_session(tmp_path / "out").get_inputs()]
    assert set(inputs) == {"tensor(int64)"}
    assert [entry.type for entry in load_session(tmp_path / "out").get_outputs()] == ["tensor(float)"]


@pytest.mark.parametrize("problem", ["regression", "multi_label"])
def test_problems(problem: Any, tmp_path: Path) -> None:
    module = classifier(tmp_path, problem=problem)
    gate = Gate(own_answers(module), max_drop=0.1)
    report = export_onnx(module, tmp_path / "out", precision="int8", gate=gate, max_length=24)
    full, small = report.facts["gate"]
    metric = {"regression": "val_pearson", "multi_label": "val_accuracy"}[problem]
    assert full[metric] == pytest.approx(1.0)
    assert full[metric] >= small[metric] > 0.9
    assert (small["agreement"] is None) == (problem == "regression")


def heads(folder: Path) -> dict[str, Callable[[], tuple[TransformerModule, Any]]]:
    def path(auto: Any) -> str:
        return pretrained(folder / "model", "bert", auto, initializer_range=0.4)

    def cloze() -> tuple[TransformerModule, Any]:
        place = path(hf.AutoModelForMaskedLM)
        settings = cloze_task(place, "bert")
        return Cloze(place, **settings), ClozeData(place, val=texts(20), **settings, eval_batch_size=6)

    def tokens() -> tuple[TransformerModule, Any]:
        place = path(hf.AutoModelForTokenClassification)
        data = TokenClassificationData(place, val=tagged(10, 60), labels=LABELS, max_length=40, stride=8)
        return TokenClassification(place, LABELS), data

    def qa() -> tuple[TransformerModule, Any]:
        place = path(hf.AutoModelForQuestionAnswering)
        data = QuestionAnsweringData(place, val=questions(20), max_length=16, stride=3, eval_batch_size=8)
        return QuestionAnswering(place), data

    def choice() -> tuple[TransformerModule, Any]:
        place = path(hf.AutoModelForMultipleChoice)
        return MultipleChoice(place), MultipleChoiceData(place, val=choices(20), eval_batch_size=6)

    def mask() -> tuple[TransformerModule, Any]:
        place = path(hf.AutoModelForMaskedLM)
        data = LanguageModelingData(place, val=documents(20), rows="documents", max_length=32, eval_batch_size=4)
        return MaskedLM(place), data

    return {"cloze": cloze, "tokens": tokens, "qa": qa, "choice": choice, "mask": mask}


@pytest.mark.parametrize("name", ["cloze", "tokens", "qa", "choice", "mask"])
def test_a_graph_is_judged_as_its_module_is(name: str, tmp_path: Path) -> None:
    module, data = heads(tmp_path)[name]()
    threshold = getattr(module, "no_answer_threshold", torch.zeros(())).clone()
    export_onnx(module, tmp_path / "out", max_length=24)
    mine = judge(module, data)
    graphs = judge(module, data, load_session(tmp_path / "out"))
    assert mine.metrics == pytest.approx(graphs.metrics, rel=1e-4)
    assert len(mine.metrics) > 1
    assert graphs.agreement(mine) == 1.0
    assert graphs.distance(mine) < 1e-5
    assert sum(len(part) for part in mine.outputs) > 5
    if name == "qa":
        assert torch.equal(module.no_answer_threshold, threshold)
    # In fewer bits it differs.
    gate = Gate(data, max_drop=0.9)
    report = export_onnx(module, tmp_path / "small", precision="int4", gate=gate, max_length=24)
    assert report.facts["gate"][-1]["distance"] > 0.01


def test_only_weights_can_be_named(tmp_path: Path) -> None:
    module = classifier(tmp_path)
    export_onnx(module, tmp_path / "out", max_length=8)
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    nodes = quantizable(graph)
    # Three embeddings, six matrices in each of three blocks, the pooler and the classifier.
    assert len(nodes) == len(set(nodes)) == 3 + 3 * 6 + 2
    quantize(tmp_path / "out" / "model.onnx", tmp_path / "kept.onnx", "int8", keep=nodes)
    kinds = {node.op_type for node in onnx.load(tmp_path / "kept.onnx").graph.node}
    assert not [kind for kind in kinds if "Quantize" in kind or "Integer" in kind]


def test_a_hugging_face_folder_is_judged_too(tmp_path: Path) -> None:
    module = classifier(tmp_path)
    data = own_answers(module)
    export_hf(module, tmp_path / "hf")
    report = export_onnx(
        tmp_path / "hf", tmp_path / "out", precision="int8", gate=Gate(data, max_drop=0.1), max_length=24
    )
    assert report.facts["gate"][0]["val_accuracy"] == 1.0
    assert report.facts["gate"][-1]["agreement"] > 0.9


class Own(GraphWrapper):
    outputs = ("logits",)

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None) -> tuple[Any, ...]:
        return (self.model(input_ids, attention_mask).logits,)


def test_refusals(tmp_path: Path) -> None:
    module = classifier(tmp_path)
    data = own_answers(module)
    gate = Gate(data)

    def refuses(error: type[Exception], message: str, source: Any = module, **options: Any) -> None:
        with pytest.raises(error, match=message):
            export_onnx(source, tmp_path / "out", max_length=8, **options)
        assert not (tmp_path / "out").exists()

    refuses(ValueError, r"precision='int7': expected one of fp32, fp16, int8", precision="int7", gate=gate)
    refuses(ValueError, r"gate=None with precision='int8': a graph in fewer bits is judged", precision="int8")
    refuses(ValueError, r"with precision='fp32': .*Give both, or neither", gate=gate)
    several = MultiTask({"a": module, "b": SequenceClassification(str(module._source), ["x", "y"])})
    refuses(TypeError, "has several heads: export each by itself", several, precision="int8", gate=gate)
    export_hf(module, tmp_path / "hf")
    own = Head("mine", Own)
    refuses(TypeError, "has no metrics to be judged by", tmp_path / "hf", precision="int8", gate=gate, head=own)
    refuses(
        ValueError,
        r"metric='val_bleu' is not measured in validation; there are: .*val_accuracy",
        precision="int8",
        gate=Gate(data, metric="val_bleu"),
    )
    with pytest.raises(ValueError, match=r"max_drop=1\.5 must be a share"):
        Gate(data, max_drop=1.5)
