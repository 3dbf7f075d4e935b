"""A decoder for onnxruntime-genai, which is the fastest where it knows the model's family."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ft.core.files import atomic_folder
from lightning_ft.core.report import Report
from lightning_ft.export.extras import require
from lightning_ft.export.gate import Gate, GateError
from lightning_ft.export.generative_graphs import CausalGraphs
from lightning_ft.export.graph import inference_state
from lightning_ft.export.heads import Exportable, open_source
from lightning_ft.export.judge import drop, judge, main_metric
from lightning_ft.export.manifest import is_export, provenance, seal
from lightning_ft.export.onnx_folder import save_companions
from lightning_ft.export.parity import check_parity

if TYPE_CHECKING:
    from lightning_ft.export.generation import GenerationSettings
    from lightning_ft.export.parity import Probe
    from lightning_ft.modules import TransformerModule
    from lightning_ft.modules.base import Batch

log = logging.getLogger(__name__)

GenaiPrecision = Literal["fp32", "int8", "int4"]

FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "granite", "smollm3",
    "nemotron",
)  # fmt: skip
"""Those of text alone that its builder knows, as ``config.model_type`` names them."""


def export_genai(
    source: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    *,
    precision: GenaiPrecision = "fp32",
    gate: Gate | None = None,
    max_length: int = 64,
    tolerance: float = 1e-5,
    progress: Callable[[str], None] = log.info,
) -> Report:
    """Export a decoder to a folder for onnxruntime-genai, proved equal to it before the folder appears.

    In fp32 the logits of single texts in five lengths, and the tokens that follow greedily, are compared with the
    model's own, as :func:`~lightning_ft.export.export_onnx` does; in fewer bits the graph must pass a ``gate``. No
    layers are kept in fp32 where it fails: take ``export_onnx``, which does so.

    Args:
        source: A checkpoint of our ``CausalLM``, a Hugging Face folder of a decoder, or a module of either.
        out: Folder to create. An earlier export there is replaced.
        precision: ``"fp32"``, ``"int8"`` or ``"int4"``; in the latter two, weights in blocks of 32.
        gate: What a graph in fewer bits is held to; required for one, and for none in fp32.
        max_length: Tokens in the longest text that is compared.
        tolerance: Largest error allowed in fp32, relative to the largest logit.
        progress: Is told each thing as it begins.

    Returns:
        Sizes, seconds and the table of differences; also written to ``report.json``.

    Raises:
        FileExistsError: ``out`` is a file or a folder that is not empty.
        GateError: The graph in fewer bits loses too much. Nothing is written.
        ImportError: onnxruntime-genai is missing.
        ParityError: The graph differs from the model. Nothing is written.
        RuntimeError: The builder failed.
        TypeError: The model is no decoder, or of a family that onnxruntime-genai does not know.
        ValueError: An argument is wrong.

    Example::

        export_genai("runs/run_0/checkpoints/best.ckpt", "served", precision="int4", gate=Gate(data, max_drop=0.1))
    """
    require("onnxruntime_genai", extra="genai")
    if precision not in get_args(GenaiPrecision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(get_args(GenaiPrecision))}")
    if (precision == "fp32") != (gate is None):
        raise ValueError(f"gate={gate!r} with precision={precision!r}: a graph in fewer bits needs one, and fp32 none")
    part = _decoder(source)
    if gate is not None and part.module is None:
        raise TypeError(
            f"gate: {part.source} has no metrics to be judged by: give a module of lightning_ft, or a folder"
        )
    started = time.perf_counter()
    with atomic_folder(out, replace=is_export) as folder:
        progress(f"building {type(part.model).__name__} in {precision} with onnxruntime-genai")
        _build(part, folder, precision)
        save_companions(folder, part)
        (folder / "predictor.py").unlink(missing_ok=True)  # it runs graphs in ONNX Runtime
        _configure(folder, part)
        built = time.perf_counter()
        rows: list[dict[str, Any]] = []
        facts: dict[str, Any] = {}
        if gate is None:
            progress("comparing with the model")
            rows, facts = _compare(part, folder, max_length, tolerance)
        else:
            assert part.module is not None
            facts = {"gate": _judge(part.module, folder, gate, precision, progress)}
        facts = {
            "model": type(part.model).__name__,
            "source": provenance(source, part.original),
            "task": part.head.task,
            "runtime": "onnxruntime-genai",
            "precision": precision,
            "parameters": sum(parameter.numel() for parameter in part.model.parameters()),
            **facts,
            "max_length": max_length,
            "tolerance": tolerance,
            "build_seconds": round(built - started, 2),
            "versions": {name: require(name).__version__ for name in ("torch", "transformers", "onnxruntime_genai")},
        }
        return seal(folder, Report(f"Exported {type(part.model).__name__} for onnxruntime-genai", facts, rows), out)


def _decoder(source: str | os.PathLike[str] | nn.Module) -> Exportable:
    parts = open_source(source)
    part = next(iter(parts.values()))
    config: Any = getattr(part.model, "config", None)
    if len(parts) > 1 or part.head.task != "text-generation":
        raise TypeError(f"source: expected a decoder that writes text, got one for {part.head.task}: take export_onnx")
    if config.model_type not in FAMILIES:
        raise TypeError(
            f"source: onnxruntime-genai does not know {config.model_type!r} models; it knows {', '.join(FAMILIES)}: "
            "take export_onnx, whose graph runs any decoder"
        )
    if any(parameter.dtype != torch.float32 for parameter in part.model.parameters()):
        raise ValueError("source: expected float32 weights: call model.float() first")
    return part


def _build(part: Exportable, folder: Path, precision: str) -> None:
    """Its builder, in a process of its own: a script that imports its neighbours by their bare names."""
    script = Path(str(require("onnxruntime_genai", extra="genai").__file__)).parent / "models" / "builder.py"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".genai-") as name:
        weights = Path(name) / "weights"
        part.model.save_pretrained(weights)  # type: ignore[operator]
        part.tokenizer.save_pretrained(weights)
        flags = {"-m": "model", "-i": weights, "-o": folder, "-p": precision, "-e": "cpu", "-c": Path(name) / "cache"}
        command = [sys.executable, str(script), *(str(value) for pair in flags.items() for value in pair)]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    if done.returncode or not (folder / "genai_config.json").is_file():
        raise RuntimeError(f"the builder of onnxruntime-genai failed:\n{done.stderr[-2000:]}")


def _configure(folder: Path, part: Exportable) -> None:
    """Its configuration with the settings of our head, and the head's with the name of the runtime."""
    known = part.head.settings["generation"]
    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    ends = list(known["eos_token_id"])
    config["model"] |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    config["model"]["pad_token_id"] = known["pad_token_id"]
    names = ("do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
    config["search"] |= {name: known[name] for name in names}
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    head = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    head["settings"] |= {"runtime": "onnxruntime-genai", "graphs": {"decoder": "model.onnx"}}
    (folder / "head.json").write_text(json.dumps(head, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class GenaiDecoder:
    """A folder that :func:`export_genai` wrote, for one text at a time.

    Args:
        folder: The folder.

    Raises:
        ImportError: onnxruntime-genai is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._runtime = require("onnxruntime_genai", extra="genai")
        self._model = self._runtime.Model(os.fspath(folder))

    def _start(self, ids: Sequence[int], longest: int, **search: Any) -> Any:
        params = self._runtime.GeneratorParams(self._model)
        params.set_search_options(max_length=longest, **search)
        made = self._runtime.Generator(self._model, params)
        made.append_tokens(np.array([ids], np.int32))
        return made

    def logits(self, ids: Sequence[int], steps: int = 0) -> Tensor:
        """Logits of all tokens of a text, ``(sequence, vocabulary)``, the last ``steps`` of them read one by one."""
        first = len(ids) - steps
        made = self._start(ids[:first], len(ids) + 1, do_sample=False)
        parts = [made.get_output("logits")[0]]
        for token in ids[first:]:
            made.append_tokens(np.array([[token]], np.int32))
            parts.append(made.get_output("logits")[0])
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    def write(self, ids: Sequence[int], *, max_new_tokens: int, **search: Any) -> list[int]:
        """The tokens that follow a prompt, with the folder's settings or those given."""
        made = self._start(ids, len(ids) + max_new_tokens, **search)
        while not made.is_done():
            made.generate_next_token()
        return [int(token) for token in made.get_sequence(0)[len(ids) :]]


def _compare(
    part: Exportable, folder: Path, max_length: int, tolerance: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    decoder = GenaiDecoder(folder)
    with inference_state(part.model):
        graphs: Any = part.head.wrap(part.model)
        assert isinstance(graphs, CausalGraphs)
        # Its batches are of equal lengths only: single texts.
        probes = [probe for probe in graphs.probes(part.tokenizer, max_length=max_length) if not probe.padded]
        probes = [_first(probe) for probe in probes]
        rows = check_parity(
            lambda probe: {"logits": decoder.logits(_ids(probe), min(3, probe.length - 1))[None]},
            probes,
            [graphs.expected(probe) for probe in probes],
            tolerance=tolerance,
            per_token=graphs.per_token,
            rounding=graphs.rounding,
        )
        error = max(row["absolute"] for row in rows)

        def write(ids: Tensor, mask: Tensor, settings: GenerationSettings) -> Tensor:
            new = settings.max_new_tokens
            return torch.tensor([decoder.write(ids[0].tolist(), max_new_tokens=new, do_sample=False, num_beams=1)])

        proof = graphs.compare_greedy(write, probes, error=error)
    worst = {"worst absolute difference": error, "worst relative difference": max(row["relative"] for row in rows)}
    return rows, {**worst, "written alike": proof}


def _first(probe: Probe) -> Probe:
    return probe._replace(batch=1, inputs={name: value[:1] for name, value in probe.inputs.items()})


def _ids(probe: Probe) -> list[int]:
    ids: list[int] = probe.inputs["input_ids"][0].tolist()
    return ids


def _judge(
    module: TransformerModule, folder: Path, gate: Gate, precision: str, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    decoder = GenaiDecoder(folder)

    def forward(batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        result: Tensor | None = None
        for row in range(len(ids)):
            values = decoder.logits(ids[row][mask[row]].tolist())
            result = torch.zeros(*ids.shape, values.shape[1]) if result is None else result
            result[row, mask[row]] = values
        assert result is not None
        return result

    metric = gate.metric or main_metric(module)
    progress(f"judging the model on {type(gate.data).__name__}")
    reference = judge(module, gate.data)
    progress(f"judging {precision}")
    found = judge(module, gate.data, {"forward": forward})
    if metric not in found.metrics:
        raise ValueError(f"metric={metric!r} is not measured in validation; there are: {', '.join(found.metrics)}")
    lost = drop(module, metric, reference.metrics[metric], found.metrics[metric])
    rows = [
        {"precision": name, metric: values.metrics[metric], "drop": cost, "agreement": values.agreement(reference)}
        for name, values, cost in (("model", reference, 0.0), (precision, found, lost))
    ]
    if not lost <= gate.max_drop:
        raise GateError(
            f"in {precision} the graph loses {lost:.4g} of {metric}, more than max_drop={gate.max_drop:g}; nothing was "
            "written. Raise max_drop, or take export_onnx, which keeps what cannot bear it in fp32"
        )
    return rows
