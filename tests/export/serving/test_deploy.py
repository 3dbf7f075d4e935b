"""What is written beside an export, run with nothing but its folder."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lightning_ft.export import Predictor, export_onnx
from lightning_ft.export.serving import deploy
from lightning_ft.export.serving.deploy import pinned, standalone, write_deployment
from lightning_ft.export.serving.rows import Limits
from lightning_ft.modules import MultipleChoice, SequenceClassification
from tests.export.serving.exported import LABELS, as_checkpoint, assert_same, classifier, link_packages
from tests.export.test_gate import sentences
from tests.pretrained import pretrained


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    found = classifier(tmp_path_factory.mktemp("deploy"))
    write_deployment(found)
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_packages(tmp_path_factory.mktemp("packages") / "only")


def alone(folder: Path, packages: Path, code: str, given: Any) -> Any:
    """Run code with the folder and a predictor's packages on its path, and nothing else; JSON in, JSON out."""
    start = (
        f"import sys, json; sys.path[:0] = [{str(folder)!r}, {str(packages)!r}]; given = json.load(sys.stdin)\n{code}\n"
        "assert not {'torch', 'lightning_ft', 'transformers', 'litserve'} & {*sys.modules}\n"
        "json.dump(found, sys.stdout)"
    )
    command = [sys.executable, "-I", "-S", "-c", start]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- files


def test_files_and_report(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "Dockerfile").write_text("FROM old")
    before = {file.name: file.read_bytes() for file in copy.iterdir() if file.is_file()}
    report = write_deployment(copy, python_image="python:3.12-slim")
    names = {row["file"] for row in report.rows}
    for name, content in before.items():
        assert (copy / name).read_bytes() == content or name == "Dockerfile"
    assert (copy / "Dockerfile").read_text().count("FROM python:3.12-slim") == 2
    assert names >= {"serve.py", "serving/api.py", "Dockerfile", "Dockerfile.gpu", "handler.py", "lambda_handler.py"}
    assert all((copy / name).is_file() for name in names)
    assert not list(copy.glob("**/*.tmp"))
    (copy / "predictor.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"predictor\.py does not exist: give the folder of one task"):
        write_deployment(copy)


def test_nothing_of_this_package_is_imported(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in [out / "serve.py", out / "handler.py", out / "lambda_handler.py", *(out / "serving").glob("*.py")]:
        assert "lightning_ft" not in file.read_text(encoding="utf-8")
    monkeypatch.setattr(deploy, "_source", lambda name: "from lightning_ft.core.report import Report")
    with pytest.raises(ValueError, match="rows imports more of lightning_ft than"):
        standalone("rows")


def test_every_package_is_pinned(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (out / "requirements-serve.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert {"numpy", "onnxruntime", "tokenizers", "litserve", "fastapi", "uvicorn", "starlette"} <= pins.keys()
    assert not {"torch", "transformers", "lightning"} & pins.keys()
    assert all(version(name) == pin for name, pin in pins.items())
    gpu = dict(line.split("==") for line in (out / "requirements-serve-gpu.txt").read_text().splitlines())
    assert gpu.pop("onnxruntime-gpu") == pins.pop("onnxruntime")
    assert gpu == pins
    few = [line.split("==")[0] for line in (out / "requirements.txt").read_text().splitlines()]
    assert few == ["numpy", "onnxruntime", "tokenizers"]
    with pytest.raises(ImportError, match=r'no-such-package is to be pinned .* pip install "lightning-ft\[serve\]"'):
        pinned(["no-such-package"])


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images(name: str, out: Path) -> None:
    """What a linter of Dockerfiles asks for, and that everything copied is there."""
    text = (out / name).read_text()
    steps = [step for step in re.sub(r"\\\n", " ", text).splitlines() if step and not step.startswith("#")]
    words = [step.split()[0] for step in steps]
    assert set(words) <= {"FROM", "COPY", "RUN", "WORKDIR", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    for step in steps:
        if step.startswith("FROM"):
            assert re.match(r"FROM \S+:(?!latest)\S*\d", step)
        if "pip install" in step:
            assert "--no-cache-dir" in step
            (listed,) = re.findall(r"-r /tmp/(\S+)", step)
            assert all("==" in line for line in (out / listed).read_text().splitlines())
        if "apt-get install" in step:
            assert all(part in step for part in ("--no-install-recommends", " -y ", "rm -rf /var/lib/apt/lists/*"))
    assert not re.search(r"\b(ADD|sudo|curl|wget|chmod|ARG|SECRET|TOKEN|PASSWORD)\b", text)
    user = max(i for i, word in enumerate(words) if word == "USER")
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", steps[user])
    assert not {"RUN", "COPY"} & set(words[user:])  # nothing is written as the user, nothing is run as root
    assert words.count("HEALTHCHECK") == words.count("ENTRYPOINT") == 1
    assert json.loads(steps[-1].removeprefix("ENTRYPOINT "))[:2] == ["python", "serve.py"]
    kept = [line[1:] for line in (out / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"serve.py", "serving", "predictor.py", "*.onnx", "*.json"} <= set(kept)
    assert (out / ".dockerignore").read_text().splitlines()[1] == "*"


# ---- AWS Lambda


def event(body: Any, version: int, method: str = "POST", encoded: bool = False, kind: str = "application/json") -> Any:
    """As an API Gateway sends it."""
    text = body if isinstance(body, str) or body is None else json.dumps(body)
    if encoded and text is not None:
        text = base64.b64encode(text.encode()).decode()
    if version == 1:
        headers = {"Content-Type": kind, "Host": "x.execute-api.eu-west-1.amazonaws.com"}
        return {
            "resource": "/predict", "path": "/predict", "httpMethod": method, "headers": headers,
            "multiValueHeaders": {}, "queryStringParameters": None, "requestContext": {"stage": "prod"},
            "body": text, "isBase64Encoded": encoded,
        }  # fmt: skip
    http = {"method": method, "path": "/prod/predict", "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1"}
    found = {
        "version": "2.0", "routeKey": "$default", "rawPath": "/prod/predict", "rawQueryString": "",
        "headers": {"content-type": kind}, "requestContext": {"http": http, "stage": "prod"},
        "isBase64Encoded": encoded,
    }  # fmt: skip
    return found if text is None else {**found, "body": text}


def test_lambda_function(out: Path, packages: Path) -> None:
    texts = sentences(6)
    good = [event({"text": text}, 1 + i % 2, encoded=i > 2) for i, text in enumerate(texts)]
    several = event({"rows": texts}, 2, kind="Application/JSON; charset=utf-8")
    odd: list[tuple[Any, int]] = [
        (event(None, 1), 422),
        (event(None, 2), 422),
        (event("{", 1), 422),
        (event("\ud800", 1), 422),
        (event('{"text": NaN}', 2), 422),
        (event({"text": 3}, 1), 422),
        (event({"rows": ["a"] * 129}, 2), 422),
        (event({"text": "x" * 20_001}, 2), 422),
        (event("x" * (Limits.body + 1), 1), 413),
        (event("x" * (Limits.body + 1), 2, encoded=True), 413),
        ({**event("{}", 2), "body": "not base64 ü", "isBase64Encoded": True}, 422),
        (event({"text": "a"}, 2, kind="text/plain"), 415),
        ({**event({"text": "a"}, 1), "headers": None}, 415),
        (event(None, 1, method="DELETE"), 405),
        ({}, 422),
        (None, 422),
        ([1], 422),
        ({"requestContext": 3}, 422),
        ({"requestContext": {"http": 3}, "body": "{}"}, 422),
    ]
    events = [*good, several, event(None, 2, method="GET"), *(case for case, _ in odd)]
    code = """
import lambda_handler
found = [lambda_handler.handler(event, None) for event in given]
assert lambda_handler.predictor.cache_info().misses == 1"""
    found = alone(out, packages, code, events)
    bodies = [json.loads(answer["body"]) for answer in found]
    wanted = as_checkpoint(out, texts)
    assert all(answer["headers"]["content-type"] == "application/json" for answer in found)
    assert not any(answer["isBase64Encoded"] for answer in found)
    assert {answer["statusCode"] for answer in found[:8]} == {200}
    assert_same(bodies[:6], wanted)
    assert_same(bodies[6]["rows"], wanted)
    assert bodies[7]["labels"] == LABELS
    assert [answer["statusCode"] for answer in found[8:]] == [status for _, status in odd]
    assert all({"error", "field", "expected", "got"} == body.keys() for body in bodies[8:])


# ---- Hugging Face endpoints


def test_endpoint_answers_as_the_pipeline(out: Path, packages: Path) -> None:
    texts = sentences(4)
    pipeline = hf.pipeline("text-classification", model=str(out.parent / "model"), tokenizer=str(out.parent / "model"))
    pipeline.model.config.id2label = dict(enumerate(LABELS))
    pairs = [{"text": texts[0], "text_pair": texts[1]}, {"text": texts[2], "text_pair": texts[3]}]
    requests: list[dict[str, Any]] = [
        {"inputs": inputs, **({"parameters": parameters} if parameters is not None else {})}
        for inputs in (texts[0], texts[:1], texts, pairs[0], pairs)
        for parameters in (None, {}, {"top_k": 1}, {"top_k": 2}, {"top_k": None})
    ]
    code = """
from handler import EndpointHandler
import os; os.chdir("/")
handle = EndpointHandler(sys.path[0])
found = [handle(request) for request in given]
assert EndpointHandler()(given[0]) == found[0]"""
    found = alone(out, packages, code, requests)
    for request, answer in zip(requests, found, strict=True):
        wanted = pipeline(request["inputs"], **request.get("parameters", {}))
        assert [row["label"] for row in flat(answer)] == [row["label"] for row in flat(wanted)]
        scores = [row["score"] for row in flat(wanted)]
        assert [row["score"] for row in flat(answer)] == pytest.approx(scores, abs=1e-5)
        assert shape(answer) == shape(wanted)


def flat(value: Any) -> list[dict[str, Any]]:
    return [value] if isinstance(value, dict) else [row for part in value for row in flat(part)]


def shape(value: Any) -> Any:
    return sorted(value) if isinstance(value, dict) else [shape(part) for part in value]


def test_endpoint_refuses(out: Path, packages: Path) -> None:
    bad = {
        '{"inputs": …}, with "parameters"': {"text": "a"},
        "inputs[0]: expected a row such as": {"inputs": None},
        "inputs: expected a list of rows, got an empty list": {"inputs": []},
        "inputs[1].text: expected a text, got a number": {"inputs": ["a", {"text": 3}]},
        "inputs: expected 128 rows at most": {"inputs": ["a"] * 129},
        "parameters: expected top_k, got 1 others": {"inputs": "a", "parameters": {"truncate": True}},
        "parameters: expected top_k, got no object": {"inputs": "a", "parameters": [1]},
        "top_k must be a whole number, 1 or more": {"inputs": "a", "parameters": {"top_k": 0}},
    }
    code = """
from handler import EndpointHandler
handle, found = EndpointHandler(), []
for request in given:
    try:
        handle(request)
    except ValueError as error:
        found.append(str(error))"""
    found = alone(out, packages, code, list(bad.values()))
    assert len(found) == len(bad)
    for message, wanted in zip(found, bad, strict=True):
        assert wanted in message


def test_endpoints_of_other_tasks(tmp_path: Path, packages: Path) -> None:
    places, classes = {}, hf.AutoModelForSequenceClassification
    cases: list[tuple[str, Any, Callable[[str], Any]]] = [
        ("choice", hf.AutoModelForMultipleChoice, MultipleChoice),
        ("features", hf.AutoModel, str),
        ("regression", classes, lambda path: SequenceClassification(path, problem="regression")),
        ("several", classes, lambda path: SequenceClassification(path, LABELS, problem="multi_label")),
    ]
    for name, auto, make in cases:
        path = pretrained(tmp_path / name / "model", "bert", auto, initializer_range=0.4)
        export_onnx(make(path), tmp_path / name / "out", max_length=32)
        write_deployment(tmp_path / name / "out")
        places[name] = tmp_path / name / "out"
    code = "import handler; handle = handler.EndpointHandler(); found = [handle(request) for request in given]"
    rows = [{"context": "the film", "choices": ["is good", "a b"]}, {"context": "it", "choices": ["x", "y"]}]
    one, many = alone(places["choice"], packages, code, [{"inputs": rows[0]}, {"inputs": rows}])
    assert one == many[0]
    assert [row["choice"] for row in many] == [row["choice"] for row in Predictor(places["choice"])(rows)]
    one, many = alone(places["features"], packages, code, [{"inputs": "a film"}, {"inputs": ["a film", "it"]}])
    assert many[0] == pytest.approx(one, abs=1e-5)
    assert one == pytest.approx(Predictor(places["features"])("a film")["embedding"], abs=1e-5)
    (answer,) = alone(places["regression"], packages, code, [{"inputs": "a film"}])
    assert answer == [{"label": "LABEL_0", "score": pytest.approx(Predictor(places["regression"])("a film")["score"])}]
    top = {"top_k": None}
    answer, ranked = alone(places["several"], packages, code, [{"inputs": "it"}, {"inputs": "it", "parameters": top}])
    shares = Predictor(places["several"])("it")["probabilities"]
    assert answer[0]["score"] == pytest.approx(max(shares))
    assert {row["label"]: row["score"] for row in ranked} == pytest.approx(dict(zip(LABELS, shares, strict=True)))
