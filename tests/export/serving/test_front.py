"""What stands before the model: pages and limits on the wire, with an application that answers in its stead."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from lightning_ft.export.serving.front import DRAIN, Front
from lightning_ft.export.serving.page import docs_page, openapi
from lightning_ft.export.serving.rows import TASKS, Limits, Task

INFO: dict[str, Any] = {
    "task": "text-classification",
    "labels": ["no", "<script>alert(1)</script>"],
    "max_length": 32,
    "max_queue": 2,
    "limits": {"body": 2000, "rows": 4, "characters": 50},
    "sha256": {"model.onnx": "0123456789abcdef"},
}
JSON = {"content-type": "application/json"}


class Model:
    """An application that answers with what it was asked, or as it is told to."""

    def __init__(self, status: int = 200, body: bytes | None = None) -> None:
        self.status, self.body = status, body
        self.gate: asyncio.Event | None = None
        self.asked: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/predict":
            message = await receive()
            self.asked.append(json.loads(message["body"]))
            assert int(dict(scope["headers"])[b"content-length"]) == len(message["body"])
        if self.gate is not None:
            await self.gate.wait()
        body = json.dumps(self.asked[-1:]).encode() if self.body is None else self.body
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"x-model", b"1")]})
        await send({"type": "http.response.body", "body": body})


def front(model: Any = None, **options: Any) -> Front:
    limits = Limits(**INFO["limits"])
    return Front(
        model or Model(), **{"info": INFO, "task": TASKS[INFO["task"]], "limits": limits, "max_queue": 2, **options}
    )


def test_rows_reach_the_model() -> None:
    model = Model()
    client = TestClient(front(model))
    answer = client.post("/predict", json={"text": "ćma"})
    assert answer.status_code == 200
    assert answer.headers["x-model"] == "1"
    assert client.post("/predict", json={"rows": ["a", "b"]}).status_code == 200
    assert model.asked == [{"rows": [{"text": "ćma"}], "single": True}, {"rows": ["a", "b"], "single": False}]
    assert client.get("/health").status_code == client.head("/health").status_code == 200


def test_refusals(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    client = TestClient(front(model))
    cases = (
        (client.post("/predict", content=b"{", headers=JSON), 422, "body"),
        (client.post("/predict", json={"rows": ["geheim", 3]}), 422, "rows[1]"),
        (client.post("/predict", json={"text": "geheim" * 900}), 413, "body"),
        (client.post("/predict", data={"text": "geheim"}), 415, "content-type"),
        (client.post("/predict", content=b'{"text": "a"}'), 415, "content-type"),
        (client.post("/predict", content=b"x", headers={**JSON, "content-encoding": "gzip"}), 415, "content-type"),
        (client.get("/predict"), 405, "method"),
        (client.post("/"), 405, "method"),
        (client.get("/geheim"), 404, "path"),
        (client.get("/docs"), 404, "path"),
        (client.get("/redoc"), 404, "path"),
    )
    for answer, status, field in cases:
        assert (answer.status_code, answer.json()["field"]) == (status, field)
        assert answer.headers["content-type"] == "application/json"
    assert [line.getMessage() for line in caplog.records] == [f"{status} {field}" for _, status, field in cases]
    assert "geheim" not in caplog.text
    assert client.get("/predict").headers["allow"] == "POST"
    assert model.asked == []


def test_a_body_is_counted_while_it_is_read() -> None:
    """Chunked, with no length announced, or a false one: what is over the limit is dropped, not kept."""
    drawn = 0

    def chunks() -> Iterator[bytes]:
        nonlocal drawn
        for _ in range(50):
            drawn += 1
            yield b"x" * 1000

    assert TestClient(front()).post("/predict", content=chunks(), headers=JSON).status_code == 413
    assert drawn == 50  # a client that sends on sees the answer
    for length in (b"10", b"nonsense", b"-5", b"\xb2"):
        status, received = asyncio.run(raw(front(), [b"x" * 1000] * 9, [(b"content-length", length)]))
        assert (status, received) == (413, 9)
    # Of an endless body no more is read than a client may need to see the answer.
    status, received = asyncio.run(raw(front(), [b"x" * (1 << 20)] * 40))
    assert (status, received) == (413, 1 + (DRAIN >> 20))
    # A length that is over the limit needs no reading, and what cannot be drained is not.
    for length in (str(DRAIN + 1).encode(), b"9" * 5000):
        status, received = asyncio.run(raw(front(), [b"x"] * 9, [(b"content-length", length)]))
        assert (status, received) == (413, 0)


async def raw(app: Front, chunks: list[bytes | None], headers: Any = ()) -> tuple[int | None, int]:
    """Send chunks, None for a client that stops sending; the status, and how many were taken."""
    taken, status = 0, None

    async def receive() -> Any:
        nonlocal taken
        if taken < len(chunks) and (chunk := chunks[taken]) is not None:
            taken += 1
            return {"type": "http.request", "body": chunk, "more_body": taken < len(chunks)}
        await asyncio.sleep(3600)
        raise AssertionError("nobody waits so long")

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    lines = [(b"content-type", b"application/json"), *headers]
    await app({"type": "http", "path": "/predict", "method": "POST", "headers": lines}, receive, send)
    return status, taken


def test_slow_and_broken_senders() -> None:
    app = front(read_timeout=0.05)
    assert asyncio.run(raw(app, [b'{"text"', None])) == (408, 1)

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(app(scope, gone, send))
    assert app.active == 0


def test_a_full_queue() -> None:
    async def run() -> None:
        model = Model()
        model.gate = asyncio.Event()
        app = front(model)
        body: list[bytes | None] = [b'{"text": "a"}']
        waiting = [asyncio.create_task(raw(app, body)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert app.active == 2
        assert (await raw(app, body)) == (503, 0)
        model.gate.set()
        assert [status for status, _ in await asyncio.gather(*waiting)] == [200, 200]
        assert (await raw(app, body))[0] == 200
        assert app.active == 0

    asyncio.run(run())
    full = TestClient(front(max_queue=0)).post("/predict", json={"text": "a"})
    assert (full.status_code, full.headers["retry-after"]) == (503, "1")
    assert full.json()["expected"].startswith("fewer than 0 requests at a time")


def test_failures_of_the_server_below() -> None:
    """What LitServe says of a lost worker or a late request is another try's matter; what we say of a bug is not."""
    for status in (500, 504):
        lost = TestClient(front(Model(status, b'{"detail": "Internal server error"}')))
        answer = lost.post("/predict", json={"text": "a"})
        assert (answer.status_code, answer.headers["retry-after"], answer.json()["field"]) == (503, "1", "queue")
    bug = TestClient(front(Model(500, b'{"error": "model: expected finite numbers"}')))
    assert bug.post("/predict", json={"text": "a"}).status_code == 500

    async def hang() -> None:
        model = Model()
        model.gate = asyncio.Event()
        assert (await raw(front(model, answer_timeout=0.05), [b'{"text": "a"}']))[0] == 503

    asyncio.run(hang())


class Page(HTMLParser):
    """Addresses, scripts and styles of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.names: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._tag = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        self.names += [value for name, value in attrs if tag == "textarea" and name == "name"]

    def handle_data(self, data: str) -> None:
        if self._tag in self.inside and data.strip():
            self.inside[self._tag].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def test_page_asks_no_other_host_and_runs_no_other_script() -> None:
    answer = TestClient(front()).get("/")
    page = Page(answer.text)
    assert set(page.addresses) == {"data:,", "info", "health", "openapi.json"}
    assert not re.search(r"url\(|@import|//[a-z]", answer.text.replace("http://HOST:PORT/", ""))
    policy = answer.headers["content-security-policy"]
    (script,), (style,) = page.inside["script"], page.inside["style"]
    for text in (script, style):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert "<script>alert" not in answer.text
    assert "&lt;script&gt;alert" in answer.text


def test_pages_of_every_task() -> None:
    for task in TASKS.values():
        info = {**INFO, "task": task.name, "labels": [], "max_length": None}
        assert set(task.needed) <= set(Page(docs_page(info, task)).names) <= set(task.fields)
        schema = openapi(info, task)["components"]["schemas"]["Row"]
        assert schema["examples"] == [task.example]
        assert set(schema["required"]) <= set(task.example) <= set(schema["properties"])
    assert 'data-kind="json"' in docs_page(INFO, Task("own-task"))
    assert "<b>" not in docs_page(INFO, Task("cloze", ("<b>",), (), ("<b>",), {"<b>": "<b>"}))


def test_openapi_is_true() -> None:
    """Every path and status that it names is there, and every reference leads somewhere."""
    client = TestClient(front())
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    for path, methods in document["paths"].items():
        for method in methods:
            assert client.request(method, path, json={"text": "a"} if method == "post" else None).status_code == 200
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
    assert document["paths"]["/predict"]["post"]["responses"].keys() == {"200", "408", "413", "415", "422", "503"}
    refusal = client.post("/predict", json={"text": 3}).json()
    assert refusal.keys() == document["components"]["schemas"]["Refusal"]["properties"].keys()
    assert client.get("/info").json() == INFO
    assert client.head("/info").text == ""
