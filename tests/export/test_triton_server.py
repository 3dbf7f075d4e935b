"""The repository as it is shipped, in a real tritonserver, asked over HTTP and gRPC."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset

from lightning_ft.data import ClassificationData, MultipleChoiceData
from lightning_ft.export import export_onnx, write_triton_repository
from lightning_ft.modules import MultipleChoice, SequenceClassification
from tests.data.test_multiple_choice_data import rows as choices
from tests.export.test_gate import WORDS
from tests.export.test_predictor import as_predicted, folder
from tests.export.triton_backend.server import PYTHON, ROOT, Server, client, packages

pytestmark = pytest.mark.triton

LENGTH = 48
LABELS = ["no", "yes", "ćma"]


def texts(count: int) -> list[str]:
    """Of 1 to 60 words; some are cut."""
    generator = np.random.default_rng(1)
    return [" ".join(generator.choice(WORDS, 1 + i % 60)) for i in range(count)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with three repositories, and what they were made from."""
    packages()
    place = tmp_path_factory.mktemp("triton")
    classifier = SequenceClassification(folder(place / "a", "bert", hf.AutoModelForSequenceClassification), LABELS)
    chooser = MultipleChoice(folder(place / "b", "roberta", hf.AutoModelForMultipleChoice))
    encoder = folder(place / "c", "gpt2", hf.AutoModel)
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder, pad_token="<|endoftext|>")
    model = hf.AutoModel.from_pretrained(encoder, pad_token_id=tokenizer.pad_token_id)
    repositories = []
    for name, source in {"sentiment": classifier, "choice": chooser, "encoder": model}.items():
        export_onnx(source, place / name, tokenizer=tokenizer if source is model else None, max_length=32)
        repositories.append(place / f"{name}-repository")
        # A long delay: a client in Python takes a millisecond or more for each request that it sends.
        options: dict[str, Any] = {"max_length": LENGTH, "max_bytes": 4096, "max_queue_delay_us": 100_000}
        write_triton_repository(place / name, repositories[-1], name=name, **options)
    with Server(place, repositories) as server:
        yield SimpleNamespace(
            server=server, repositories=repositories, classifier=classifier, chooser=chooser, encoder=encoder
        )


def test_configurations_are_triton_s_own_messages(served: SimpleNamespace) -> None:
    found = client("validate", *map(str, served.repositories))
    assert found.keys() == {f"{name}{end}" for name in ("sentiment", "choice", "encoder") for end in ("", "_graph")}
    assert found["sentiment"]["input"] == [
        {"name": "text", "data_type": "TYPE_STRING", "dims": ["1"]},
        {"name": "text_pair", "data_type": "TYPE_STRING", "dims": ["1"], "optional": True},
    ]
    assert found["sentiment"]["dynamic_batching"] == {"max_queue_delay_microseconds": "100000"}
    graph = found["sentiment_graph"]
    assert graph["optimization"] == {"graph": {"level": -1}}
    assert [sample["batch_size"] for sample in graph["model_warmup"]] == [1, 16, 1, 16]
    assert {tuple(entry["dims"]) for entry in found["choice_graph"]["input"]} == {("-1", "-1")}


def test_it_is_ready_and_warm(served: SimpleNamespace) -> None:
    for path in ("health/live", "health/ready", "models/sentiment/ready", "models/sentiment_graph/versions/1/ready"):
        assert served.server.get(path)[0] == 200
    sizes = {row["batch_size"] for row in served.server.statistics("encoder_graph")["batch_stats"]}
    assert sizes == {1, 16}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_many_at_once_as_the_checkpoint_predicts(served: SimpleNamespace, protocol: str) -> None:
    asked = texts(200)
    data = ClassificationData(
        str(Path(served.classifier.model.config._name_or_path)),
        predict=Dataset.from_dict({"text": asked}),
        labels=LABELS,
        max_length=LENGTH,
    )
    wanted = as_predicted(served.classifier, data)
    before = served.server.statistics("sentiment"), served.server.statistics("sentiment_graph")
    names = ("answer", "label", "score", "probabilities")
    found = served.server.ask(protocol, "sentiment", [{"text": [text]} for text in asked], *names)
    after = served.server.statistics("sentiment"), served.server.statistics("sentiment_graph")
    assert len({row["label"] for row in wanted}) > 1
    for answer, row in zip(found, wanted, strict=True):
        assert answer.keys() == set(names), answer
        assert answer["label"] == [row["label"]]
        assert answer["probabilities"][0] == pytest.approx(row["probabilities"], abs=1e-4)
        assert answer["score"][0] == pytest.approx([row["score"]], abs=1e-4)
        whole = json.loads(answer["answer"][0])
        assert whole["label"] == row["label"]
        assert whole["probabilities"] == pytest.approx(row["probabilities"], abs=1e-4)
    requests, runs, graph_runs = (
        after[i][name] - before[i][name]
        for i, name in ((0, "inference_count"), (0, "execution_count"), (1, "execution_count"))
    )
    assert requests == 200
    assert runs < 100
    assert graph_runs < 100


def test_rows_of_one_request_and_pairs(served: SimpleNamespace) -> None:
    asked, others = texts(64), texts(64)[::-1]
    data = ClassificationData(
        served.classifier.model.config._name_or_path,
        predict=Dataset.from_dict({"text": asked, "other": others}),
        text_pair="other",
        labels=LABELS,
        max_length=LENGTH,
    )
    wanted = as_predicted(served.classifier, data)
    [found] = served.server.ask("grpc", "sentiment", [{"text": asked, "text_pair": others}], "label", "probabilities")
    assert found["label"] == [row["label"] for row in wanted]
    assert np.array(found["probabilities"]) == pytest.approx(
        np.array([row["probabilities"] for row in wanted]), abs=1e-4
    )


def test_multiple_choice(served: SimpleNamespace) -> None:
    table = choices(40)
    data = MultipleChoiceData(served.chooser.model.config._name_or_path, predict=table, max_length=LENGTH)
    wanted = as_predicted(served.chooser, data)
    requests = [{"row": [json.dumps({"context": row["context"], "choices": row["choices"]})]} for row in table]
    found = served.server.ask("http", "choice", requests, "answer", "choice", "score")
    for answer, row in zip(found, wanted, strict=True):
        assert answer["choice"] == [[row["choice"]]]
        assert answer["score"][0] == pytest.approx([row["score"]], abs=1e-4)
        assert json.loads(answer["answer"][0])["probabilities"] == pytest.approx(row["probabilities"], abs=1e-4)


def test_embeddings(served: SimpleNamespace) -> None:
    asked = texts(20)
    tokenizer, model = hf.AutoTokenizer.from_pretrained(served.encoder), hf.AutoModel.from_pretrained(served.encoder)
    found = served.server.ask("grpc", "encoder", [{"text": [text]} for text in asked], "embedding")
    for text, answer in zip(asked, found, strict=True):
        with torch.inference_mode():
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)
            wanted = model(**given).last_hidden_state[0].mean(0)
        assert answer["embedding"][0] == pytest.approx(wanted.tolist(), abs=1e-4)


BAD: dict[str, tuple[str, dict[str, list[str | bytes]], str]] = {
    "invalid UTF-8": (
        "sentiment",
        {"text": [b"a \xff film"]},
        "row 0: text is not UTF-8: invalid start byte at byte 2",
    ),
    "huge": ("sentiment", {"text": ["x " * 2049]}, "row 0: text has 4,098 bytes, and at most 4,096 are taken"),
    "second of two": ("sentiment", {"text": ["good", b"\xc3"]}, "row 1: text is not UTF-8: unexpected end of data"),
    "no text": ("sentiment", {"text_pair": ["good"]}, "the input text is missing"),
    "too many rows": ("sentiment", {"text": ["good"] * 65}, "batch-size must be <= 64"),
    "unknown input": ("sentiment", {"row": ["good"]}, "unexpected inference input 'row'"),
    "no JSON": ("choice", {"row": ["good"]}, "row 0: expected a row as JSON: Expecting value"),
    "another row": ("choice", {"row": ['{"text": "good"}']}, "row 0: expected a mapping with context and choices"),
    "not a text": ("choice", {"row": ['{"context": NaN, "choices": ["a", "b"]}']}, "row 0: expected texts as context"),
    "deep": ("choice", {"row": ["[" * 4000]}, "recursion"),
    "no token": ("encoder", {"text": [""]}, "row 0: the tokenizer makes no token of it"),
}
"""What is wrong: the model, the columns, and the error."""


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_bad_requests_fail_alone(served: SimpleNamespace, protocol: str) -> None:
    server = served.server
    good = {"sentiment": {"text": ["good"]}, "encoder": {"text": ["good"]}}
    good["choice"] = {"row": [json.dumps({"context": "it", "choices": ["good", "bad"]})]}
    for model, valid in good.items():
        cases = [(columns, message) for name, columns, message in BAD.values() if name == model]
        # Each between two good ones, with which it is merged.
        requests: list[Any] = [request for columns, _ in cases for request in (valid, columns, valid)]
        found = server.ask(protocol, model, requests)
        for i, (columns, message) in enumerate(cases):
            first, second, third = found[3 * i : 3 * i + 3]
            assert message in second["error"], columns
            assert second["status"] in ("400", "StatusCode.INVALID_ARGUMENT"), second
            assert first == third
            assert "answer" in first, first


def test_bodies_that_are_no_requests(served: SimpleNamespace) -> None:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["good"]}
    bodies = {
        b"": "Raw request must only have 1 input",
        b"\xff\xfe": "failed to parse the request JSON buffer",
        b"{": "failed to parse the request JSON buffer",
        b"{}": "Unable to parse 'inputs'",
        b'{"inputs": []}': "missing required input(s) ['text']",
        json.dumps({"inputs": [{**tensor, "datatype": "INT64", "data": [3]}]}).encode(): "data-type is 'INT64'",
        json.dumps({"inputs": [{**tensor, "data": [3]}]}).encode(): "Unable to parse JSON bytes array",
        json.dumps({"inputs": [{**tensor, "shape": [0, 1], "data": []}]}).encode(): "got 0",
        json.dumps({"inputs": [{**tensor, "shape": [1]}]}).encode(): "unexpected shape for input 'text'",
        json.dumps({"inputs": [{**tensor, "shape": [10**9, 1]}]}).encode(): "batch-size must be <= 64",
        json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode(): "unexpected inference output",
    }
    for body, message in bodies.items():
        status, text = served.server.post("sentiment", body)
        assert status in (400, 500), (body, text)
        assert message in json.loads(text)["error"], body
    status, text = served.server.post("sentiment", json.dumps({"inputs": [tensor]}).encode())
    assert status == 200, text


def test_token_ids_for_the_graph_itself(served: SimpleNamespace) -> None:
    """Clients that tokenise by themselves."""
    ids = [[2, 7, 9, 3]]
    names = ("input_ids", "attention_mask", "token_type_ids")
    values = dict(zip(names, (ids, [[1] * 4], [[0] * 4]), strict=True))
    tensors = [{"name": name, "datatype": "INT64", "shape": [1, 4], "data": value} for name, value in values.items()]
    status, text = served.server.post("sentiment_graph", json.dumps({"inputs": tensors}).encode())
    assert status == 200, text
    with torch.inference_mode():
        wanted = served.classifier.model.eval()(**{name: torch.tensor(value) for name, value in values.items()}).logits
    assert json.loads(text)["outputs"][0]["data"] == pytest.approx(wanted[0].tolist(), abs=1e-4)


def test_the_example(served: SimpleNamespace) -> None:
    command = [str(PYTHON), str(ROOT / "examples" / "triton_client.py"), f"localhost:{served.server.http}", "sentiment"]
    done = subprocess.run([*command, "a good film", "dull"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[-1] for line in lines] == ["a good film", "dull"]
    assert all(line[0] in LABELS for line in lines)


def test_the_readme_s_commands(served: SimpleNamespace) -> None:
    """What it says of asking, with the port of this server."""
    for repository in served.repositories:
        text = (repository / "README.md").read_text("utf-8")
        text = text.replace("localhost:8000", f"localhost:{served.server.http}")
        curl = text.partition("    curl localhost")[2].partition("\n\n")[0]
        done = subprocess.run(f"curl --fail --silent localhost{curl}", shell=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout
        first = {entry["name"]: entry["data"] for entry in json.loads(done.stdout)["outputs"]}["answer"][0]
        code = text.partition("    import json\n")[2].partition("\n\nA request")[0]
        code = "import json\n" + code.replace("\n    ", "\n").removeprefix("    ")
        done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(json.loads(first))


def test_graceful_stop(served: SimpleNamespace, tmp_path: Path) -> None:
    """Requests that are under way when it is told to stop are answered, and it ends without an error."""
    with Server(tmp_path, served.repositories[:1]) as server:
        columns = [{"text": [text.encode().hex()] * 32} for text in texts(200)]
        asked = json.dumps({"model": "sentiment", "requests": columns, "outputs": ["label"]})
        command = [str(PYTHON), str(Path(__file__).parent / "triton_backend" / "client.py"), "ask", "grpc"]
        with subprocess.Popen(
            [*command, f"localhost:{server.grpc}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as asking:
            assert asking.stdin is not None
            assert asking.stdout is not None
            asking.stdin.write(asked)
            asking.stdin.close()
            while server.statistics("sentiment")["inference_count"] == 0:
                assert asking.poll() is None
            server.process.terminate()
            answers = json.loads(asking.stdout.read())
        assert server.process.wait(60) == 0
    assert sum("label" in answer for answer in answers) > 50
    # Where this machine was so slow that some had not even arrived.
    late = "Request for unknown model: 'sentiment' has no available versions"
    assert {answer["error"] for answer in answers if "error" in answer} <= {late}


def test_models_are_loaded_and_unloaded_by_nobody_else(served: SimpleNamespace) -> None:
    url = f"http://127.0.0.1:{served.server.http}/v2/repository"
    for path in ("models/sentiment/unload", "index"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", b"{}", method="POST"), timeout=30)
    assert served.server.get("models/sentiment/ready")[0] == 200
