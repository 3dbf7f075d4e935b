"""An exported folder behind HTTP, on LitServe: batching, limits, a page to try it, and a stop that loses no request."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_ft.export.extras import require
from lightning_ft.export.serving.api import PredictAPI, log_one_line_each
from lightning_ft.export.serving.front import Front
from lightning_ft.export.serving.rows import Limits, task_of

litserve = require("litserve", extra="serve")
utils = require("litserve.utils", extra="serve")

log = logging.getLogger(__name__)

LOST_AFTER = 6
"""Half seconds for which a request must be nowhere to be seen."""


def create_server(
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    threads: int | None = None,
    batch_size: int = 32,
    batch_timeout: float = 0.005,
    max_length: int | None = None,
    max_queue: int = 256,
    provider: str = "cpu",
    timeout: float = 30.0,
    limits: Limits | None = None,
) -> Any:
    """A LitServe server of an exported folder; :func:`serve` runs it.

    Endpoints: ``POST /predict`` (a row, or ``{"rows": […]}``; the answers are those of ``lightning-ft predict``),
    ``GET /health``, ``GET /info``, ``GET /`` (a page with a form), ``GET /openapi.json``. What cannot be answered is
    refused before it reaches the model: 408, 413, 415, 422, or 503 with ``Retry-After``.

    Where the variable ``LIT_SERVER_API_KEY`` is set, LitServe asks for it in the header ``X-API-Key``.

    Args:
        folder: What ``lightning-ft export`` wrote, of one task.
        workers: Processes, each with the model in memory.
        threads: Of one operator in one worker. None divides the cores that this process may use among the workers.
        batch_size: Rows that are run together.
        batch_timeout: Seconds that the first request of a batch waits for others.
        max_length: Tokens that are kept of a row; by default, and at most, as many as the model takes.
        max_queue: Requests that are read, waiting or run at one time. One more gets a 503.
        provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``. One that cannot run ends the start with an error.
        timeout: Seconds that a request may wait for its run.
        limits: What a request may hold: bytes, rows, characters.

    Returns:
        A ``litserve.LitServer``; its ``app`` is a FastAPI application, which answers once the workers run.

    Raises:
        FileNotFoundError: The folder is not an exported one.
        ImportError: LitServe is missing.
        ValueError: A number is out of range.

    Example::

        serve(create_server("served", workers=2), host="0.0.0.0", port=8000)
    """
    place, limits = Path(folder), limits or Limits()
    head, task = _head(place), task_of(place)
    _check(workers=workers, threads=threads, batch_size=batch_size, max_queue=max_queue, max_length=max_length)
    if batch_timeout < 0 or timeout <= batch_timeout:
        raise ValueError(f"timeout={timeout} must be more than batch_timeout={batch_timeout}, and that 0 or more")
    threads = threads or max(1, cores() // workers)
    options = {"provider": provider, "threads": threads, "batch_size": batch_size, "max_length": max_length}
    info = {
        "task": head["task"],
        "labels": head["labels"],
        **options,
        "max_length": max_length or head["max_length"],
        "workers": workers,
        "max_queue": max_queue,
        "limits": {"body": limits.body, "rows": limits.rows, "characters": limits.characters},
        "sha256": {file.name: _sha256(file) for file in sorted(place.glob("*.onnx*"))},
        "versions": _versions(),
    }
    api = PredictAPI(str(place), task=task, options=options, batch_timeout=batch_timeout, limits=limits)
    front = {"info": info, "task": task, "limits": limits, "max_queue": max_queue, "answer_timeout": timeout + 30}
    return litserve.LitServer(
        api,
        accelerator="cpu",  # what LitServe does with it is to count devices; the provider is ours
        devices=1,
        workers_per_device=workers,
        timeout=timeout,
        middlewares=[(Front, front)],
        disable_openapi_url=True,  # its pages load scripts from another host
        restart_workers=True,
    )


def serve(server: Any, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or Ctrl-C; then refuse new connections, answer what is in flight, and return.

    A worker that dies is replaced; its requests get a 503.

    Args:
        server: Of :func:`create_server`.
        host: Address to listen on; ``"0.0.0.0"`` or ``"::"`` for all.
        port: 0 takes a free one, which the log names.

    Raises:
        OSError: The address cannot be had.
        RuntimeError: The model cannot be loaded; the message has a worker's error.
    """
    uvicorn = require("uvicorn", extra="serve")
    log_one_line_each()
    (api,) = server.litapi_connector
    with _stop_signals() as started, utils.wrap_litserve_start(server):
        try:
            # Bound after the processes are there: a copy of it in one of them would keep taking connections.
            with _bound(host, port) as listener:
                _await_workers(server, api)
                # h11 bounds a request's headers.
                config = uvicorn.Config(
                    server.app, http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=30
                )
                listener.listen(2048)
                log.info("serving %s on http://%s:%d", api.folder, host, listener.getsockname()[1])
                started.append(True)
                asyncio.run(_run(uvicorn.Server(config), server, api, listener))
                log.info("stopped: no request is in flight")
        finally:
            api.stopping.set()


async def _run(uvicorn_server: Any, server: Any, api: PredictAPI, listener: socket.socket) -> None:
    watch = asyncio.create_task(_watch(server, api))
    try:
        await uvicorn_server.serve(sockets=[listener])
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def _watch(server: Any, api: PredictAPI) -> None:
    """Replace workers that died, and fail the requests they held."""
    queue, missing = server.litapi_request_queues[api.api_path], dict[str, int]()
    while True:
        await asyncio.sleep(0.5)
        for number, worker in enumerate(server.inference_workers):
            if not worker.is_alive():
                log.error("worker %d ended with exit code %s: another is started", number, worker.exitcode)
                _fail(waiting for waiting in server.response_buffer.values() if waiting.worker_id == number)
                server.inference_workers[number] = server.launch_single_inference_worker(api, number)
        # One that is neither queued nor with a worker was handed to a worker as that died.
        loose = {uid for uid, waiting in server.response_buffer.items() if waiting.worker_id is None}
        missing = {uid: missing.get(uid, 0) + 1 for uid in loose} if loose and queue.empty() else {}
        _fail(server.response_buffer[uid] for uid, times in missing.items() if times > LOST_AFTER)


def _fail(requests: Iterable[Any]) -> None:
    for waiting in list(requests):
        if not waiting.event.is_set():
            waiting.response = (None, utils.LitAPIStatus.ERROR)
            waiting.event.set()


def _await_workers(server: Any, api: PredictAPI) -> None:
    while not all(state == utils.WorkerSetupStatus.READY for state in dict(server.workers_setup_status).values()):
        dead = [worker.exitcode for worker in server.inference_workers if not worker.is_alive()]
        if not api.failures.empty():
            raise RuntimeError(f"{api.folder} cannot be served: {api.failures.get()}")
        if dead:
            raise RuntimeError(f"{api.folder} cannot be served: a worker ended with exit code {dead[0]} as it loaded")
        time.sleep(0.05)


@contextmanager
def _stop_signals() -> Iterator[list[bool]]:
    """SIGTERM and SIGINT end the loading; once the list holds something they are the HTTP server's.

    The HTTP server raises a signal again after it has stopped, which must not end the process before it is cleaned up.
    Processes forked from this one keep the handler, which lets them outlive a signal to the whole group.
    """
    main, started = os.getpid(), list[bool]()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() == main and not started:
            raise SystemExit(0)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(found[0], socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(found[4])
    except OSError as error:
        listener.close()
        raise OSError(f"port={port} on host={host!r} cannot be had: {error.strerror}: name another") from error
    return listener


def _head(folder: Path) -> dict[str, Any]:
    path = folder / "head.json"
    if not path.is_file():
        parts = sorted(part.parent.name for part in folder.glob("*/head.json"))
        remedy = f"it holds a folder for each task: give one of {', '.join(parts)}" if parts else "export one first"
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    head: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return head


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")


def cores() -> int:
    """Cores that this process may use: those it is bound to, or fewer where its container has a quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            return max(1, min(bound, int(quota) // int(period)))
    return bound


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("onnxruntime", "onnxruntime-gpu", "tokenizers", "litserve"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a folder, as ``python serve.py`` does."""
    parser = argparse.ArgumentParser(
        description="Serve an exported folder over HTTP.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here = Path(sys.argv[0]).resolve().parent
    parser.add_argument("folder", nargs="?", default=here, help="exported folder; where this file lies")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model in memory")
    parser.add_argument("--threads", type=int, help="of one worker; by default the cores are divided")
    parser.add_argument("--batch-size", type=int, default=32, help="rows that are run together")
    parser.add_argument("--batch-timeout", type=float, default=0.005, help="seconds a batch waits for more requests")
    parser.add_argument("--max-length", type=int, help="tokens that are kept of a row; all that the model takes")
    parser.add_argument("--max-queue", type=int, default=256, help="requests at a time; one more gets a 503")
    parser.add_argument("--max-body", type=int, default=Limits.body, help="bytes of a request")
    parser.add_argument("--max-rows", type=int, default=Limits.rows, help="rows of a request")
    parser.add_argument("--max-characters", type=int, default=Limits.characters, help="of a row")
    parser.add_argument("--provider", choices=("cpu", "cuda", "tensorrt"), default="cpu", help="what runs the graph")
    chosen = parser.parse_args(arguments)
    try:
        server = create_server(
            chosen.folder,
            workers=chosen.workers,
            threads=chosen.threads,
            batch_size=chosen.batch_size,
            batch_timeout=chosen.batch_timeout,
            max_length=chosen.max_length,
            max_queue=chosen.max_queue,
            provider=chosen.provider,
            limits=Limits(chosen.max_body, chosen.max_rows, chosen.max_characters),
        )
        serve(server, host=chosen.host, port=chosen.port)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
