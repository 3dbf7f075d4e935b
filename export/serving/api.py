"""What a worker process does: requests in, one joint run of the model, responses out; on LitServe."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from queue import Empty
from types import FrameType
from typing import Any, NamedTuple

from lightning_ft.export.extras import require
from lightning_ft.export.predictor import Predictor
from lightning_ft.export.serving.rows import Limits, RefusalError, Task, describe, read_rows

litserve = require("litserve", extra="serve")
simple_loops = require("litserve.loops.simple_loops", extra="serve")
utils = require("litserve.utils", extra="serve")

log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A request that can be answered.

    Args:
        items: Of ``Predictor.encode``, one for each row.
        single: Whether one row came by itself.
    """

    items: list[Any]
    single: bool


class Outcome(NamedTuple):
    """What goes back.

    Args:
        status: HTTP status.
        content: JSON-able body.
        requests: Requests that were answered in the same run; 0 where the model was not asked.
        seconds: That the run took.
    """

    status: int
    content: Any
    requests: int = 0
    seconds: float = 0.0


class PredictAPI(litserve.LitAPI):  # type: ignore[name-defined]
    """An exported folder, for ``litserve.LitServer``.

    A request that cannot be tokenised or run gets an error of its own; those that were batched with it are answered.

    Args:
        folder: What ``lightning-ft export`` wrote.
        task: What a row holds.
        options: Arguments of ``Predictor`` by name.
        batch_timeout: Seconds that the first request of a batch waits for others.
        limits: What a request may hold.
    """

    def __init__(
        self, folder: str, *, task: Task, options: dict[str, Any], batch_timeout: float, limits: Limits
    ) -> None:
        super().__init__(max_batch_size=options["batch_size"], batch_timeout=batch_timeout, loop=JointRuns())
        self.folder, self.task, self.options, self.limits = folder, task, options, limits
        context = multiprocessing.get_context("spawn")
        self.failures = context.SimpleQueue()
        self.stopping = context.Event()

    def setup(self, device: str) -> None:
        """Load the model and run it once; what goes wrong is told to the main process."""
        self._settle()
        try:
            self.predictor = Predictor(self.folder, **self.options)
            self.predictor.answer(self.predictor.encode([dict(self.task.example)]))
        except Exception as error:
            self.failures.put(f"{type(error).__name__}: {error}")
            raise

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads the annotations
        """Rows to items; a refusal is returned, since an exception would fail the whole batch."""
        try:
            rows = request["rows"] if isinstance(request, dict) and "single" in request else None
            asked = read_rows(request if rows is None else {"rows": rows}, self.task, self.limits)
            single = asked.single if rows is None else bool(request["single"])
            return Encoded(self._encode(asked.rows), single)
        except RefusalError as refusal:
            return Outcome(refusal.status, refusal.as_json())
        except Exception as error:  # noqa: BLE001  # whatever a tokenizer raises, it is this request's alone
            log.error("a request cannot be tokenised: %s", place_of(error))
            return Outcome(422, RefusalError(422, "rows", "texts that the tokenizer takes", "others").as_json())

    def predict(self, x: list[Any]) -> list[Outcome]:
        """Answer the requests of a batch together; each alone where that fails."""
        good = [request for request in x if isinstance(request, Encoded)]
        try:
            outcomes = iter(self._answer(good))
        except Exception as error:  # noqa: BLE001  # one of them: the others have done nothing
            log.error("a batch of %d failed, each is run alone: %s", len(good), place_of(error))
            outcomes = iter([self._alone(request) for request in good])
        return [request if isinstance(request, Outcome) else next(outcomes) for request in x]

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Leave requests as they are: the predictor puts rows of similar length together."""
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Leave outcomes as they are."""
        return output

    def encode_response(self, output: Outcome):  # type: ignore[no-untyped-def]  # LitServe reads the annotations
        """The response; ``Server-Timing`` says how long the run took and how many requests it answered."""
        from starlette.responses import Response

        try:
            body = json.dumps(output.content, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            log.error("the model gave NaN or infinity")
            output = Outcome(500, RefusalError(500, "model", "finite numbers", "NaN or infinity").as_json())
            body = json.dumps(output.content).encode()
        took = f'run;dur={output.seconds * 1e3:.2f};desc="{output.requests} requests"'
        headers = {"Server-Timing": took} if output.requests else {}
        return Response(body, output.status, headers, media_type="application/json")

    def _encode(self, rows: list[Any]) -> list[Any]:
        try:
            return list(self.predictor.encode(rows))
        except (TypeError, ValueError) as error:
            got = describe(rows[0]) if len(rows) == 1 else f"{len(rows)} rows"
            raise RefusalError(422, "rows", f"rows of this task ({error})", got) from None

    def _answer(self, requests: list[Encoded]) -> list[Outcome]:
        started = time.perf_counter()
        answers = iter(self.predictor.answer([item for request in requests for item in request.items]))
        seconds = time.perf_counter() - started
        outcomes = []
        for request in requests:
            found = [next(answers) for _ in request.items]
            content = found[0] if request.single else {"rows": found}
            outcomes.append(Outcome(200, content, len(requests), seconds))
        return outcomes

    def _alone(self, request: Encoded) -> Outcome:
        try:
            return self._answer([request])[0]
        except Exception as error:  # noqa: BLE001  # the worker lives on
            log.error("a request cannot be answered: %s", place_of(error))
            return Outcome(500, RefusalError(500, "model", "to run", "an error, which the log names").as_json())

    def _settle(self) -> None:
        """Settings of the worker's process.

        A stop that was sent to the whole process group must not end a worker while requests are in flight: the main
        process says when, and its own signal ends it.
        """
        log_one_line_each()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminated)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if self.stopping.is_set():
            raise SystemExit(0)


class JointRuns(simple_loops.BatchedLoop):  # type: ignore[name-defined]
    """Waits for a request, then for its companions; LitServe's own loop polls a thousand times a second when idle.

    A batch is closed when it holds ``max_batch_size`` rows, or ``batch_timeout`` after its first request.
    """

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """Requests to be answered together, and those that have waited too long."""
        taken: list[Any] = []
        late: list[Any] = []
        rows, closes = 0, 0.0
        while rows < lit_api.max_batch_size:
            request = self._next(request_queue, closes - time.monotonic() if taken or late else None)
            if request is None:
                break
            if not (taken or late):
                closes = time.monotonic() + lit_api.batch_timeout
            consumer, uid, sent, body = request
            status, kind = utils.LitAPIStatus.START, utils.LoopResponseType.REGULAR
            self.put_response(transport, consumer, uid, (), status, kind)
            if lit_api.request_timeout not in (-1, False) and time.monotonic() - sent > lit_api.request_timeout:
                late.append((consumer, uid))
            else:
                taken.append((consumer, uid, body))
                rows += len(body.get("rows", ())) or 1 if isinstance(body, dict) else 1
        return taken, late

    @staticmethod
    def _next(queue: Any, patience: float | None) -> Any:
        """The next request; None where none came in time. Without ``patience``, as long as the server lives."""
        parent = multiprocessing.parent_process()
        while True:
            try:
                if patience is not None and patience <= 0:
                    return queue.get_nowait()
                return queue.get(timeout=1.0 if patience is None else patience)
            except Empty:
                if patience is not None:
                    return None
            except (EOFError, OSError):
                sys.exit(0)  # the server is gone, and the queue with it
            if parent is not None and os.getppid() != parent.pid:
                sys.exit(0)  # it was killed


def place_of(error: BaseException) -> str:
    """An error's type and place: its message may hold what a user sent.

    Example:
        >>> try:
        ...     int("secret")
        ... except ValueError as error:
        ...     print(place_of(error).split(" ")[0])
        ValueError
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return type(error).__name__ + place


class OneLine(logging.Formatter):
    """A line for each record: of an exception its type and place."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {record.getMessage()}"
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            line += f" ({place_of(record.exc_info[1])})"
        return " ".join(line.split())


def log_one_line_each() -> None:
    """Send the logs of this process to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("litserve", "uvicorn", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
