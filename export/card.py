"""The model card of an exported folder, written from what its report says and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ft.core.pattern import parse_patterns
from lightning_ft.core.report import Report

PIPELINES = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "multiple-choice": "multiple-choice",
    "fill-mask": "fill-mask",
    "feature-extraction": "feature-extraction",
    "text-generation": "text-generation",
    "text2text-generation": "text2text-generation",
    "cloze": "text-classification",
}
"""Our names of tasks, as Hugging Face has them; a task of your own has none."""

AXES = {"gap": "[batch, gap]", "pattern": "[batch]"}


def card(
    report: Report,
    *,
    head: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    language: str | None = None,
    license: str | None = None,
) -> str:
    """A README.md with the front matter of Hugging Face, from the report of an export.

    Args:
        report: What the export returned, or ``report.json`` holds.
        head: What ``head.json`` holds: task, labels, settings, max_length.
        training: Settings of the training, by name.
        base_model: What was fine-tuned: a name on the hub, or a path.
        language: Code of the texts' language.
        license: Identifier of the licence; by default none is claimed.

    Returns:
        The text. Multi-task folders get a list of their parts.
    """
    facts, known = report.facts, dict(head or {})
    parts = [name for name, value in facts.items() if isinstance(value, Mapping) and "source" in value]
    name = str(facts.get("model") or "Exported models")
    library = "transformers" if "Hugging Face" in report.title else "onnx"
    given = {"library_name": library, "base_model": base_model, "language": language, "license": license}
    front = _front(facts, known, name, given)
    sections = [
        f"# {name}",
        _intro(report, parts),
        _labels(known),
        _usage(facts, known, parts),
        _table("Engines", report.rows, "")
        if _is_engine(facts)
        else _table("Parity", report.rows, _parity_words(facts)),
        _table("Gate", facts.get("gate", ()), _gate_words(facts)),
        _table("Files", _files(facts), ""),
        _table(
            "Training", [{"setting": key, "value": json.dumps(value)} for key, value in (training or {}).items()], ""
        ),
        _table("Where it came from", _origin(facts), ""),
        _table(
            "Versions", [{"package": key, "version": value} for key, value in facts.get("versions", {}).items()], ""
        ),
        _limits(facts, known),
    ]
    return "\n\n".join([f"---\n{front}---", *(text for text in sections if text)]) + "\n"


def _front(facts: Mapping[str, Any], head: Mapping[str, Any], name: str, given: Mapping[str, Any]) -> str:
    task = facts.get("task") or head.get("task")
    entries: dict[str, Any] = {**given, "pipeline_tag": PIPELINES.get(str(task)), "tags": ["lightning-ft"]}
    if results := _metrics(facts):
        shown = {"type": PIPELINES.get(str(task), "other")}
        found = {"task": shown, "dataset": {"name": "validation data", "type": "validation"}, "metrics": results}
        entries["model-index"] = [{"name": name, "results": [found]}]
    # JSON is YAML: no value needs quoting of its own.
    return "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items() if value is not None
    )


def _metrics(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the graph that was written: the gate's last trial."""
    trials = facts.get("gate") or []
    if not trials:
        return []
    known = ("precision", "nodes in fp32", "drop", "agreement", "distance", "MB")
    return [
        {"type": name.removeprefix("val_"), "name": name, "value": value}
        for name, value in trials[-1].items()
        if name not in known and isinstance(value, int | float) and math.isfinite(value)
    ]


def _intro(report: Report, parts: Sequence[str]) -> str:
    facts = report.facts
    lines = [f"{report.title}."]
    if "task" in facts:
        lines.append(f"Task: {facts['task']}. {facts['parameters']:,} parameters, in {facts.get('precision', 'fp32')}.")
    if "members" in facts:
        lines.append(f"Its answer is the mean of {facts['members']} models in one graph.")
    if facts.get("baked"):
        lines.append(f"Before the export: {', '.join(facts['baked'])}.")
    if facts.get("averaged"):
        lines.append(f"Mean of weights: {facts['averaged']}.")
    if "version" in facts:
        lines.append(f"Version {facts['version']}, {facts.get('written')}.")
    if parts:
        lines.append("A folder for each head:\n\n" + "\n".join(f"- [{name}]({name})" for name in parts))
    return "\n".join(lines)


def _labels(head: Mapping[str, Any]) -> str:
    labels = head.get("labels") or []
    if not labels:
        return ""
    return _table("Labels", [{"index": index, "label": label} for index, label in enumerate(labels)], "")


def _usage(facts: Mapping[str, Any], head: Mapping[str, Any], parts: Sequence[str]) -> str:
    if parts:
        return ""
    if _is_engine(facts):
        lines = ["from lightning_ft.export import Predictor, load_engine", ""]
        return _code([*lines, 'predict = Predictor("FOLDER", session=load_engine("FOLDER"))', 'predict("A text")'])
    if "runtime" in facts:
        lines = ["import onnxruntime_genai", "", 'model = onnxruntime_genai.Model("FOLDER")']
        lines += ["tokenizer = onnxruntime_genai.Tokenizer(model)"]
        lines += ["generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))"]
        lines += ['generator.append_tokens(tokenizer.encode("A text"))']
        lines += ["while not generator.is_done():", "    generator.generate_next_token()"]
        return _code([*lines, "print(tokenizer.decode(generator.get_sequence(0)))"])
    if "inputs" not in facts:
        kind = str(facts.get("model", "Auto"))
        lines = [f"from transformers import AutoTokenizer, {kind}", ""]
        lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")', f'model = {kind}.from_pretrained("FOLDER")']
        return _code([*lines, 'model(**tokenizer("A text", return_tensors="pt"))'])
    row: Any = "A text"
    if head.get("task") == "question-answering":
        row = {"question": "A question?", "context": "A text."}
    elif head.get("task") == "multiple-choice":
        row = {"context": "A text", "choices": ["one", "other"]}
    elif head.get("task") == "cloze":
        row = {name: "A text" for one in parse_patterns(head["settings"]["patterns"]) for name in one.columns}
    blocks = []
    if "predictor.py" in facts.get("files", {"predictor.py": None}):
        lines = ["from predictor import Predictor  # in this folder; it needs onnxruntime, tokenizers and numpy alone"]
        lines += ["", "predict = Predictor()", f"predict({json.dumps(row)})"]
        blocks.append(lines)
    if "graphs" in head.get("settings", {}):  # of a cache, nobody feeds by hand
        return _code(*blocks)
    axes = "[batch, choices, sequence]" if head.get("task") == "multiple-choice" else "[batch, sequence]"
    feed = [f'    "{name}": ...,  # int64 {AXES.get(name, axes)}' for name in facts["inputs"]]
    lines = ["import onnxruntime", "", 'session = onnxruntime.InferenceSession("model.onnx")']
    blocks.append([*lines, f"session.run({json.dumps(facts['outputs'])}, {{", *feed, "})"])
    return _code(*blocks)


def _code(*blocks: Sequence[str]) -> str:
    return "## How to use\n\n" + "\n\n".join("\n".join(["```python", *lines, "```"]) for lines in blocks)


def _is_engine(facts: Mapping[str, Any]) -> bool:
    return "built from" in facts


def _parity_words(facts: Mapping[str, Any]) -> str:
    if "runtime" in facts:
        return (
            "The graph in fp32 against the model on random tokens: largest difference of a logit, absolute, and "
            f"relative to the largest one. Tolerance {facts['tolerance']:g}."
        )
    if "opset" not in facts:
        return "Every tensor of the folder was compared with the source's, to the bit."
    return (
        f"The graph in fp32 (opset {facts['opset']}, written by the exporter of {facts.get('exporter', 'torch')}) "
        "against the model on random tokens: largest difference of an output, absolute, and relative to the largest "
        f"output. Tolerance {facts['tolerance']:g}."
    )


def _gate_words(facts: Mapping[str, Any]) -> str:
    return f"Judged on the validation data; what was written is the last row, in {facts.get('precision')}."


def _files(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    files: Mapping[str, Mapping[str, Any]] = facts.get("files", {})
    return [{"file": name, "bytes": of["bytes"], "sha256": of["sha256"]} for name, of in files.items()]


def _origin(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    source: Mapping[str, Any] = facts.get("source", {})
    rows = {name: source[name] for name in ("class", "weights_sha256") if name in source}
    # The path's last part: where it lay on somebody's disk is nobody's business.
    rows |= {f"sha256 of {name}": digest for name, digest in source.get("files", {}).items()}
    rows |= {f"weights: {name}": value for name, value in source.get("fingerprint", {}).items()}
    return [{"what": name, "value": value} for name, value in rows.items()]


def _limits(facts: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    lines = []
    if (length := head.get("max_length")) is not None:
        lines.append(f"- The model takes at most {length} tokens; longer texts are cut.")
    if (proved := facts.get("max_length")) is not None:
        lines.append(f"- Equality with the model was shown on up to {proved} tokens.")
    if facts.get("precision") == "int8":
        lines.append(
            "- int8 is dynamic: the scale of activations is that of the whole batch, so a row's logits depend a "
            "little on the rows that it is run with."
        )
    if facts.get("precision") == "fp16":
        lines.append("- fp16 is for GPUs; a CPU converts back and forth.")
    if head.get("labels"):
        lines.append("- It knows no other labels than those above, and answers with one of them whatever it is given.")
    return "\n".join(["## Limits", "", *lines]) if lines else ""


def _table(title: str, rows: Sequence[Mapping[str, Any]], words: str) -> str:
    """A section with a table; nothing for no rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]
    return "\n".join([f"## {title}", "", *([words, ""] if words else []), *lines])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    # What would end the cell, or the line, or be taken for HTML.
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
