"""Start Triton on the model repository that this file lies in, and stop it without losing a request.

``python3 serve.py``, with further options of tritonserver if wanted. Once it is told to stop, Triton refuses what one
model asks of another, so that texts which wait at that moment would be answered by an error. So on SIGTERM or SIGINT it
goes on for two seconds, for what is on its way; then the models that take texts are unloaded, which ends when they have
answered all that they had accepted; then the server is stopped. A second signal stops it at once. Loading and unloading
by others is barred with a key.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = "lightning-ft-key"
GRACE = 2  # seconds that it goes on before it accepts nothing more
PATIENCE = 60  # seconds that what was accepted may take


class Repository:
    """The server's interface for loading and unloading models.

    Args:
        url: Of the HTTP service.
        key: What it was told to ask for.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.key = key

    def ask(self, path: str) -> Any:
        """What the server answers."""
        headers = {HEADER: self.key}
        request = urllib.request.Request(f"{self.url}/v2/repository/{path}", b"{}", headers, method="POST")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read() or b"null")

    def drain(self, models: Sequence[str]) -> None:
        """Unload models, and wait until they have answered what they had accepted."""
        for name in models:
            self.ask(f"models/{name}/unload")
        begun = time.monotonic()
        while time.monotonic() - begun < PATIENCE:
            states = {row["name"]: row.get("state") for row in self.ask("index")}
            if not {states.get(name) for name in models} & {"READY", "UNLOADING"}:
                return
            time.sleep(0.1)


def main(options: Sequence[str] | None = None) -> int:
    """Run the server until it ends.

    Args:
        options: Further ones of tritonserver; by default those of the command line.

    Returns:
        Its exit status.
    """
    options = sys.argv[1:] if options is None else options
    place, key = Path(__file__).resolve().parent, secrets.token_hex(16)
    port = next((option.partition("=")[2] for option in options if option.startswith("--http-port=")), "8000")
    command = ["tritonserver", f"--model-repository={place}", "--model-control-mode=explicit", "--load-model=*"]
    command += [
        f"--{name}=model-repository:{HEADER}={key}" for name in ("http-restricted-api", "grpc-restricted-protocol")
    ]
    told = threading.Semaphore(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.release())
    # In a session of its own, since Ctrl-C would reach it, too.
    server = subprocess.Popen([*command, *options], start_new_session=True)
    while not told.acquire(timeout=0.2):
        if server.poll() is not None:
            return server.returncode
    texts = [path.parents[1].name for path in place.glob("*/*/model.py")]
    drain = threading.Thread(target=_drain, args=(Repository(f"http://127.0.0.1:{port}", key), texts), daemon=True)
    drain.start()
    while drain.is_alive() and not told.acquire(timeout=0.2):
        pass
    server.terminate()
    return server.wait()


def _drain(repository: Repository, models: Sequence[str]) -> None:
    time.sleep(GRACE)
    try:
        repository.drain(models)
    except (OSError, ValueError) as error:  # it is not up yet, or is gone
        print(f"stopping at once: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
