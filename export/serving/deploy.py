"""What runs an exported folder elsewhere, written into it: containers, AWS Lambda, Hugging Face endpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_ft.core.files import atomic_file, sha256
from lightning_ft.core.report import Report
from lightning_ft.export.bundle import bundle

MODULES = ("rows", "page", "front", "api", "server")
RUNTIME = ("numpy", "onnxruntime", "tokenizers")
START = '''"""Serve the model beside this file: python serve.py --help."""

from serving.server import main

if __name__ == "__main__":  # worker processes import this file, too
    main()
'''
USER = 10001

# LitServe asks for the key even here, where one is set.
HEALTHCHECK = """\
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \\
    CMD ["python", "-c", "import os; from urllib.request import Request, urlopen; \\
    key = {{'X-API-Key': os.getenv('LIT_SERVER_API_KEY', '')}}; \\
    urlopen(Request('http://127.0.0.1:8000/health', None, key), None, 4)"]"""

DOCKERFILE = f"""\
# docker build -t model . && docker run --rm -p 8000:8000 --read-only --tmpfs /tmp model
FROM {{image}} AS packages
COPY requirements-serve.txt /tmp/
RUN python -m venv /packages \\
    && /packages/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps -r /tmp/requirements-serve.txt

FROM {{image}}
COPY --from=packages /packages /packages
WORKDIR /model
COPY . .
ENV PATH=/packages/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER {USER}:{USER}
EXPOSE 8000
{HEALTHCHECK}
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
"""

DOCKERFILE_GPU = f"""\
# docker build -t model -f Dockerfile.gpu . && docker run --rm --gpus 1 -p 8000:8000 --read-only --tmpfs /tmp model
# The image's CUDA must be the one that onnxruntime-gpu was built for, and it must hold cuDNN 9.
FROM {{image}}
# The distribution's Python, at whatever fix it has: no older one is kept in its archive.
# hadolint ignore=DL3008
RUN apt-get update \\
    && apt-get install --no-install-recommends -y python3 python3-venv \\
    && rm -rf /var/lib/apt/lists/*
COPY requirements-serve-gpu.txt /tmp/
RUN python3 -m venv /packages \\
    && /packages/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps -r /tmp/requirements-serve-gpu.txt
WORKDIR /model
COPY . .
ENV PATH=/packages/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER {USER}:{USER}
EXPOSE 8000
{HEALTHCHECK}
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0", "--provider", "cuda"]
"""

DOCKERIGNORE = """\
# Nothing goes into an image but what serves the model.
*
!*.onnx
!*.onnx.data
!*.json
!predictor.py
!serve.py
!serving
!requirements-serve.txt
!requirements-serve-gpu.txt
**/__pycache__
"""


def write_deployment(
    folder: str | os.PathLike[str],
    *,
    python_image: str | None = None,
    cuda_image: str = "nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04",
) -> Report:
    """Write beside an exported model what runs it in a container, on AWS Lambda and as a Hugging Face endpoint.

    - ``serve.py`` and ``serving/``: the server: LitServe, ONNX Runtime, tokenizers and numpy, but no torch;
    - ``Dockerfile``, ``Dockerfile.gpu``, ``.dockerignore`` for an image that a user without rights runs;
    - ``requirements-serve.txt`` and ``requirements-serve-gpu.txt``: every package at the version installed here;
    - ``lambda_handler.py``, ``handler.py`` and ``requirements.txt``, which need no server.

    Files of these names are replaced; no other is touched.

    Args:
        folder: What ``lightning-ft export`` wrote, of one task, with its ``predictor.py``.
        python_image: Base of the CPU image; by default Debian's slim one of this Python's version.
        cuda_image: Base of the GPU image, with the CUDA that onnxruntime-gpu was built for (13 for 1.31) and a Python
            for which the pinned packages exist.

    Returns:
        The files with their sizes and digests, and the pinned versions.

    Raises:
        FileNotFoundError: The folder is not an exported one, or has no ``predictor.py``.
        ImportError: A package that is to be pinned is not installed here.

    Example::

        print(write_deployment("served"))
    """
    place = Path(folder)
    for name in ("head.json", "predictor.py"):
        if not (place / name).is_file():
            raise FileNotFoundError(f"{place / name} does not exist: give the folder of one task that was exported")
    pins = pinned((*RUNTIME, "litserve"))
    gpu = {"onnxruntime-gpu" if name == "onnxruntime" else name: pin for name, pin in pins.items()}
    image = python_image or f"python:{sys.version_info[0]}.{sys.version_info[1]}-slim-bookworm"
    texts = {
        **server_files(),
        "lambda_handler.py": standalone("lambda_handler"),
        "handler.py": standalone("handler"),
        "requirements.txt": _lines({name: pins[name] for name in RUNTIME}),
        "requirements-serve.txt": _lines(pins),
        "requirements-serve-gpu.txt": _lines(dict(sorted(gpu.items()))),
        "Dockerfile": DOCKERFILE.format(image=image),
        "Dockerfile.gpu": DOCKERFILE_GPU.format(image=cuda_image),
        ".dockerignore": DOCKERIGNORE,
    }
    rows = []
    for name, text in texts.items():
        with atomic_file(place / name) as path:
            path.write_text(text, encoding="utf-8")
        rows.append({"file": name, "bytes": len(text.encode()), "sha256": sha256(place / name)[:12]})
    return Report(f"Wrote what serves {place}", {"images": [image, cuda_image], "pinned": len(pins)}, rows)


def launch(arguments: Sequence[str]) -> int:
    """Run the server in a process that imports neither torch nor this package, until it ends.

    Signals to stop are passed on. The code is that of this package, not what may lie in the folder.

    Args:
        arguments: Of ``serve.py``: the folder, then ``--host``, ``--port``, ``--workers`` and others (``--help``).

    Returns:
        The exit code: 0 after SIGTERM or Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="lightning_ft_serve_") as place:
        for name, text in {**server_files(), "predictor.py": bundle("lightning_ft.export.predictor")}.items():
            path = Path(place, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        process = subprocess.Popen([sys.executable, str(Path(place, "serve.py")), *arguments])

        def pass_on(number: int, frame: Any) -> None:
            process.send_signal(number)

        # Ctrl-C reaches the whole group: it is not sent twice.
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return process.wait()
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)


def server_files() -> dict[str, str]:
    """The server's files by name, for a folder that has a ``predictor.py``."""
    modules = {f"serving/{name}.py": standalone(name) for name in MODULES}
    return {"serve.py": START, "serving/__init__.py": '"""The server of the model beside this folder."""\n', **modules}


def standalone(name: str) -> str:
    """A module of this folder, as it runs beside ``predictor.py`` without this package.

    Args:
        name: Such as ``"rows"``.

    Raises:
        ValueError: It imports something else of this package.
    """
    text = _source(f"{__package__}.{name}")
    for old, new in {
        f"{__package__}.": "serving.",
        "lightning_ft.export.predictor": "predictor",
        "from lightning_ft.export.extras import require": "from importlib import import_module",
        ', extra="serve")': ")",
        " = require(": " = import_module(",
    }.items():
        text = text.replace(old, new)
    if "lightning_ft" in text:
        raise ValueError(f"{name} imports more of lightning_ft than serving.* and the predictor")
    return text


def pinned(names: Sequence[str]) -> dict[str, str]:
    """The versions of packages, and of all that they need, as installed here.

    Args:
        names: Of distributions.

    Raises:
        ImportError: One is not installed.

    Example:
        >>> sorted(pinned(["uvicorn"]))
        ['click', 'h11', 'uvicorn']
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            key = (canonicalize_name(wanted.name), extra)
            if key in seen:
                continue
            seen.add(key)
            try:
                found[key[0]] = version(wanted.name)
            except PackageNotFoundError as error:
                raise ImportError(
                    f'{wanted.name} is to be pinned and not installed: pip install "lightning-ft[serve]"'
                ) from error
            needs = [Requirement(line) for line in requires(wanted.name) or ()]
            waiting += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return dict(sorted(found.items()))


def _lines(pins: dict[str, str]) -> str:
    return "".join(f"{name}=={pin}\n" for name, pin in pins.items())


def _source(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the source of {module} is not there: install the package unzipped")
    return Path(spec.origin).read_text(encoding="utf-8")
