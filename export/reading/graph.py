"""A graph in ONNX Runtime on the provider that was asked for, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
"""They make encoders slower on a CPU (64 ms with them, 58 ms without, MiniLM at 8x128)."""


class Graph:
    """What runs a graph.

    Args:
        session: With the two methods of an ``onnxruntime.InferenceSession`` that are used here, ``get_inputs()`` and
            ``run(names, feed)``.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs: list[str] = [entry.name for entry in session.get_inputs()]
        providers = session.get_providers() if hasattr(session, "get_providers") else ["CPUExecutionProvider"]
        # On a CPU there is nothing to bind: the arrays are there already.
        self._binds = hasattr(session, "io_binding") and providers[0] != "CPUExecutionProvider"

    def run(self, outputs: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of those names, as arrays of the CPU."""
        if not self._binds:
            return list(self.session.run(list(outputs), dict(feed)))
        binding = self.session.io_binding()
        for name, values in feed.items():
            binding.bind_cpu_input(name, values)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())


def open_graph(path: Path, provider: str, threads: int | None) -> Graph:
    """A graph on a provider.

    Args:
        path: The file.
        provider: A key of :data:`PROVIDERS`.
        threads: Threads within one operator; None for all cores.

    Raises:
        RuntimeError: This onnxruntime has no such provider, or took another one in silence.
        ValueError: It is not one of :data:`PROVIDERS`.
    """
    import onnxruntime as ort

    if provider not in PROVIDERS:
        raise ValueError(f"provider={provider!r}: expected one of {', '.join(PROVIDERS)}")
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise RuntimeError(f"provider={provider!r}: this onnxruntime has {', '.join(ort.get_available_providers())}")
    off = SLOW_FUSIONS if provider == "cpu" else []
    session = ort.InferenceSession(str(path), options, providers=[wanted], disabled_optimizers=off)
    if (used := session.get_providers()[0]) != wanted:
        raise RuntimeError(f"provider={provider!r} cannot run here: ONNX Runtime took {used}")
    return Graph(session)
