"""What a server says of itself: a page for people, which asks nothing of other hosts, and OpenAPI for programs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

from lightning_ft.export.serving.rows import Task

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1d2129; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
label { display: block; margin: .8rem 0 .2rem; font-weight: 600; }
textarea, button { font: inherit; border: 1px solid #8a92a0; border-radius: 4px; }
textarea { width: 100%; box-sizing: border-box; padding: .5rem; }
button { margin: .8rem 0; padding: .4rem 1.2rem; background: #1f5fbf; color: #fff; }
pre { background: #f2f4f7; padding: .8rem; border-radius: 4px; white-space: pre-wrap; word-break: break-word; }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { background: #16181d; color: #e6e8ec; }
  pre, textarea { background: #23262d; color: inherit; }
  a { color: #8ab4f8; }
}
"""

SCRIPT = """
const [form, out, shell] = ["try", "out", "shell"].map(name => document.getElementById(name));
shell.textContent = shell.textContent.replace("http://HOST:PORT/", new URL(".", location.href).href);
form.addEventListener("submit", async event => {
  event.preventDefault();
  const row = {};
  for (const box of form.querySelectorAll("textarea")) {
    if (box.dataset.kind === "list") row[box.name] = box.value.split("\\n").filter(line => line.trim());
    else if (box.dataset.kind === "json") try { Object.assign(row, JSON.parse(box.value)); }
      catch (error) { out.textContent = "Not JSON: " + error.message; return; }
    else if (box.value.trim()) row[box.name] = box.value;
  }
  out.textContent = "…";
  const started = performance.now();
  try {
    const answer = await fetch("predict", {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(row)
    });
    const said = await answer.json(), took = Math.round(performance.now() - started);
    out.textContent = answer.status + ", " + took + " ms\\n" + JSON.stringify(said, null, 2);
  } catch (error) { out.textContent = "No answer: " + error.message; }
});
"""


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


PAGE_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash(SCRIPT)}; style-src {_hash(STYLE)}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
}
"""A browser that obeys them runs the page's own script and no other, and asks this server alone."""


def docs_page(info: Mapping[str, Any], task: Task) -> str:
    """The page at ``/``: what the model does, a form to try it, a call from a shell, the limits.

    Args:
        info: What ``/info`` shows.
        task: What a row holds.
    """
    limits = info["limits"]
    example = json.dumps(dict(task.example), ensure_ascii=False)
    quoted = escape(example.replace("'", "'\\''"))
    labels = ", ".join(escape(str(label)) for label in info["labels"]) or "none"
    facts = {
        "Labels": labels,
        "Tokens that the model takes": escape(str(info["max_length"] or "no limit")),
        "Body": f"{limits['body']:,} bytes, else 413",
        "Rows in a request": f"{limits['rows']:,} (every choice counts), else 422",
        "Characters of a row": f"{limits['characters']:,}, else 422",
        "Requests at a time": f"{info['max_queue']:,}, else 503 with Retry-After",
    }
    table = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in facts.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(task.name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<h1>{escape(task.name)}</h1>
<form id="try">{_boxes(task)}<button>Predict</button></form>
<pre id="out" aria-live="polite">The answer comes here.</pre>
<h2>From a shell</h2>
<pre id="shell">curl -s http://HOST:PORT/predict -H 'Content-Type: application/json' -d '{quoted}'</pre>
<p>Several rows at once: <code>{{"rows": [{escape(example)}, …]}}</code>; the answer is <code>{{"rows": […]}}</code>,
in the same order. What cannot be answered comes back as
<code>{{"error": …, "field": …, "expected": …, "got": …}}</code>.</p>
<h2>Limits</h2><table>{table}</table>
<h2>More</h2>
<p><a href="info">info</a> (model, versions), <a href="health">health</a>, <a href="openapi.json">openapi.json</a></p>
<script>{SCRIPT}</script></body></html>
"""


def _boxes(task: Task) -> str:
    if not task.fields:
        box = '<textarea id="row" rows="4" data-kind="json">'
        return f'<label for="row">Row, as JSON</label>{box}{escape(json.dumps(dict(task.example)))}</textarea>'
    boxes = []
    for name in task.fields:
        value, kind = task.example.get(name, ""), "list" if name in task.lists else "text"
        if kind == "list" and not value:
            continue  # another way to write a row: the form shows the first
        shown = "\n".join(value) if isinstance(value, list) else str(value)
        note = " (one on each line)" if kind == "list" else "" if value else " (optional)"
        key = escape(name)
        boxes.append(
            f'<label for="{key}">{key}{note}</label><textarea id="{key}" name="{key}" data-kind="{kind}" '
            f'rows="{3 if value else 1}">{escape(shown)}</textarea>'
        )
    return "".join(boxes)


def openapi(info: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """The description at ``/openapi.json``, OpenAPI 3.1.

    Args:
        info: What ``/info`` shows.
        task: What a row holds.
    """
    limits = info["limits"]
    row, answer = {"$ref": "#/components/schemas/Row"}, {"$ref": "#/components/schemas/Answer"}
    many = {"type": "array", "minItems": 1, "maxItems": limits["rows"], "items": row}
    request = {"oneOf": [row, _object({"rows": many}, ["rows"])]}
    answers = {"oneOf": [answer, _object({"rows": {"type": "array", "items": answer}}, ["rows"])]}
    refusals = {
        "408": "The body did not come in time.",
        "413": f"The body is larger than {limits['body']} bytes.",
        "415": "The body is not application/json, or is compressed.",
        "422": "Not UTF-8, not JSON, or not a row of this task; too long, too many, empty.",
        "503": f"{info['max_queue']} requests are in work, or none was answered in time: wait Retry-After seconds.",
    }
    refusal = _json("#/components/schemas/Refusal")
    predict = {
        "summary": "Answer a row, or several",
        "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
        "responses": {
            "200": {"description": "Answers, in order.", "content": {"application/json": {"schema": answers}}},
            **{code: {"description": text, "content": refusal} for code, text in refusals.items()},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{task.name} model", "version": str(next(iter(info["sha256"].values()), ""))[:12]},
        "paths": {
            "/predict": {"post": predict},
            "/health": {"get": _get("ok when every worker is ready, else 503", "text/plain")},
            "/info": {"get": _get("The model, the limits, the versions", "application/json")},
            "/": {"get": _get("A page with a form", "text/html")},
        },
        "components": {
            "schemas": {
                "Row": _row(task, limits),
                "Answer": _answer(task.name),
                "Refusal": _object({name: {"type": "string"} for name in ("error", "field", "expected", "got")}),
            }
        },
    }


def _row(task: Task, limits: Mapping[str, Any]) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": limits["characters"]}
    texts = {"type": "array", "minItems": 1, "items": text}
    example = {"examples": [dict(task.example)]}
    if not task.fields:
        return {"type": "object", "additionalProperties": {"oneOf": [text, texts]}, **example}
    fields = dict.fromkeys(task.texts, text) | dict.fromkeys(task.lists, texts)
    return {**_object(fields, task.needed), **example}


def _answer(task: str) -> dict[str, Any]:
    number, whole, text = {"type": "number"}, {"type": "integer"}, {"type": "string"}
    numbers, texts = {"type": "array", "items": number}, {"type": "array", "items": text}
    shares = {"score": number, "probabilities": numbers}
    span = _object({"label": text, "text": text, "start": whole, "end": whole, "score": number})
    known: dict[str, tuple[dict[str, Any], list[str]]] = {
        "text-classification": ({"label": {"oneOf": [text, texts]}, **shares}, ["score"]),
        "cloze": ({"label": text, **shares}, ["label", "score", "probabilities"]),
        "multiple-choice": ({"choice": whole, **shares}, ["choice", "score", "probabilities"]),
        "feature-extraction": ({"embedding": numbers}, ["embedding"]),
        "question-answering": ({"answer": text, "score": number, "start": whole, "end": whole}, ["answer", "score"]),
        "token-classification": ({"entities": {"type": "array", "items": span}, "tags": texts}, []),
    }
    fields, needed = known.get(task, ({}, []))
    return {
        **_object(fields, needed),
        "additionalProperties": True,
        "description": "As `lightning-ft predict` writes it.",
    }


def _object(properties: Mapping[str, Any], required: Any = None) -> dict[str, Any]:
    needed = list(properties if required is None else required)
    return {"type": "object", "properties": dict(properties), "required": needed, "additionalProperties": False}


def _json(reference: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": reference}}}


def _get(summary: str, kind: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": {kind: {}}}}}
