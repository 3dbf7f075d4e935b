"""The server as it runs in a container: a process of its own, without torch, attacked over real sockets."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ft.export.serving.deploy import write_deployment
from tests.export.serving.exported import as_checkpoint, assert_same, classifier, forbid
from tests.export.test_gate import sentences

pytestmark = pytest.mark.server
JSON = {"Content-Type": "application/json"}


class Server:
    """A running server.

    Args:
        process: Its main process.
        port: Where it listens.
        log: File with its log.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def ask(self, body: Any, patience: float = 60.0) -> tuple[int, Any, dict[str, str]]:
        """Post JSON: status, parsed answer, headers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=patience)
        try:
            connection.request("POST", "/predict", json.dumps(body), JSON)
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(answer.read()), headers
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def half(self, text: str) -> tuple[socket.socket, bytes]:
        """A request whose body has come in part: the connection, and what is still to be sent."""
        body = json.dumps({"text": text}).encode()
        lines = ("POST /predict HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
        head = "\r\n".join((*lines, "", ""))
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(head.encode() + body[:5])
        return connection, body[5:]

    def children(self) -> dict[int, str]:
        """Command lines of its processes."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {int(pid): Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in listed}

    def workers(self) -> list[int]:
        return [pid for pid, line in self.children().items() if "spawn_main" in line]

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self.process.pid, *self.children())]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: int = signal.SIGTERM, group: bool = False) -> int:
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    found = classifier(tmp_path_factory.mktemp("server"))
    write_deployment(found)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a world where importing torch or this package is an error."""
    place = forbid(tmp_path_factory.mktemp("forbid") / "path", ("torch", "lightning_ft", "transformers", "lightning"))
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[Server]:
    """A server of its own process group, ready; killed at the end if it still runs."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stderr=file, stdout=file, start_new_session=True)
    try:
        yield Server(process, _port(process, log), log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if found := re.search(r"serving .* on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(found[1])
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def run(out: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts a server of the folder, with arguments."""

    def start(*arguments: str, **variables: str) -> Any:
        log = tmp_path_factory.mktemp("log") / "log.txt"
        command = [sys.executable, str(out / "serve.py"), "--port", "0", "--threads", "1", *arguments]
        return started(command, {**environment, **variables}, log)

    return start


@pytest.fixture(scope="module")
def server(run: Callable[..., Any]) -> Iterator[Server]:
    with run("--workers", "2") as found:
        yield found


def test_answers_are_the_checkpoints(server: Server, out: Path) -> None:
    texts = [*sentences(20), "café naïve 東京 !", "x " * 400]
    wanted = as_checkpoint(out, texts)
    answers = [server.ask({"text": text}) for text in texts]
    assert {status for status, *_ in answers} == {200}
    assert_same([body for _, body, _ in answers], wanted)
    status, together, _ = server.ask({"rows": texts})
    assert status == 200
    assert_same(together["rows"], wanted)
    assert len({body["label"] for _, body, _ in answers}) > 1


def test_pages(server: Server) -> None:
    assert server.get("/health") == (200, b"ok")
    status, info = server.get("/info")
    assert (status, json.loads(info)["workers"]) == (200, 2)
    assert b"<form" in server.get("/")[1]
    assert json.loads(server.get("/openapi.json")[1])["paths"].keys() == {"/predict", "/health", "/info", "/"}
    assert server.get("/docs")[0] == server.get("/redoc")[0] == 404
    assert len(server.workers()) == 2


def test_health_check_of_the_image(run: Callable[..., Any], out: Path, environment: dict[str, str]) -> None:
    """Also where LitServe asks for a key."""
    text = re.sub(r"\\\n", "", (out / "Dockerfile").read_text())
    (check,) = re.findall(r"HEALTHCHECK .*? CMD (\[.*\])", text)
    key = {"LIT_SERVER_API_KEY": "abc"}
    with run(**key) as server:
        command = [sys.executable, *json.loads(check.replace(":8000/", f":{server.port}/"))[1:]]
        assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=False).returncode == 1
        assert subprocess.run(command, env={**environment, **key}, check=False).returncode == 0


def test_200_at_once(server: Server, out: Path) -> None:
    """Of different lengths: each gets its own answer, from fewer runs than requests."""
    generator = random.Random(0)
    words = " ".join(sentences(50)).split()
    texts = [" ".join(generator.choices(words, k=generator.randrange(1, 100))) for _ in range(200)]
    barrier = threading.Barrier(200)

    def ask(text: str) -> Any:
        barrier.wait()
        return server.ask({"text": text})

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, texts))
    assert Counter(status for status, *_ in answers) == {200: 200}
    assert_same([body for _, body, _ in answers], as_checkpoint(out, texts))
    sizes = [int(re.findall(r'desc="(\d+) requests"', headers["server-timing"])[0]) for *_, headers in answers]
    runs = sum(1 / size for size in sizes)
    assert runs < 100
    assert max(sizes) > 4


# ---- what no one should send


def bodies(generator: random.Random) -> bytes:
    """A body that is no request; ``geheim`` marks a user's text."""
    secret = "geheim " * generator.randrange(1, 20)
    odd: list[Any] = [None, 3, -1.5, True, "", "  ", [], {}, [[secret]], {"a": secret}, 10**400]
    value = generator.choice(odd)
    good = json.dumps({"text": secret}).encode()
    made: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: json.dumps(value if not isinstance(value, str) else {"text": value}).encode(),
        lambda: json.dumps({"text": value}).encode(),
        lambda: json.dumps({"text": secret, "text_pair": value if value is not None else 3}).encode(),
        lambda: json.dumps({"rows": value}).encode(),
        lambda: json.dumps({"rows": [secret, value]}).encode(),
        lambda: json.dumps({"rows": [secret] * 100_000}).encode(),
        lambda: json.dumps({"rows": ["a"] * generator.randrange(129, 500)}).encode(),
        lambda: json.dumps({"text": secret, secret: secret}).encode(),
        lambda: json.dumps({"text": "x" * generator.randrange(20_001, 100_000)}).encode(),
        lambda: b'{"text": %s}' % generator.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"'a'"]),
        lambda: b"[" * generator.randrange(1000, 500_000),
        lambda: b'{"text":' * generator.randrange(1000, 100_000),
        lambda: b'{"text": "\xff\xfe%s"}' % secret.encode(),
        lambda: good.decode().encode("utf-16"),
        lambda: b'{"text": "a\\ud83d"}',
        lambda: b'{"text": "\\udc00 a"}',
        lambda: b"1" * 5000,
        lambda: good[: generator.randrange(len(good))],
        lambda: generator.randbytes(generator.randrange(1, 5000)),
        lambda: b"\x00" * generator.randrange(1, 100),
        lambda: b"x" * generator.randrange((1 << 20) + 1, 3 << 20),
        lambda: b"--x\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\ngeheim\r\n--x--",
    ]
    return generator.choice(made)()


def malformed(generator: random.Random) -> tuple[bytes, bool]:
    """Bytes of a request, and whether the connection is cut after them."""
    body = bodies(generator)
    kind = generator.choices(
        ["application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""],
        [12, 1, 1, 1, 1],
    )[0]
    lines = [f"Content-Type: {kind}"] if kind else []
    way = generator.choices(["length", "chunked", "short", "long", "lie", "bad"], [10, 5, 1, 1, 1, 1])[0]
    sent, cut = body, False
    if way == "chunked":
        step = generator.randrange(1, 70_000)
        chunks = [body[i : i + step] for i in range(0, len(body), step)][:2000]
        sent = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        lines.append("Transfer-Encoding: chunked")
    elif way == "bad":
        lines.append(
            generator.choice(["Content-Length: -1", "Content-Length: many", "Transfer-Encoding: gzip, chunked"])
        )
    else:
        length = {"length": len(body), "short": len(body) // 2, "long": len(body) + 9, "lie": 10**12}[way]
        lines.append(f"Content-Length: {length}")
        cut = way == "long"  # else the server waits for the rest
    if generator.random() < 0.03:
        lines.append("Content-Encoding: gzip")
    if generator.random() < 0.03:
        lines.append("X-Long: " + "y" * 100_000)
    path, method = generator.choices([("/predict", "POST"), ("/geheim", "POST"), ("/predict", "PUT")], [20, 1, 1])[0]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""])
    if generator.random() < 0.02:
        return generator.randbytes(200), True
    return head.encode() + sent, cut


def send(port: int, request: bytes, cut: bool) -> int | None:
    """The status; None where the server closed the connection without one, as it may if it was cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(request)
            if cut:
                connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        except ConnectionError:
            return None
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else None


def test_1000_malformed_requests(server: Server, out: Path) -> None:
    generator = random.Random(0)
    texts = sentences(11)
    wanted = as_checkpoint(out, texts)
    before, statuses, memory = set(server.workers()), Counter[int | None](), []
    for group in range(10):
        requests = [malformed(generator) for _ in range(100)]
        with ThreadPoolExecutor(8) as pool:
            statuses.update(pool.map(lambda request: send(server.port, *request), requests))
        status, body, _ = server.ask({"text": texts[group]})
        assert status == 200
        assert_same([body], [wanted[group]])
        memory.append(server.memory())
    assert sum(statuses.values()) == 1000
    assert set(statuses) <= {None, 400, 404, 405, 413, 415, 422, 503}, statuses
    assert min(statuses[code] for code in (404, 405, 413, 415, 422)) > 5, statuses
    assert statuses[422] > 400
    assert statuses[503] < 100, statuses
    assert statuses[None] < 150, statuses
    assert set(server.workers()) == before  # none died and was replaced
    assert memory[-1] - memory[2] < 30 << 20, memory
    log = server.log.read_text(errors="replace")
    assert "geheim" not in log
    assert "Traceback" not in log
    assert all(re.match(r"\d{4}-\d\d-\d\d \S+ (INFO|WARNING|ERROR) ", line) for line in log.splitlines())


# ---- limits in time


def test_a_full_queue(run: Callable[..., Any]) -> None:
    with run("--max-queue", "3") as server:
        waiting = [server.half("a film") for _ in range(3)]
        end = time.monotonic() + 5
        while (found := server.ask({"text": "a film"}))[0] != 503:
            assert time.monotonic() < end  # until all three are seen
        assert found[2]["retry-after"] == "1"
        assert found[1]["expected"].startswith("fewer than 3 requests at a time")
        assert server.get("/health")[0] == 200
        for connection, rest in waiting:
            with connection:
                connection.sendall(rest)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert server.ask({"text": "a film"})[0] == 200


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_a_stop_loses_no_request(group: bool, run: Callable[..., Any]) -> None:
    """A signal to the process, as Docker sends it, or to all of its group, as a terminal or systemd does."""
    with run("--workers", "2") as server:
        children = server.children()
        waiting = [server.half(text) for text in sentences(12)]
        server.ask({"text": "they have come by now"})
        stopped = ThreadPoolExecutor(1).submit(server.stop, group=group)
        end = time.monotonic() + 10
        while True:  # new ones are refused as soon as the signal is seen
            try:
                socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
            except ConnectionRefusedError:
                break
            assert time.monotonic() < end
            time.sleep(0.02)
        assert not stopped.done()
        for connection, rest in waiting:
            with connection:
                connection.sendall(rest)
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert stopped.result() == 0
        assert "stopped: no request is in flight" in server.log.read_text()
        end = time.monotonic() + 10
        while any(alive(pid) for pid in children):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_dead_worker_is_replaced(run: Callable[..., Any]) -> None:
    with run() as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(server.ask, {"text": "a film"}, patience=40.0)  # the last resort comes after 60
            time.sleep(0.5)
            os.kill(worker, signal.SIGKILL)
            end = time.monotonic() + 60
            while server.workers() in ([worker], []) or server.get("/health")[0] != 200:
                assert time.monotonic() < end
                time.sleep(0.1)
            # Taken by the dead worker or not, it is answered.
            assert lost.result()[0] in (200, 503)
        assert server.ask({"text": "a film"})[0] == 200
        assert "worker 0 ended with exit code -9: another is started" in server.log.read_text()
        assert server.stop(signal.SIGINT) == 0


def test_what_cannot_be_served(out: Path, environment: dict[str, str], tmp_path: Path) -> None:
    def fails(*arguments: str) -> str:
        command = [sys.executable, str(out / "serve.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1, done.stderr
        return done.stderr

    assert "cannot be served: RuntimeError: provider='cuda': this onnxruntime has " in fails("--provider", "cuda")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"port={port} on host='127.0.0.1' cannot be had" in fails("--port", port)
    assert "head.json does not exist: export one first" in fails(str(tmp_path))


def test_launched_from_the_package(out: Path, tmp_path: Path) -> None:
    """As the command line does: the package's own code, in a process without torch."""
    code = "import sys; from lightning_ft.export.serving.deploy import launch; sys.exit(launch(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(out), "--port", "0", "--threads", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    assert tempfile.gettempdir() != str(tmp_path)
    with started(command, environment, tmp_path / "log.txt") as server:
        assert list(tmp_path.glob("lightning_ft_serve_*"))
        assert server.ask({"text": "a film"})[0] == 200
        assert server.stop() == 0
    assert not list(tmp_path.glob("lightning_ft_serve_*"))
