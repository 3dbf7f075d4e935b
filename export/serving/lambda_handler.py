"""The model beside this file as an AWS Lambda function behind an API Gateway or a function URL.

Set ``lambda_handler.handler`` as the function's handler. It takes the events of REST APIs (payload 1.0), HTTP APIs and
function URLs (payload 2.0): a POST is answered as ``POST /predict`` of the server, with the same limits and statuses, a
GET with the task, its labels and the limits. The model is loaded once for each process.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lightning_ft.export.predictor import Predictor
from lightning_ft.export.serving.rows import Limits, RefusalError, describe, read_body, task_of

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
LIMITS = Limits()


@cache
def predictor() -> Predictor:
    """The model, loaded on first use."""
    return Predictor(FOLDER)


if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:
    predictor()  # while the process starts, when Lambda gives it a whole core and charges no request


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer an event.

    Args:
        event: Of an API Gateway.
        context: Of Lambda; not read.

    Returns:
        ``statusCode``, ``headers``, ``body`` and ``isBase64Encoded``, as API Gateways take them.
    """
    try:
        status, content = 200, _answer(event)
    except RefusalError as refusal:
        log.warning("%d %s", refusal.status, refusal.field)
        status, content = refusal.status, refusal.as_json()
    body = json.dumps(content, ensure_ascii=False)
    headers = {"content-type": "application/json", "x-content-type-options": "nosniff"}
    return {"statusCode": status, "headers": headers, "body": body, "isBase64Encoded": False}


def _answer(event: Any) -> Any:
    method, headers = _method(event), _headers(event)
    predict = predictor()
    if method in ("GET", "HEAD"):
        limits = {"body": LIMITS.body, "rows": LIMITS.rows, "characters": LIMITS.characters}
        return {"task": predict.task, "labels": predict.labels, "max_length": predict.max_length, "limits": limits}
    if method != "POST":
        raise RefusalError(405, "method", "GET or POST", "another")
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise RefusalError(415, "content-type", "application/json", "something else")
    asked = read_body(_body(event), task_of(FOLDER), LIMITS)
    try:
        items = predict.encode(asked.rows)
    except (TypeError, ValueError) as error:
        raise RefusalError(422, "rows", f"rows of this task ({error})", describe(asked.rows)) from None
    answers = predict.answer(items)
    return answers[0] if asked.single else {"rows": answers}


def _method(event: Any) -> str:
    if isinstance(event, Mapping):
        http = event.get("requestContext")
        http = http.get("http") if isinstance(http, Mapping) else None
        method = event.get("httpMethod") or (http.get("method") if isinstance(http, Mapping) else None)
        if isinstance(method, str):
            return method.upper()
    raise RefusalError(422, "event", "an event of an API Gateway, payload 1.0 or 2.0", describe(event))


def _headers(event: Mapping[str, Any]) -> dict[str, str]:
    given = event.get("headers")
    return {str(name).lower(): str(value) for name, value in given.items()} if isinstance(given, Mapping) else {}


def _body(event: Mapping[str, Any]) -> bytes:
    body = event.get("body")
    if not isinstance(body, str):
        raise RefusalError(422, "body", "JSON", describe(body))
    if not event.get("isBase64Encoded"):
        return body.encode(errors="surrogatepass")
    if len(body) > (LIMITS.body + 2) // 3 * 4:
        raise RefusalError(413, "body", f"{LIMITS.body} bytes at most", "more")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise RefusalError(422, "body", "base64, as isBase64Encoded says", "something else") from None
