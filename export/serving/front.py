"""What stands before a model on the wire: limits, refusals and the few pages; an ASGI middleware."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from lightning_ft.export.serving.page import PAGE_HEADERS, docs_page, openapi
from lightning_ft.export.serving.rows import Limits, RefusalError, Task, read_body

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

DRAIN = 16 << 20
"""Bytes of a refused body that are read and dropped: a client that still sends would not see the refusal."""


class Front:
    """Lets through what the model can answer, and answers everything else.

    A request is taken in only while fewer than ``max_queue`` are, so that memory is bounded by their bodies. Its body
    is counted while it is read, parsed once here, and passed on as ``{"rows": […], "single": …}``.

    Args:
        app: The ASGI application with ``POST /predict`` and ``GET /health``.
        info: What ``GET /info`` shows.
        task: What a row holds.
        limits: What a request may hold.
        max_queue: Requests that are read, waiting or run at one time. One more gets a 503.
        read_timeout: Seconds within which a body must have come.
        answer_timeout: Seconds within which the model must have answered.
    """

    def __init__(
        self,
        app: Application,
        *,
        info: Mapping[str, Any],
        task: Task,
        limits: Limits,
        max_queue: int,
        read_timeout: float = 10.0,
        answer_timeout: float = 60.0,
    ) -> None:
        self.app, self.limits, self.task = app, limits, task
        self.max_queue, self.read_timeout, self.answer_timeout = max_queue, read_timeout, answer_timeout
        self.active = 0
        as_json = {"content-type": "application/json"}
        self._pages = {
            "/": (docs_page(info, task).encode(), PAGE_HEADERS),
            "/info": (_dump(info), as_json),
            "/openapi.json": (_dump(openapi(info, task)), as_json),
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] != "http":  # the start and stop of the application
            await self.app(scope, receive, send)
            return
        try:
            await self._route(scope, receive, send)
        except RefusalError as refusal:
            log.warning("%d %s", refusal.status, refusal.field)
            await respond(send, refusal.status, _dump(refusal.as_json()), _extra_headers(refusal))

    async def _route(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        allowed = "POST" if path == "/predict" else "GET, HEAD"
        if path not in (*self._pages, "/health", "/predict"):
            raise RefusalError(404, "path", f"one of {', '.join(self._pages)}, /health, /predict", "another")
        if method not in allowed.split(", "):
            raise RefusalError(405, "method", allowed, "another")
        if path in self._pages:
            body, headers = self._pages[path]
            await respond(send, 200, body if method == "GET" else b"", headers)
        elif path == "/predict":
            await self._predict(scope, receive, send)
        else:
            await self.app({**scope, "method": "GET"}, receive, send)

    async def _predict(self, scope: Message, receive: Receive, send: Send) -> None:
        if self.active >= self.max_queue:
            raise RefusalError(
                503, "queue", f"fewer than {self.max_queue} requests at a time; try again", f"{self.active}"
            )
        self.active += 1
        try:
            body = await self._read(_headers(scope), receive)
            if body is None:
                return  # the client has gone
            asked = read_body(body, self.task, self.limits)
            await self._pass_on(scope, _dump({"rows": asked.rows, "single": asked.single}), receive, send)
        finally:
            self.active -= 1

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        coding = headers.get("content-encoding", "identity").strip().lower()
        announced = _length(headers)
        refusal = None
        if kind != "application/json" or coding != "identity":
            refusal = RefusalError(415, "content-type", "application/json, not compressed", "something else")
        elif announced > self.limits.body:
            refusal = RefusalError(413, "body", f"{self.limits.body} bytes at most", f"{announced}")
        try:
            if refusal is None:
                return await asyncio.wait_for(self._collect(receive), self.read_timeout)
            if announced <= DRAIN:
                await asyncio.wait_for(_drain(receive), self.read_timeout)
            raise refusal
        except asyncio.TimeoutError:
            raise RefusalError(408, "body", f"all of it within {self.read_timeout:g} seconds", "less") from None

    async def _collect(self, receive: Receive) -> bytes | None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > self.limits.body:
                body.clear()
                if message.get("more_body", False):
                    await _drain(receive)
                raise RefusalError(413, "body", f"{self.limits.body} bytes at most", "more")
            if not message.get("more_body", False):
                return bytes(body)

    async def _pass_on(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """Run the application on a body that was read, and turn its own failures into ours."""
        replayed = False
        start: Message = {}
        parts: list[bytes] = []

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-length",)]
        headers.append((b"content-length", str(len(body)).encode()))
        try:
            await asyncio.wait_for(self.app({**scope, "headers": headers}, replay, keep), self.answer_timeout)
        except asyncio.TimeoutError:
            start["status"] = 504
        # LitServe says 504 where a request waited too long, and 500 where its worker was lost; ours say "error".
        if start["status"] >= 500 and b'"error"' not in b"".join(parts):
            raise RefusalError(503, "queue", "an answer in time; try again", "none")
        await send(start)
        await send({"type": "http.response.body", "body": b"".join(parts)})


async def respond(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """Send a whole response."""
    lines = {"content-length": str(len(body)), "x-content-type-options": "nosniff", **headers}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _extra_headers(refusal: RefusalError) -> dict[str, str]:
    headers = {"content-type": "application/json"}
    if refusal.status == 503:
        headers["retry-after"] = "1"
    if refusal.status == 405:
        headers["allow"] = refusal.expected
    if refusal.status in (408, 413, 415):
        headers["connection"] = "close"  # what is left of the body is not read
    return headers


async def _drain(receive: Receive) -> None:
    """Drop the rest of a body, up to a bound."""
    dropped = 0
    while dropped < DRAIN:
        message = await receive()
        dropped += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return


def _headers(scope: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _length(headers: Mapping[str, str]) -> int:
    """Bytes that a body is said to have; 0 where nothing, or nonsense, is said."""
    text = headers.get("content-length", "")
    return int(text[:20]) if text.isdecimal() else 0


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
