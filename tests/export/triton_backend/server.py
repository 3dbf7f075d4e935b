"""A real tritonserver as a process, on repositories as they are shipped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
VENV = ROOT / ".venv-triton"
PYTHON = VENV / "bin" / "python"


def packages() -> Path:
    """Of the environment with the server; a failure where there is none."""
    if not PYTHON.is_file() or not (found := list(VENV.glob("lib/python3*/site-packages/pytriton"))):
        pytest.fail(f"{VENV} with its tritonserver does not exist: run `make test-triton`, which makes it")
    return found[0].parent


def client(*arguments: str, text: str = "") -> Any:
    """What the client in that environment prints."""
    packages()
    command = [str(PYTHON), str(HERE / "client.py"), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


class Server:
    """Started by `with`, ready, and stopped at its end.

    Args:
        folder: For its backends and its log.
        repositories: What it loads; started by the first one's `serve.py`.
    """

    def __init__(self, folder: Path, repositories: Sequence[Path]) -> None:
        self.folder = folder
        self.repositories = repositories
        self.log = folder / "log"
        self.http, self.grpc = _free_port(), _free_port()

    def __enter__(self) -> Server:
        site = packages()
        triton = site / "pytriton" / "tritonserver"
        self._make_backends(triton)
        options = [f"--model-repository={path}" for path in self.repositories[1:]]
        options += [f"--backend-directory={self.folder / 'backends'}", "--exit-timeout-secs=30"]
        options += [f"--http-port={self.http}", f"--grpc-port={self.grpc}", "--allow-metrics=false"]
        # Without a GPU: the wheel's libraries, and the Python of the environment for the backend's processes.
        environment = _environment()
        environment["PATH"] = f"{PYTHON.parent}:{triton / 'bin'}:{environment['PATH']}"
        environment["LD_LIBRARY_PATH"] = str(site / "nvidia_pytriton.libs")
        with self.log.open("w") as log:
            command = [str(PYTHON), str(self.repositories[0] / "serve.py"), *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    def _make_backends(self, triton: Path) -> None:
        """Copies: the server follows no links out of the folder."""
        python = self.folder / "backends" / "python"
        shutil.copytree(triton / "backends" / "python", python, ignore=shutil.ignore_patterns("__pycache__"))
        version = packages().parent.name.removeprefix("python")
        shutil.copy(triton / "python_backend_stubs" / version / "triton_python_backend_stub", python)
        (self.folder / "backends" / "onnxruntime").mkdir()
        shutil.copy(HERE / "ort_backend.py", self.folder / "backends" / "onnxruntime" / "model.py")

    def _wait(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                break
            if self.get("health/ready")[0] == 200:
                return
            time.sleep(0.2)
        self.process.kill()
        pytest.fail(f"the server did not get ready:\n{self.log.read_text()[-8000:]}")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of an answer; the status 0 where nobody answers."""
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.http}/v2/{path}"))

    def post(self, model: str, body: bytes) -> tuple[int, str]:
        """Ask a model with a body of one's own."""
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.http}/v2/models/{model}/infer", body))

    @staticmethod
    def _open(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except urllib.error.URLError:
            return 0, ""

    def statistics(self, model: str) -> Mapping[str, Any]:
        """Of a model, since it was loaded."""
        status, text = self.get(f"models/{model}/stats")
        assert status == 200
        found: Mapping[str, Any] = json.loads(text)["model_stats"][0]
        return found

    def ask(
        self, protocol: str, model: str, requests: Sequence[Mapping[str, Sequence[str | bytes]]], *outputs: str
    ) -> list[dict[str, Any]]:
        """Send all requests at once; the answers, in order."""
        columns = [{name: list(map(_hex, texts)) for name, texts in request.items()} for request in requests]
        asked = {"model": model, "requests": columns, "outputs": outputs or ("answer",)}
        port = {"http": self.http, "grpc": self.grpc}[protocol]
        answers: list[dict[str, Any]] = client("ask", protocol, f"127.0.0.1:{port}", text=json.dumps(asked))
        return answers


def _hex(text: str | bytes) -> str:
    return (text.encode() if isinstance(text, str) else text).hex()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
