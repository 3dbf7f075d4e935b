"""The predictor beside each export: as `trainer.predict`, from a folder alone, with nothing of ours or of torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer

from lightning_ft.data import ClassificationData, MultipleChoiceData
from lightning_ft.export import Predictor, export_onnx
from lightning_ft.modules import MultipleChoice, SequenceClassification, TransformerModule
from tests.data.test_multiple_choice_data import rows as choices
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
    export_onnx(module, tmp_path / "out", max_length=32)
    predict = Predictor(tmp_path / "out", max_length=24, batch_size=7, threads=1)
    found = predict(TEXTS)
    assert_alike(found, as_predicted(module, data))
    assert predict(TEXTS[3]) == found[3]
    assert predict([{"text": TEXTS[3]}]) == [found[3]]
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
    export_onnx(module, tmp_path / "out", max_length=32)
    found = Predictor(tmp_path / "out", max_length=30)(list(zip(TEXTS, TEXTS[::-1], strict=True)))
    assert_alike(found, as_predicted(module, data))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_multiple_choice(kind: Kind, tmp_path: Path) -> None:
    path = folder(tmp_path, kind, hf.AutoModelForMultipleChoice)
    module, table = MultipleChoice(path), choices(30)
    data = MultipleChoiceData(path, predict=table, max_length=24)
    export_onnx(module, tmp_path / "out", max_length=32)
    predict = Predictor(tmp_path / "out", max_length=24)
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


def test_alone_in_its_folder(exported: Path, tmp_path: Path) -> None:
    """With a Python that has onnxruntime, tokenizers and numpy, and nothing else."""
    here = Path(next(iter(importlib.util.find_spec("onnxruntime").submodule_search_locations))).parent
    needed = ("onnxruntime", "tokenizers", "numpy", "numpy.libs", "flatbuffers", "google")
    for name in needed:
        if (here / name).exists():
            (tmp_path / name).symlink_to(here / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('a moving film .\n{"text": "it was great ?"}\n["the film", "is good"]\n', encoding="utf-8")
    code = (
        "import sys, runpy; sys.path[:0] = [sys.argv.pop(1)]; sys.argv.pop(0); "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'lightning_ft', 'transformers'} & {*sys.modules}"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path), str(exported / "predictor.py"), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    texts: list[Any] = ["a moving film .", "it was great ?", ("the film", "is good")]
    wanted = [{"row": i, **row} for i, row in enumerate(Predictor(exported)(texts))]
    assert found == wanted


def test_longest_input_is_the_models(exported: Path, tmp_path: Path) -> None:
    def limit(path: Path) -> Any:
        return json.loads((path / "head.json").read_text("utf-8"))["max_length"]

    assert limit(exported) == 130
    assert Predictor(exported)("x " * 500)["label"] in ("no", "yes")
    path = folder(tmp_path, "roberta", hf.AutoModelForSequenceClassification)
    export_onnx(path, tmp_path / "out", max_length=32)
    assert limit(tmp_path / "out") == 128  # positions begin after the padding's
    Predictor(tmp_path / "out")("x " * 500)


def test_refusals(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # A provider that does not run is replaced in silence.
    real = onnxruntime.InferenceSession
    available = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, *_, **__: real(path))
    with pytest.raises(RuntimeError, match="provider='cuda' cannot run here: ONNX Runtime took CPUExecutionProvider"):
        Predictor(exported, provider="cuda")
    head = json.loads((exported / "head.json").read_text("utf-8"))
    (tmp_path / "other").mkdir()
    for file in exported.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "head.json").write_text(json.dumps({**head, "task": "cloze"}))
    with pytest.raises(ValueError, match="is for 'cloze', and only text-classification"):
        Predictor(tmp_path / "other")
