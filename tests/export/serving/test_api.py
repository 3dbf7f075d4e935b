"""A worker's work, without a server: joint runs, errors that stay one request's own, batches."""

from __future__ import annotations

import json
import logging
import pickle
import queue
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ft.core.files import sha256
from lightning_ft.export.serving import api as module
from lightning_ft.export.serving.api import JointRuns, OneLine, Outcome, PredictAPI, place_of
from lightning_ft.export.serving.rows import TASKS, Limits
from lightning_ft.export.serving.server import cores, create_server, main
from tests.export.serving.exported import LABELS, as_checkpoint, assert_same, classifier
from tests.export.test_gate import sentences


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return classifier(tmp_path_factory.mktemp("api"))


@pytest.fixture
def api(out: Path, monkeypatch: pytest.MonkeyPatch) -> PredictAPI:
    monkeypatch.setattr(PredictAPI, "_settle", lambda self: None)  # it sets the signals and logs of a process
    options = {"provider": "cpu", "threads": 1, "batch_size": 8, "max_length": None}
    made = PredictAPI(
        str(out),
        task=TASKS["text-classification"],
        options=options,
        batch_timeout=0.01,
        limits=Limits(rows=4, characters=500),
    )
    made.setup("cpu")
    return made


def run(api: PredictAPI, requests: list[Any]) -> list[Any]:
    """What LitServe's loop does with a batch."""
    outputs = api.unbatch(api.predict(api.batch([api.decode_request(request) for request in requests])))
    responses = [pickle.loads(pickle.dumps(api.encode_response(output))) for output in outputs]
    return [(response.status_code, json.loads(response.body), response.headers) for response in responses]


def test_requests_of_a_batch_are_run_together(api: PredictAPI, out: Path) -> None:
    texts = sentences(5)
    requests = [
        {"rows": [texts[0]], "single": True},
        {"rows": [{"text": texts[1]}, texts[2]], "single": False},
        {"text": texts[3]},  # as it comes where nothing stands before the model
        {"rows": [texts[4]]},
    ]
    found = run(api, requests)
    assert [status for status, *_ in found] == [200] * 4
    assert {headers["server-timing"].split(";")[2] for *_, headers in found} == {'desc="4 requests"'}
    answers = [found[0][1], *found[1][1]["rows"], found[2][1], *found[3][1]["rows"]]
    assert_same(answers, as_checkpoint(out, texts))
    assert {answer["label"] for answer in answers} <= set(LABELS)


def test_a_bad_request_fails_alone(api: PredictAPI, caplog: pytest.LogCaptureFixture) -> None:
    texts = sentences(2)
    good = [{"rows": [text], "single": True} for text in texts]
    bad: list[Any] = [None, [], {"rows": [3], "single": True}, {"rows": ["x" * 501]}, {"rows": ["a"] * 5}]
    found = run(api, [good[0], *bad, good[1]])
    assert [status for status, *_ in found] == [200, 422, 422, 422, 422, 422, 200]
    assert all("error" in body for _, body, _ in found[1:-1])
    real = api.predictor.encode

    def encode(rows: Any) -> Any:
        if "geheim" in rows[0]:
            raise {"geheim 1": ValueError, "geheim 2": MemoryError}[rows[0]]("row 0: not this one")
        return real(rows)

    api.predictor.encode = encode  # type: ignore[method-assign]
    secret = [{"rows": [f"geheim {number}"], "single": True} for number in (1, 2)]
    found = run(api, [*secret, good[0]])
    assert [status for status, *_ in found] == [422, 422, 200]
    assert "rows of this task (row 0: not this one)" in found[0][1]["error"]
    assert "a request cannot be tokenised: MemoryError at " in caplog.text
    assert "geheim" not in caplog.text


def test_a_failing_run_is_taken_apart(api: PredictAPI, caplog: pytest.LogCaptureFixture) -> None:
    texts = sentences(4)
    real, calls = api.predictor.answer, []

    def answer(items: Any) -> Any:
        calls.append(len(items))
        if any(item is poison for item in items):
            raise RuntimeError("geheim")
        return real(items)

    encoded = [api.decode_request({"rows": [text], "single": True}) for text in texts]
    poison = encoded[2].items[0]
    api.predictor.answer = answer  # type: ignore[method-assign]
    outcomes = api.predict([*encoded, Outcome(422, {"error": "…"})])
    assert [outcome.status for outcome in outcomes] == [200, 200, 500, 200, 422]
    assert calls == [4, 1, 1, 1, 1]
    assert "geheim" not in caplog.text
    assert "RuntimeError at " in caplog.text


def test_numbers_that_json_has_not(api: PredictAPI) -> None:
    response = api.encode_response(Outcome(200, {"score": float("nan")}, 1, 0.1))
    assert response.status_code == 500
    assert json.loads(response.body)["error"] == "model: expected finite numbers, got NaN or infinity"


def test_why_a_worker_cannot_start(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PredictAPI, "_settle", lambda self: None)
    options = {"provider": "cuda", "threads": 1, "batch_size": 8, "max_length": None}
    made = PredictAPI(str(out), task=TASKS["text-classification"], options=options, batch_timeout=0.0, limits=Limits())
    with pytest.raises(RuntimeError, match="provider='cuda'"):
        made.setup("cpu")
    assert made.failures.get().startswith("RuntimeError: provider='cuda'")


class Transport:
    """What a loop tells the server."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, item: Any, consumer_id: int) -> None:
        self.sent.append((consumer_id, *item))


def test_batches(api: PredictAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITSERVE_WORKER_ID", "0")
    api.request_timeout = 5.0
    loop, waiting, transport = JointRuns(), queue.Queue[Any](), Transport()
    loop._restart_workers = True

    def put(uid: str, rows: int, age: float = 0.0) -> None:
        waiting.put((7, uid, time.monotonic() - age, {"rows": ["a"] * rows, "single": False}))

    def batch() -> tuple[list[str], list[str]]:
        taken, late = loop.get_batch_requests(api, waiting, transport)
        return [uid for _, uid, _ in taken], [uid for _, uid in late]

    for uid, rows in (("a", 3), ("b", 4), ("c", 4), ("d", 1)):
        put(uid, rows)
    assert batch() == (["a", "b", "c"], [])  # closed by its rows: eight or more
    assert batch() == (["d"], [])  # closed by time
    put("old", 1, age=6.0)
    put("new", 1)
    assert batch() == (["new"], ["old"])
    assert [(line[0], line[1], line[2][1]) for line in transport.sent[:2]] == [(7, "a", "START"), (7, "b", "START")]
    api.batch_timeout = 0.0
    put("e", 1)
    put("f", 1)
    assert batch() == (["e", "f"], [])  # what is there already needs no waiting


def test_a_worker_ends_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def get(self, timeout: float) -> Any:
            raise EOFError

    with pytest.raises(SystemExit):
        JointRuns._next(Gone(), None)

    class Orphan:
        def get(self, timeout: float) -> Any:
            raise queue.Empty

    class Parent:
        pid = -1

    monkeypatch.setattr(module.multiprocessing, "parent_process", lambda: Parent)
    with pytest.raises(SystemExit):
        JointRuns._next(Orphan(), None)


def test_log_lines_hold_no_message_of_an_exception() -> None:
    try:
        raise ValueError("geheim")
    except ValueError as error:
        found = sys.exc_info()
        place = place_of(error)
    record = logging.LogRecord("a.b", logging.ERROR, __file__, 1, "two\nlines", None, found)
    line = OneLine().format(record)
    assert line.endswith(f"ERROR a.b: two lines ({place})")
    assert place.startswith("ValueError at ")


def test_server_says_what_it_is(out: Path) -> None:
    from starlette.testclient import TestClient

    server = create_server(out, workers=2, max_length=16, batch_size=4, limits=Limits(rows=3))
    middleware = next(entry for entry in server.app.user_middleware if "info" in entry.kwargs)
    info = TestClient(middleware.cls(server.app, **middleware.kwargs)).get("/info").json()
    assert info["task"] == "text-classification"
    assert info["labels"] == LABELS
    assert info["sha256"] == {"model.onnx": sha256(out / "model.onnx")}
    assert (info["max_length"], info["batch_size"], info["workers"], info["limits"]["rows"]) == (16, 4, 2, 3)
    assert info["threads"] == max(1, cores() // 2)
    assert {"onnxruntime", "tokenizers", "litserve", "python"} <= info["versions"].keys()


def test_bad_arguments(out: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"workers": 0}, "workers=0 must be 1 or more"),
        ({"threads": 0}, "threads=0 must be 1 or more"),
        ({"batch_size": -1}, "batch_size=-1 must be 1 or more"),
        ({"max_queue": 0}, "max_queue=0 must be 1 or more"),
        ({"max_length": 0}, "max_length=0 must be 1 or more"),
        ({"batch_timeout": -1.0}, "timeout=30.0 must be more than batch_timeout=-1.0"),
        ({"timeout": 0.001}, "timeout=0.001 must be more than batch_timeout=0.005"),
    ):
        with pytest.raises(ValueError, match=message):
            create_server(out, **options)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"head\.json does not exist: export one first"):
        create_server(tmp_path)
    for task in ("b", "a"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "head.json").touch()
    with pytest.raises(FileNotFoundError, match="it holds a folder for each task: give one of a, b"):
        create_server(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*head\.json does not exist"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="error: limits: rows=0 must be a whole number"):
        main([str(out), "--max-rows", "0"])
