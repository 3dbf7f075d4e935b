"""Engines that TensorRT built, loaded only where they run, with the methods of a session."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ft.core.files import atomic_file, sha256
from lightning_ft.export.extras import require
from lightning_ft.export.profiles import Shapes, choose_profile
from lightning_ft.export.tensorrt import EXTRA, FORMAT, METADATA, EngineError, make_logger

if TYPE_CHECKING:
    import numpy as np

TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of TensorRT, by name, to those of PyTorch."""


@dataclass(frozen=True)
class Gpu:
    """What of a GPU an engine depends on.

    Args:
        name: As the driver says it.
        capability: Such as ``"SM89"``.
    """

    name: str
    capability: str


@dataclass(frozen=True)
class Entry:
    """An input or an output of an engine.

    Args:
        name: Its name.
        type: As ONNX Runtime writes it: ``"tensor(int64)"``.
        shape: Sizes, and -1 for what a batch decides.
    """

    name: str
    type: str
    shape: tuple[int, ...]


def load_engine(
    folder: str | os.PathLike[str],
    graph: str | None = None,
    *,
    device: int = 0,
    runtime_cache: str | os.PathLike[str] | None = None,
) -> EngineSession:
    """Load an engine where it runs, or say why it does not run here.

    The result stands for an ``onnxruntime.InferenceSession`` in :class:`~lightning_ft.export.Predictor`:
    ``Predictor(folder, session=load_engine(folder))``.

    Args:
        folder: What :func:`~lightning_ft.export.build_tensorrt` wrote.
        graph: Which of several engines: the name of its file without the ending, such as ``"encoder"``.
        device: Number of the GPU.
        runtime_cache: A file that TensorRT for RTX reads compiled kernels from, and writes them to when a profile has
            run for the first time: the next start need not compile. The full TensorRT compiles when it builds.

    Returns:
        The session.

    Raises:
        EngineError: The engine was changed, or built by another TensorRT or for another GPU, or there is no driver.
        FileNotFoundError: The folder holds no engine.
        ImportError: The TensorRT that built it is not installed.
        ValueError: ``graph`` is not there, or must be named.
    """
    folder = Path(folder)
    known = read_metadata(folder)
    name = _graph(known, graph, folder)
    entry = known["engines"][name]
    check_file(folder / entry["file"], entry)
    trt = require(known["runtime"], extra=EXTRA)
    check_version(known, trt.__version__)
    check_gpu(known, find_gpu(device))
    plan = (folder / entry["file"]).read_bytes()
    return EngineSession(trt, plan, entry, device=torch.device("cuda", device), runtime_cache=runtime_cache)


def read_metadata(folder: Path) -> dict[str, Any]:
    """What ``engine.json`` says.

    Raises:
        EngineError: It was written in another way than is read here.
        FileNotFoundError: There is none.
    """
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a folder that build_tensorrt wrote")
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if known.get("format") != FORMAT:
        raise EngineError(f"{path} has the format {known.get('format')!r}, and {FORMAT} is read here: build it anew")
    return known


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """That an engine is the one that was written: TensorRT runs whatever code it holds.

    Raises:
        EngineError: It is another one, or not there.
    """
    if not path.is_file():
        raise EngineError(f"{path} does not exist, and {METADATA} names it: copy the whole folder, or build it anew")
    if (found := sha256(path)) != entry["sha256"]:
        raise EngineError(
            f"{path} was changed since it was built: its SHA-256 is {found[:16]}…, and {entry['sha256'][:16]}… was "
            "written: copy it again, or build it anew"
        )


def check_version(known: Mapping[str, Any], version: str) -> None:
    """That the TensorRT that runs an engine is the one that built it.

    Raises:
        EngineError: It is another version.
    """
    if version != known["version"]:
        raise EngineError(
            f"the engine was built by {known['runtime']} {known['version']}, and {version} is installed: engines run "
            f"on the version that built them: build it anew, or install {known['runtime']} {known['version']}"
        )


def check_gpu(known: Mapping[str, Any], gpu: Gpu) -> None:
    """That an engine was built for a GPU.

    Raises:
        EngineError: It was built for another one.
    """
    wanted = known["capabilities"]
    if gpu.capability not in wanted:
        raise EngineError(
            f"the engine was built for {', '.join(wanted)}, and the {gpu.name} here is {gpu.capability}: build it "
            + ("with this one among the capabilities" if known["runtime"] == "tensorrt_rtx" else "on this GPU")
        )
    if known.get("gpu", gpu.name) != gpu.name:
        # Kernels were timed on the other one: some may ask for more memory or processors than there are here.
        raise EngineError(f"the engine was built on a {known['gpu']}, and a {gpu.name} is here: build it on this GPU")


def find_gpu(device: int = 0) -> Gpu:
    """The GPU of a number.

    Raises:
        EngineError: There is no driver, or no such GPU.
    """
    if not torch.cuda.is_available():
        raise EngineError(
            "no GPU with a driver is here, or this PyTorch was built without CUDA: an engine runs on a GPU alone. On a "
            "CPU, run the exported folder with ONNX Runtime"
        )
    if device >= torch.cuda.device_count():
        raise EngineError(f"device={device}: there are {torch.cuda.device_count()} GPUs here, from 0 on")
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, f"SM{found.major}{found.minor}")


class EngineSession:
    """An engine with the two methods that :class:`~lightning_ft.export.Predictor` calls on a session.

    Each call picks the profile that takes the inputs' shapes and is tuned for the nearest ones. Inputs that lie on the
    GPU are read where they are; others are copied there once. Calls from several threads take turns.

    Args:
        trt: The module of TensorRT.
        plan: The engine.
        entry: What ``engine.json`` says of it.
        device: Where it runs.
        runtime_cache: See :func:`load_engine`.

    Raises:
        EngineError: TensorRT does not load it, or an output's size depends on the data.
    """

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        entry: Mapping[str, Any],
        *,
        device: torch.device,
        runtime_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self._trt = trt
        self._device = device
        self._profiles: list[Shapes] = entry["profiles"]
        self._types = {io["name"]: TYPES[io["type"]] for io in (*entry["inputs"], *entry["outputs"])}
        self._inputs = [_described(io) for io in entry["inputs"]]
        self._outputs = [_described(io) for io in entry["outputs"]]
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT does not load the engine:\n" + "\n".join(self._logger.lines))
        self._cache = None if runtime_cache is None else Path(runtime_cache)
        self._kernels: Any = None
        self._context = self._new_context()
        self._profile = 0
        self._ran: set[int] = set()
        # TensorRT wants an address even of a tensor without elements, such as an empty key-value cache.
        self._nothing = torch.empty(1, dtype=torch.int64, device=device)

    def get_inputs(self) -> list[Entry]:
        """Names, types and shapes of the inputs."""
        return list(self._inputs)

    def get_outputs(self) -> list[Entry]:
        """Names, types and shapes of the outputs."""
        return list(self._outputs)

    def run(self, names: Sequence[str] | None, feed: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        """Run a batch from and to the host.

        Args:
            names: Outputs to return; None for all.
            feed: An array, or a tensor, for each input.

        Returns:
            An array for each name.

        Raises:
            ValueError: An input is missing or not known, of another type, or of a shape that no profile takes; or an
                output is not known.
        """
        wanted = [entry.name for entry in self._outputs] if names is None else list(names)
        found = self.run_tensors(feed)
        if unknown := [name for name in wanted if name not in found]:
            raise ValueError(f"names: {', '.join(unknown)} is no output; there are {', '.join(found)}")
        values = [found[name] for name in wanted]
        return [(value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy() for value in values]

    def run_tensors(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run a batch, and leave its outputs on the GPU: those of a decoder's step are inputs of the next.

        Args:
            feed: As in :meth:`run`.

        Returns:
            A tensor for each output.
        """
        with self._lock, self._on_stream():
            tensors = self._tensors(feed)
            profile = choose_profile(self._profiles, {name: tuple(value.shape) for name, value in tensors.items()})
            self._use(profile)
            for name, value in tensors.items():
                if not self._context.set_input_shape(name, tuple(value.shape)):
                    raise EngineError(f"{name}: TensorRT refused the shape {tuple(value.shape)}:\n{self._said()}")
                self._bind(name, value)
            outputs = {entry.name: self._room(entry.name) for entry in self._outputs}
            if not self._context.execute_async_v3(self._handle):
                raise EngineError(f"TensorRT failed to run the batch:\n{self._said()}")
            if self._stream is not None:
                self._stream.synchronize()
            if profile not in self._ran:
                self._ran.add(profile)
                self._save_kernels()
            return outputs

    # ---- tensors

    def _tensors(self, feed: Mapping[str, Any]) -> dict[str, Tensor]:
        import numpy as np

        names = [entry.name for entry in self._inputs]
        if set(feed) != set(names):
            raise ValueError(f"feed: expected the inputs {', '.join(names)}, got {', '.join(feed) or 'none'}")
        found = {}
        for name in names:
            value = feed[name] if isinstance(feed[name], Tensor) else torch.from_numpy(np.ascontiguousarray(feed[name]))
            if value.dtype != self._types[name]:
                raise ValueError(f"{name}: expected {self._types[name]}, got {value.dtype}")
            found[name] = value.to(self._device, non_blocking=True).contiguous()
        return found

    def _room(self, name: str) -> Tensor:
        """An output's own memory, of the size that the inputs' shapes make it."""
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise EngineError(f"{name}: its size depends on the data, and not on the inputs' shapes alone: {shape}")
        value = torch.empty(shape, dtype=self._types[name], device=self._device)
        self._bind(name, value)
        return value

    def _bind(self, name: str, value: Tensor) -> None:
        address = value.data_ptr() if value.numel() else self._nothing.data_ptr()
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{name}: TensorRT refused its memory:\n{self._said()}")

    # ---- TensorRT

    @property
    def _handle(self) -> int:
        return 0 if self._stream is None else int(self._stream.cuda_stream)

    def _on_stream(self) -> Any:
        if self._stream is None:
            return nullcontext()
        # Tensors of the caller's may still be in the making on the stream that it uses.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _use(self, profile: int) -> None:
        if profile == self._profile:
            return
        if not self._context.set_optimization_profile_async(profile, self._handle):
            raise EngineError(f"TensorRT refused the profile {profile}:\n{self._said()}")
        self._profile = profile

    def _new_context(self) -> Any:
        if self._cache is None or not hasattr(self._trt, "IRuntimeCache"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        self._kernels = config.create_runtime_cache()
        if self._cache.is_file():
            self._kernels.deserialize(self._cache.read_bytes())  # of another version or GPU it stays empty
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)

    def _save_kernels(self) -> None:
        if self._kernels is not None and self._cache is not None:
            with atomic_file(self._cache) as file:
                file.write_bytes(bytes(self._kernels.serialize()))

    def _said(self) -> str:
        said = "\n".join(self._logger.lines)
        self._logger.lines.clear()
        return said


def _graph(known: Mapping[str, Any], graph: str | None, folder: Path) -> str:
    names = list(known["engines"])
    if graph is None and len(names) == 1:
        return str(names[0])
    if graph is None or graph not in names:
        raise ValueError(f"graph={graph!r}: {folder} holds {', '.join(names)}: name one of them")
    return graph


def _described(io: Mapping[str, Any]) -> Entry:
    kind = {"FLOAT": "float", "HALF": "float16", "BF16": "bfloat16"}.get(io["type"], io["type"].lower())
    return Entry(io["name"], f"tensor({kind})", tuple(io["shape"]))
