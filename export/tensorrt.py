"""Exported graphs as TensorRT engines, built for the shapes of real data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from lightning_ft.core.files import atomic_file, sha256
from lightning_ft.core.folders import atomic_folder
from lightning_ft.core.report import Report
from lightning_ft.export.extras import require
from lightning_ft.export.graph_precision import check_precision, half_precision
from lightning_ft.export.manifest import REPORT, is_export, read_report, seal
from lightning_ft.export.profiles import Profile, Shapes, graph_axes, longest_input_of

log = logging.getLogger(__name__)

EnginePrecision = Literal["fp32", "fp16", "int8-static"]
RuntimeName = Literal["auto", "tensorrt", "tensorrt_rtx"]

METADATA = "engine.json"
FORMAT = 1
EXTRA = "tensorrt"

LEFT_OUT = (".onnx", ".data", ".engine")
OWN = (REPORT, "README.md", METADATA)
TURING = 80  # below it, TensorRT-RTX has no product of fp32 matrices


class EngineError(RuntimeError):
    """An engine that cannot be built, or not be run here."""


def build_tensorrt(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: EnginePrecision | None = None,
    profile: Profile | Sequence[Profile] | None = None,
    runtime: RuntimeName = "auto",
    capabilities: Sequence[str] = (),
    timing_cache: str | os.PathLike[str] | None = None,
    workspace: int | None = None,
    progress: Callable[[str], None] = log.info,
) -> Report:
    """Build the graphs of an exported folder into engines, and write them with all that runs them.

    The networks are strongly typed: what runs in which precision is what the graphs say. So ``"fp16"`` is written into
    an fp32 graph here, and its outputs are compared with those of the graph in fp32 on ONNX Runtime, at the profiles'
    shapes; ``"int8-static"`` needs data, so the folder must have been exported in it.

    The folder holds ``model.engine`` (for each ``.onnx`` file one of its name), ``engine.json`` (what it was built by,
    from and for), the tokenizer's files, ``head.json``, ``predictor.py`` and ``report.json``.

    An engine of the full TensorRT runs on the GPU it was built on; the builder needs that GPU. TensorRT for RTX builds
    without one, for a list of compute capabilities, and compiles the kernels where the engine is loaded.

    Args:
        folder: What ``export_onnx`` wrote, of any head; several graphs, and graphs with a key-value cache, too.
        out: Folder to create. It may exist if it is empty, or holds an earlier export, which is then kept as
            ``out.previous``.
        precision: That of the graphs by default.
        profile: The shapes to build for; ``Profile.of(token_lengths(data))`` finds them. By default one profile:
            batches of 1 to 32, tuned for 8, and sequences up to the longest that the model takes, tuned for a quarter;
            for decoders with a cache those of ``Profile.of_decoder``.
        runtime: ``"tensorrt"``, ``"tensorrt_rtx"``, or the first of them that is installed.
        capabilities: Of TensorRT for RTX: the compute capabilities to build for, such as ``("SM89", "SM120")``; by
            default all from Ampere on. Turing (SM75) takes no fp32 products: fp16 alone.
        timing_cache: A file that the full TensorRT reads timings of kernels from, and writes them to: the next build
            is faster. TensorRT for RTX times nothing when it builds, and leaves the file alone.
        workspace: Bytes of GPU memory that a kernel may use while it runs; by default all.
        progress: Is told each thing as it begins.

    Returns:
        A row for each engine; also written to ``report.json``.

    Raises:
        EngineError: TensorRT refuses a graph, with what it said, or does not start.
        FileExistsError: ``out`` is a file, or a folder that holds something else than an export.
        FileNotFoundError: The folder has no graph.
        ImportError: No TensorRT is installed.
        ParityError: The graph in fp16 differs from the one in fp32.
        ValueError: An argument is wrong, or a graph is in a precision that no engine is built of.

    Example::

        profiles = Profile.of(token_lengths(data), batch_sizes=(1, 32))
        build_tensorrt("served", "engines", precision="fp16", profile=profiles)
        Predictor("engines", session=load_engine("engines"))("A moving film.")
    """
    _check_arguments(precision, runtime, workspace)
    folder = Path(folder)
    graphs = sorted(folder.glob("*.onnx"))
    if not graphs:
        raise FileNotFoundError(f"{folder} has no .onnx file: give a folder that lightning-ft export wrote")
    profiles = _profiles(folder, graphs, profile)
    found = {path.name: check_precision(path, precision) for path in graphs}
    name, trt = find_runtime(runtime)
    builder = _Builder(name, trt, tuple(capabilities), workspace, timing_cache, progress)
    rows: list[dict[str, Any]] = []
    entries: dict[str, Any] = {}
    with atomic_folder(out, replace=is_export) as place, tempfile.TemporaryDirectory() as scratch:
        for path in graphs:
            wanted = precision or found[path.name]
            source = path
            if wanted == "fp16" and found[path.name] == "fp32":
                source = Path(scratch) / path.name
                half_precision(path, source, [item.shapes(graph_axes(path)) for item in profiles], progress=progress)
            entry = _write_engine(builder, source, place / f"{path.stem}.engine", wanted, profiles)
            entries[path.stem] = {"onnx_sha256": sha256(path), **entry}
            rows.append(_row(path.stem, entries[path.stem]))
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in LEFT_OUT and file.name not in OWN:
                shutil.copyfile(file, place / file.name)
        known = {"format": FORMAT, **builder.facts(), "precision": rows[0]["precision"], "engines": entries}
        (place / METADATA).write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        before = read_report(folder)
        # Of a folder of other hands only its path is known.
        origin = {"path": str(folder)} if before is None else before.facts["source"]
        facts = {"source": origin, "built from": str(folder), **builder.facts(), "timing cache": builder.cache_fact()}
        return seal(place, Report("Exported to TensorRT", facts, rows), out)


def find_runtime(runtime: RuntimeName = "auto") -> tuple[str, ModuleType]:
    """The name and the module of an installed TensorRT.

    Raises:
        ImportError: It, or any, is missing; the message names the extra.
    """
    if runtime != "auto":
        return runtime, require(runtime, extra=EXTRA)
    try:
        return "tensorrt", require("tensorrt", extra=EXTRA)
    except (ImportError, OSError):  # its package without its libraries raises OSError
        return "tensorrt_rtx", require("tensorrt_rtx", extra=EXTRA)


def _check_arguments(precision: str | None, runtime: str, workspace: int | None) -> None:
    if precision is not None and precision not in get_args(EnginePrecision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(get_args(EnginePrecision))}, or None")
    if runtime not in get_args(RuntimeName):
        raise ValueError(f"runtime={runtime!r}: expected one of {', '.join(get_args(RuntimeName))}")
    if workspace is not None and workspace < 1 << 20:
        raise ValueError(f"workspace={workspace} is in bytes, and less than a MiB: leave it out, or give 1 << 30")


def _profiles(folder: Path, graphs: Sequence[Path], profile: Profile | Sequence[Profile] | None) -> tuple[Profile, ...]:
    if isinstance(profile, Profile):
        return (profile,)
    if profile is not None:
        if not profile:
            raise ValueError("profile: expected one or more, got none: leave it out for the default")
        return tuple(profile)
    longest = longest_input_of(folder) or 512
    tuned = max(1, longest // 4)
    named = {axis for path in graphs for axes in graph_axes(path).values() for axis in axes}
    if {"past", "source"} & named:
        return tuple(
            Profile({**item.axes, "batch": (1, 1, 8)}) for item in Profile.of_decoder([tuned], longest=longest)
        )
    return (Profile({"batch": (1, 8, 32), "sequence": (1, tuned, longest), "choices": (2, 4, 8)}),)


def _row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "engine": name,
        "precision": entry["precision"],
        "profiles": len(entry["profiles"]),
        "layers": entry["layers"],
        "MB": round(entry["bytes"] / 1e6, 2),
        "seconds": entry["seconds"],
        "sha256": entry["sha256"][:16],
    }


def _write_engine(
    builder: _Builder, source: Path, target: Path, precision: str, profiles: Sequence[Profile]
) -> dict[str, Any]:
    """What ``engine.json`` says of it."""
    axes = graph_axes(source)
    shapes = [profile.shapes(axes) for profile in profiles]
    shapes = [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]]
    started = time.perf_counter()
    built = builder.build(source, shapes)
    target.write_bytes(built.plan)
    return {
        "file": target.name,
        "sha256": sha256(target),
        "bytes": target.stat().st_size,
        "precision": precision,
        "layers": built.layers,
        "tensors": built.tensors,
        "inputs": built.inputs,
        "outputs": built.outputs,
        "profiles": shapes,
        "seconds": round(time.perf_counter() - started, 2),
    }


@dataclass(frozen=True)
class _Built:
    plan: bytes
    layers: int
    tensors: dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


class _Builder:
    """One TensorRT, with what all engines of a folder share."""

    def __init__(
        self,
        name: str,
        trt: Any,
        capabilities: tuple[str, ...],
        workspace: int | None,
        timing_cache: str | os.PathLike[str] | None,
        progress: Callable[[str], None],
    ) -> None:
        self.name = name
        self.trt = trt
        self.rtx = name == "tensorrt_rtx"
        self.workspace = workspace
        self.cache = None if timing_cache is None else Path(timing_cache)
        self.cache_was = ""
        self.progress = progress
        self.logger = make_logger(trt)
        self.capabilities = self._capabilities(capabilities)
        try:
            self.builder = trt.Builder(self.logger)
        except (RuntimeError, TypeError) as error:  # pybind11: "factory function returned nullptr"
            raise EngineError(
                f"{name} does not start: {self._said() or error}. It builds on the GPU that runs the engine, with its "
                "driver; runtime='tensorrt_rtx' builds without a GPU"
            ) from error

    def facts(self) -> dict[str, Any]:
        """What an engine depends on."""
        made = {"runtime": self.name, "version": self.trt.__version__}
        if self.rtx:
            return {**made, "capabilities": list(self.capabilities)}
        import torch

        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {**made, "gpu": gpu.name, "capabilities": [f"SM{gpu.major}{gpu.minor}"]}

    def cache_fact(self) -> str:
        """What became of the timing cache."""
        if self.cache is None:
            return "none"
        return "left alone: TensorRT for RTX times nothing when it builds" if self.rtx else self.cache_was

    def build(self, path: Path, profiles: Sequence[Shapes]) -> _Built:
        """Build one graph."""
        trt = self.trt
        self.progress(f"building {path.name} with {self.name} {trt.__version__}, profiles: {len(profiles)}")
        network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            lines = "\n".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors)
            raise EngineError(f"{path}: {self.name} does not take this graph:\n{lines}")
        config = self._config(profiles)
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(f"{path}: {self.name} does not build this graph:\n{self._said()}")
        self._keep_timings(config)
        inputs = [_entry(network.get_input(i)) for i in range(network.num_inputs)]
        outputs = [_entry(network.get_output(i)) for i in range(network.num_outputs)]
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        types = Counter(layer.get_output(i).dtype.name for layer in layers for i in range(layer.num_outputs))
        return _Built(bytes(plan), len(layers), dict(types.most_common()), inputs, outputs)

    def _config(self, profiles: Sequence[Shapes]) -> Any:
        trt = self.trt
        config = self.builder.create_builder_config()
        config.progress_monitor = self.monitor = make_monitor(trt, self.progress)
        if self.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace)
        if self.rtx:
            config.num_compute_capabilities = len(self.capabilities)
            for index, capability in enumerate(self.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
        elif self.cache is not None:
            self._give_timings(config)
        for shapes in profiles:
            profile = self.builder.create_optimization_profile()
            for name, (low, tuned, high) in shapes.items():
                profile.set_shape(name, low, tuned, high)
            if config.add_optimization_profile(profile) < 0:
                raise EngineError(f"{self.name} does not take the profile {dict(shapes)}:\n{self._said()}")
        return config

    def _capabilities(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        if not self.rtx:
            if wanted:
                raise ValueError(
                    f"capabilities={wanted}: the full TensorRT builds for the GPU that it runs on: leave them out, or "
                    "take runtime='tensorrt_rtx'"
                )
            return ()
        known = [name for name in self.trt.ComputeCapability.__members__ if name.startswith("SM")]
        known.sort(key=lambda name: int(name[2:]))
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(
                f"capabilities: TensorRT for RTX {self.trt.__version__} builds for {', '.join(known)}, got "
                f"{', '.join(unknown)}: the full TensorRT (runtime='tensorrt') builds for the GPUs of data centres"
            )
        return wanted or tuple(name for name in known if int(name[2:]) >= TURING)

    def _give_timings(self, config: Any) -> None:
        assert self.cache is not None
        known = self.cache.read_bytes() if self.cache.is_file() else b""
        cache = config.create_timing_cache(known)
        # Timings of another GPU or version are refused: the build then starts with none.
        taken = cache is not None and config.set_timing_cache(cache, False)
        if not taken:
            config.set_timing_cache(config.create_timing_cache(b""), False)
        self.cache_was = f"{self.cache}: {'read' if known and taken else 'begun anew'}, written"

    def _keep_timings(self, config: Any) -> None:
        if self.rtx or self.cache is None:
            return
        with atomic_file(self.cache) as file:
            file.write_bytes(bytes(config.get_timing_cache().serialize()))

    def _said(self) -> str:
        said = "\n".join(self.logger.lines)
        self.logger.lines.clear()
        return said


def make_logger(trt: Any) -> Any:
    """A logger of TensorRT that keeps errors, for the message of an exception, and passes warnings to Python's."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message)
            elif severity == trt.ILogger.WARNING:
                log.debug("TensorRT: %s", message)

    return Logger()


def make_monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    """Tells of each phase of a build that is no part of another."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                progress(f"TensorRT: {phase}, {steps} steps")

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return True

    return Monitor()


def _entry(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "type": tensor.dtype.name, "shape": list(tensor.shape)}
