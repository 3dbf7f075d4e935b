"""The model card: its front matter is YAML, and its tables hold all figures of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_ft.core.report import Report
from lightning_ft.export import export_hf, export_onnx
from lightning_ft.export.card import card
from lightning_ft.modules import MultipleChoice, MultiTask, SequenceClassification
from tests.export.test_export_onnx import tiny_model, tiny_tokenizer
from tests.export.test_heads import _bert

TRIALS = [
    {"precision": p, "nodes in fp32": n, "val_f1": f, "drop": d, "agreement": a, "distance": s, "MB": m}
    for p, n, f, d, a, s, m in [("fp32", 0, 0.91, 0.0, 1.0, 0.0, 90.5), ("int8", 2, 0.905, 0.005, 0.991, 0.04, 23.25)]
]
FACTS = {
    "model": "BertForSequenceClassification",
    "task": "text-classification",
    "parameters": 1234567,
    "source": {
        "path": "/home/me/runs/best.ckpt",
        "files": {"best.ckpt": "a1" * 32},
        "fingerprint": {"tensors": 39, "values": 1234567, "sum_of_squares": 321.5},
        "weights_sha256": "b2" * 32,
    },
    "members": 3,
    "baked": ["adapters merged"],
    "averaged": "EMA",
    "inputs": ["input_ids", "attention_mask"],
    "outputs": ["logits"],
    "precision": "int8",
    "gate": TRIALS,
    "exporter": "torch",
    "opset": 20,
    "max_length": 128,
    "tolerance": 1e-5,
    "versions": {"torch": "2.13.0", "onnx": "1.23.2"},
    "version": 7,
    "written": "2026-01-02T03:04:05+00:00",
    "files": {
        "model.onnx": {"bytes": 23250000, "sha256": "c3" * 32},
        "predictor.py": {"bytes": 9, "sha256": "d4" * 32},
    },
}
ROWS = [
    {"batch": 1, "length": 1, "padded": False, "absolute": 1.25e-07, "relative": 3.5e-07},
    {"batch": 5, "length": 65, "padded": True, "absolute": 2.75e-07, "relative": 6.5e-07},
]
HEAD = {"task": "text-classification", "labels": ["no", "a|b", "<i>"], "settings": {}, "max_length": 512}
TRAINING = {"learning_rate": 2e-05, "schedule": "linear", "labels": ["no", "yes"]}


def parsed(text: str) -> dict[str, Any]:
    """The front matter."""
    before, front, _ = text.split("---\n", 2)
    assert before == ""
    result: dict[str, Any] = yaml.safe_load(front)
    return result


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Rows of each table, by its heading."""
    found: dict[str, list[dict[str, str]]] = {}
    for section in text.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        cells = [[c.replace("\0", "|").strip() for c in x.replace("\\|", "\0")[1:-1].split("|")] for x in lines]
        if cells:
            assert len({len(row) for row in cells}) == 1
            found[section.splitlines()[0]] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    return found


def test_front_matter() -> None:
    report = Report("Exported BertForSequenceClassification to ONNX", FACTS, ROWS)
    front = parsed(card(report, head=HEAD, base_model="org/base: a model", language="en"))
    assert front["pipeline_tag"] == "text-classification"
    assert front["library_name"] == "onnx"
    assert front["base_model"] == "org/base: a model"
    assert front["language"] == "en"
    assert "license" not in front
    (index,) = front["model-index"]
    (result,) = index["results"]
    assert result["metrics"] == [{"type": "f1", "name": "val_f1", "value": 0.905}]  # of what was written
    assert parsed(card(report, license="apache-2.0"))["license"] == "apache-2.0"
    assert "base_model" not in parsed(card(report))
    without = {name: value for name, value in FACTS.items() if name != "gate"}
    assert "model-index" not in parsed(card(Report("Exported to ONNX", without)))
    assert "pipeline_tag" not in parsed(card(Report("Exported to ONNX", {**without, "task": "mine"})))


def test_tables_hold_all_figures() -> None:
    text = card(Report("Exported BertForSequenceClassification to ONNX", FACTS, ROWS), head=HEAD, training=TRAINING)
    found = tables(text)
    assert [row["label"] for row in found["Labels"]] == ["no", "a|b", "&lt;i>"]
    for name, rows in (("Parity", ROWS), ("Gate", TRIALS)):
        assert len(found[name]) == len(rows)
        for shown, row in zip(found[name], rows, strict=True):
            assert shown.keys() == row.keys()
            for key, value in row.items():
                if isinstance(value, bool):
                    assert shown[key] == ("yes" if value else "no")
                elif isinstance(value, float):
                    assert float(shown[key]) == pytest.approx(value, rel=1e-3)
                else:
                    assert shown[key] == str(value)
    assert {row["file"]: (int(row["bytes"]), row["sha256"]) for row in found["Files"]} == {
        name: (of["bytes"], of["sha256"])
        for name, of in FACTS["files"].items()  # type: ignore[attr-defined]
    }
    assert {row["package"]: row["version"] for row in found["Versions"]} == FACTS["versions"]
    assert {row["setting"]: json.loads(row["value"]) for row in found["Training"]} == TRAINING
    origin = {row["what"]: row["value"] for row in found["Where it came from"]}
    assert origin["sha256 of best.ckpt"] == "a1" * 32
    assert origin["weights_sha256"] == "b2" * 32
    assert origin["weights: sum_of_squares"] == "321.5"
    assert "/home/me" not in text
    for words in (
        "1,234,567 parameters, in int8",
        "the mean of 3 models",
        "adapters merged",
        "Mean of weights: EMA",
        "Version 7, 2026-01-02T03:04:05+00:00",
        "at most 512 tokens",
        "on up to 128 tokens",
        "depend a little on the rows that it is run with",
        "Tolerance 1e-05",
    ):
        assert words in text


def test_limits_are_those_of_the_precision() -> None:
    for precision, words in (("fp32", None), ("fp16", "fp16 is for GPUs")):
        text = card(Report("Exported to ONNX", {**FACTS, "precision": precision}), head=HEAD)
        assert "rows that it is run with" not in text
        assert words is None or words in text


def test_card_of_an_export_says_how_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python in it runs."""
    module = SequenceClassification(_bert(), ["no", "yes"], learning_rate=3e-5)
    report = export_onnx(module, tmp_path / "out", max_length=8)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert parsed(text)["pipeline_tag"] == "text-classification"
    found = tables(text)
    assert len(found["Parity"]) == len(report.rows)
    assert {row["setting"] for row in found["Training"]} >= {"learning_rate", "schedule", "warmup"}
    assert {row["file"] for row in found["Files"]} == set(report.facts["files"]) - {"README.md"}
    first, second = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    monkeypatch.syspath_prepend(str(tmp_path / "out"))
    known: dict[str, Any] = {}
    exec(first, known)
    assert known["predict"]("w5 w6")["label"] in ("no", "yes")
    assert second.count("int64 [batch, sequence]") == len(report.facts["inputs"])
    compile(second, "card", "exec")


def test_cards_of_other_folders(tmp_path: Path) -> None:
    export_hf(tiny_model(), tmp_path / "hf")
    text = (tmp_path / "hf" / "README.md").read_text("utf-8")
    front = parsed(text)
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-classification")
    block = text.split("```python\n")[1].split("```")[0]
    assert "BertForSequenceClassification.from_pretrained" in block
    compile(block, "card", "exec")
    export_onnx(tiny_model(), tmp_path / "unlabelled", tokenizer=tiny_tokenizer(), max_length=8)
    assert "## Training" not in (tmp_path / "unlabelled" / "README.md").read_text("utf-8")
    module = MultiTask({"mood": SequenceClassification(_bert(), ["no", "yes"]), "choice": MultipleChoice(_bert())})
    export_hf(module, tmp_path / "several")
    text = (tmp_path / "several" / "README.md").read_text("utf-8")
    assert "- [mood](mood)" in text
    assert "- [choice](choice)" in text
    assert parsed(text)["library_name"] == "transformers"
