"""The predictor beside each export: as `trainer.predict`, from a folder alone, with nothing of ours or of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer

from lightning_ft.data import ClassificationData, MultipleChoiceData
from lightning_ft.export import Predictor, export_onnx
from lightning_ft.modules import MultipleChoice, SequenceClassification, TransformerModule
from tests.data.test_multiple_choice_data import rows as choices
from tests.export.served import serve
from tests.export.test_gate import sentences
from tests.pretrained import Kind, pretrained

TEXTS = [*sentences(40), "café naïve 東京 !", " spaces  at  both ends ", "unknownword", "x " * 200]


def folder(path: Path, kind: Kind, auto: Any) -> str:
    return pretrained(path / "model", kind, auto, initializer_range=0.4)


def as_predicted(module: TransformerModule, data: Any) -> list[dict[str, Any]]:
    """What the command line writes."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    found: dict[int, dict[str, Any]] = {}
    for columns in Trainer(accelerator="cpu", **quiet).predict(module, data) or []:
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            found[row.pop("row")] = row
    return [found[i] for i in range(len(found))]


def assert_alike(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted) > 5
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, abs=1e-5) if name in ("score", "probabilities") else value)
    assert len({json.dumps(row) for row in found}) > 5


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_as_the_command_line_predicts(kind: Kind, tmp_path: Path) -> None:
    path = folder(tmp_path, kind, hf.AutoModelForSequenceClassification)
    module = SequenceClassification(path, ["no", "yes", "ćma"])
    data = ClassificationData(path, predict=Dataset.from_dict({"text": TEXTS}), labels=module.labels, max_length=24)
    session = serve(module, tmp_path / "out")
    predict = Predictor(tmp_path / "out", max_length=24, batch_size=7, session=session)
    found = predict(TEXTS)
    # Never more at once than was asked for, and the shorter ones first, together.
    rows, widths = zip(*session.shapes, strict=True)
    assert (max(rows), sum(rows)) == (7, len(TEXTS))
    assert list(widths) == sorted(widths)
    assert len(set(widths)) > 2
    assert_alike(found, as_predicted(module, data))
    # Alone, and not beside texts of other lengths: sums are taken in another order.
    assert predict(TEXTS[3])["probabilities"] == pytest.approx(found[3]["probabilities"], abs=1e-5)
    assert predict([{"text": TEXTS[3]}]) == [predict(TEXTS[3])]
    assert predict([]) == []


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
def test_problems(problem: Any, tmp_path: Path) -> None:
    path = folder(tmp_path, "bert", hf.AutoModelForSequenceClassification)
    labels = ["a", "b", "c"] if problem == "multi_label" else None
    module = SequenceClassification(path, labels, problem=problem)
    pairs = Dataset.from_dict({"text": TEXTS, "other": TEXTS[::-1]})
    data = ClassificationData(
        path, predict=pairs, text_pair="other", labels=labels, problem=problem, max_length=30, eval_batch_size=5
    )
    found = Predictor(tmp_path / "out", max_length=30, session=serve(module, tmp_path / "out"))(
        list(zip(TEXTS, TEXTS[::-1], strict=True))
    )
    assert_alike(found, as_predicted(module, data))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_multiple_choice(kind: Kind, tmp_path: Path) -> None:
    path = folder(tmp_path, kind, hf.AutoModelForMultipleChoice)
    module, table = MultipleChoice(path), choices(30)
    data = MultipleChoiceData(path, predict=table, max_length=24)
    session = None if kind == "bert" else serve(module, tmp_path / "out")
    if kind == "bert":
        export_onnx(module, tmp_path / "out", max_length=32)
    predict = Predictor(tmp_path / "out", max_length=24, session=session)
    found = predict([{"context": row["context"], "choices": row["choices"]} for row in table])
    assert_alike(found, as_predicted(module, data))
    # Rows of different numbers of choices are run apart.
    two = predict([{"context": "the film", "choices": ["a", "b"]}, {"context": "the", "choices": ["a", "b", "c"]}])
    assert [len(row["probabilities"]) for row in two] == [2, 3]


def test_embeddings(tmp_path: Path) -> None:
    path = folder(tmp_path, "bert", hf.AutoModel)
    export_onnx(path, tmp_path / "out", max_length=32)
    found = Predictor(tmp_path / "out", max_length=24)(TEXTS[:5])
    tokenizer, model = hf.AutoTokenizer.from_pretrained(path), hf.AutoModel.from_pretrained(path)
    for text, row in zip(TEXTS[:5], found, strict=True):
        with torch.inference_mode():
            wanted = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert row["embedding"] == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("predictor")
    path = folder(place, "bert", hf.AutoModelForSequenceClassification)
    export_onnx(SequenceClassification(path, ["no", "yes"]), place / "out", max_length=32)
    return place / "out"


def test_longest_input_is_the_models(exported: Path, tmp_path: Path) -> None:
    def limit(path: Path) -> Any:
        return json.loads((path / "head.json").read_text("utf-8"))["max_length"]

    assert limit(exported) == 130
    assert Predictor(exported)("x " * 500)["label"] in ("no", "yes")
    path = folder(tmp_path, "roberta", hf.AutoModelForSequenceClassification)
    session = serve(path, tmp_path / "out")
    assert limit(tmp_path / "out") == 128  # positions begin after the padding's
    Predictor(tmp_path / "out", session=session)("x " * 500)


def test_refusals(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"head\.json does not exist: give a folder that lightning-ft export"):
        Predictor(tmp_path)
    for options, message in (
        ({"max_length": 131}, "max_length=131 is more than the 130 tokens that the model takes"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"provider": "gpu"}, "provider='gpu': expected one of cpu, cuda, tensorrt"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictor(exported, **options)
    with pytest.raises(RuntimeError, match=r"provider='cuda': this onnxruntime has .*CPUExecutionProvider"):
        Predictor(exported, provider="cuda")
    predict = Predictor(exported)
    for row in (None, 3, ["a", "b", "c"], {"text": None}, ("a", 3), {"txt": "a"}):
        with pytest.raises(TypeError, match="row 1: expected a text, a pair of texts or a mapping"):
            predict(["good", row])
    head = json.loads((exported / "head.json").read_text("utf-8"))
    (tmp_path / "other").mkdir()
    for file in exported.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "head.json").write_text(json.dumps({**head, "task": "mood"}))
    with pytest.raises(ValueError, match="is for 'mood', and only text-classification"):
        Predictor(tmp_path / "other")


def test_what_is_too_long_is_seen(exported: Path) -> None:
    predict = Predictor(exported, max_length=12)
    long, short = "the film is good " * 5, "the film"
    items = predict.encode([long, short, (short, short)])
    assert [predict.length(item) for item in items] == [12, 4, 7]
    whole = Predictor(exported, max_length=12, truncate=False)
    assert whole([short, (short, short)]) == predict([short, (short, short)])
    with pytest.raises(
        ValueError, match=r"row 1: it has 22 tokens, and max_length=12: shorten it, or set truncate=True"
    ):
        whole([short, long])
    with pytest.raises(ValueError, match="max_length=2 leaves no room for text beside 2 special tokens"):
        Predictor(exported, max_length=2)


def test_settings(exported: Path) -> None:
    assert Predictor(exported).settings == {"problem": "single_label"}
    both = Predictor(exported, settings={"problem": "multi_label"})("the film")
    assert isinstance(both["label"], list)
    with pytest.raises(ValueError, match="settings: n_best is none of this task's: problem"):
        Predictor(exported, settings={"n_best": 2})


def test_choices_that_do_not_fit(tmp_path: Path) -> None:
    path = folder(tmp_path, "bert", hf.AutoModelForMultipleChoice)
    session = serve(MultipleChoice(path), tmp_path / "out")
    predict = Predictor(tmp_path / "out", max_length=12, session=session)
    fits = {"context": "the film " * 9, "choices": ["is good", "is " * 8]}
    assert predict.length(predict.encode([fits])[0]) == 24
    with pytest.raises(ValueError, match="row 1: choice 1 has 9 tokens, and max_length=12 leaves 9 for it and the con"):
        predict([fits, {**fits, "choices": ["is good", "is " * 9]}])
    for row in ("a text", {"context": "a"}, {"context": "a", "choices": "bc"}, {"context": "a", "choices": ["b"]}):
        with pytest.raises(TypeError, match="row 0: expected a mapping with context and choices, two or more"):
            predict([row])
    with pytest.raises(TypeError, match="row 0: expected texts as context and choices, got"):
        predict([{"context": None, "choices": ["a", "b"]}])


def test_half_a_character_is_no_text(exported: Path) -> None:
    with pytest.raises(ValueError, match="row 1: half of a surrogate pair stands at character 2, which no text holds"):
        Predictor(exported)(["a", "ab\ud800"])


def test_a_slow_tokenizer_has_no_predictor(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "head.json").write_bytes((exported / "head.json").read_bytes())
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer.json does not exist \(a model whose tokenizer is a slow one"
    ):
        Predictor(tmp_path)
