"""A fine-tuned model as an ONNX folder that was proved equal to it."""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from lightning_ft.core.files import atomic_folder
from lightning_ft.core.report import Report
from lightning_ft.export.averaged import averaged
from lightning_ft.export.bake import check_depth
from lightning_ft.export.bundle import bundle
from lightning_ft.export.compare import MIN_LENGTH, check, prepare, reference
from lightning_ft.export.ensemble import Ensemble
from lightning_ft.export.extras import require
from lightning_ft.export.fallback import write_graph
from lightning_ft.export.gate import Gate
from lightning_ft.export.graph import attention, inference_state
from lightning_ft.export.heads import Exportable, Head, open_source
from lightning_ft.export.manifest import is_export, provenance, seal, training_of
from lightning_ft.export.parity import open_graph
from lightning_ft.export.quantize import Precision
from lightning_ft.export.readers import READERS
from lightning_ft.export.reading_settings import with_reading_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OPSETS = range(18, 23)
"""Below 18 the exporter converts down, unreliably; from 23 attention is a native node that TensorRT cannot build."""


def export_onnx(
    source: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    *,
    head: Head | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    members: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    labels: Sequence[str] = (),
    precision: Precision = "fp32",
    gate: Gate | None = None,
    opset: int = 20,
    max_length: int = 128,
    tolerance: float = 1e-5,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = log.info,
) -> Report:
    """Export a model to a folder for ONNX Runtime, proved equal to it before the folder appears.

    The folder holds ``model.onnx`` (with ``model.onnx.data`` beside it only from 1.5 GiB of weights on), the
    tokenizer's files, ``config.json``, ``head.json`` (the task, its labels and settings), ``predictor.py`` (which runs
    it without this package, where it knows the task) and ``report.json``. A module of several heads becomes a folder
    for each task, in one folder that appears when all have passed.

    Batch and sequence are dynamic axes, and the outputs on ten shapes are compared in ONNX Runtime (CPU) with the
    model's own, computed in evaluation mode with the attention implementation it came with. The error is
    ``max|y - y*| / max|y*|``, with the largest value taken over all shapes; of outputs per token, padding is left out
    (:func:`lightning_ft.export.parity.check_parity`). The graph itself is traced with eager attention, which gives
    fewer nodes and 10-20 % less latency than sdpa.

    In another ``precision`` than fp32 the graph must also pass a ``gate``: the metric of its task on held-out data.
    Nodes that cannot bear fewer bits stay in fp32; where that does not help, nothing is written.

    Args:
        source: A Lightning checkpoint of a lightning_ft module, a Hugging Face folder with safetensors, a lightning_ft
            module, a Hugging Face model, or any other module with ``head``. A module is not changed: training flags,
            attention implementation and device are restored, also after an error. One with adapters of peft, pruning
            masks, parametrisations or compiled parts is copied, these are merged into the copy's weights
            (:func:`lightning_ft.export.bake.baked`), and its graph is compared with the module as it is.
        out: Folder to create, or an earlier export to replace, which is kept as ``OUT.previous``
            (:func:`lightning_ft.core.folders.atomic_folder`).
        head: What to export; found by the class of the model by default.
        tokenizer: The one the model was trained with; by default the one that came with it.
        members: The folder of a :class:`~lightning_ft.callbacks.SnapshotEnsemble`, or files of it: the graph then
            answers as they do together. ``source`` is any checkpoint of the run.
        labels: Names of the classes, by index. Empty: the head's.
        precision: What the graph is written in: ``"fp32"``, ``"fp16"`` (for GPUs), ``"int8"`` (the fastest on a CPU),
            ``"int8-static"`` (for TensorRT; calibrated on the data of ``gate``), ``"int8-weights"`` or ``"int4"`` (for
            decoders).
        gate: What a graph in fewer bits is held to; it needs a module of lightning_ft, which knows its metrics.
        opset: Version of the ONNX operators, 18 to 22. 20 is the first with a GELU node.
        max_length: Tokens in the longest text that is compared; at least 8.
        tolerance: Largest error allowed, of the graph in fp32. Sound ones stay near 1e-6.
        settings: How ``predictor.py`` makes tokens of rows where it is not to take its defaults: the ``max_length``,
            the windows' ``stride`` and the like, such as :func:`lightning_ft.export.reading_settings` of the data.
        progress: Is told each thing as it begins.

    Returns:
        Versions, sizes, seconds and the table of differences; also written to ``report.json``, with the number of the
        export (one more than the one that it replaced), the SHA-256 of every file, and what the weights were:
        :func:`lightning_ft.export.verify` checks the folder by it.

    Raises:
        FileExistsError: ``out`` is a file, or a folder with content that is no export.
        ExportError: Neither torch nor transformers.exporters can make a graph of the model.
        FileNotFoundError: There is no such source.
        GateError: The graph in fewer bits does not do its task. Nothing is written.
        ImportError: A package of the extra ``export`` is missing.
        ParityError: The graph differs from the model. Nothing is written.
        TypeError: The source cannot be exported without a ``head``, or its output lacks what the head reads.
        ValueError: An argument, or how the model and its tokenizer fit together, is wrong.

    Example::

        print(export_onnx("runs/run_0/checkpoints/best.ckpt", "served"))
        load_session("served").run(["logits"], dict(tokenizer(["Fine."], return_tensors="np")))
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    _check_numbers(opset, max_length, tolerance)
    _check_precision(precision, gate)
    parts = open_source(source, head=head, tokenizer=tokenizer, members=members)
    if labels:
        parts = {name: replace(part, head=_relabelled(part.head, labels)) for name, part in parts.items()}
    if settings and len(parts) > 1:
        raise ValueError("settings: the source has several heads, and settings are of one: export each by itself")
    parts = {
        name: replace(part, head=with_reading_settings(part.head, part.tokenizer, settings))
        for name, part in parts.items()
    }
    if gate is not None and len(parts) > 1:
        raise TypeError(f"gate: {parts[next(iter(parts))].source} has several heads: export each by itself")
    for part in parts.values():
        _check_model(part.model)
        check_depth(part.model)
        _check_tokenizer(part.model, part.tokenizer)
        if gate is not None and part.module is None:
            raise TypeError(f"gate: {part.source} has no metrics to be judged by: give a module of lightning_ft")
    with atomic_folder(out, replace=is_export) as folder:
        reports = {
            name: _export(part, source, folder / name, precision, gate, opset, max_length, tolerance, progress)
            for name, part in parts.items()
        }
        known = {name: training_of(source, part.original) for name, part in parts.items()}
        if "" not in reports:
            reports = {
                name: seal(folder / name, found, Path(out) / name, **known[name]) for name, found in reports.items()
            }
        report = seal(folder, reports[""], out, **known[""]) if "" in reports else seal(folder, _together(reports), out)
    log.info("wrote %s\n%s", out, report)
    return report


def _export(
    part: Exportable,
    source: str | os.PathLike[str] | nn.Module,
    folder: Path,
    precision: Precision,
    gate: Gate | None,
    opset: int,
    max_length: int,
    tolerance: float,
    progress: Callable[[str], None],
) -> Report:
    """One graph, with its companions, into a folder of its own."""
    onnx = require("onnx")
    model, head = part.model, part.head
    folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    with ExitStack() as stack:
        for either in part.models:
            stack.enter_context(inference_state(either))
        graphs, probes = prepare(part, max_length=max_length)
        expected = reference(part, probes)
        samples = graphs.samples(probes)
        exporters = set()
        for name, wrapper in graphs.files.items():
            inputs = ", ".join(_shortened(samples[name]))
            progress(f"exporting {type(model).__name__} to {name}: inputs {inputs}, opset {opset}")
            with attention(model, "eager"):
                exporters.add(write_graph(wrapper.eval(), samples[name], folder / name, opset=opset, progress=progress))
            onnx.checker.check_model(folder / name)
        exported = time.perf_counter()
        progress(f"comparing {len(probes)} shapes in ONNX Runtime")
        sessions = {name: open_graph(folder / name) for name in graphs.files}
        rows = check(graphs, sessions, probes, expected, tolerance=tolerance)
        proof = graphs.prove(sessions, probes, error=max(row["absolute"] for row in rows))
    del sessions
    trials: list[dict[str, Any]] = []
    if gate is not None and part.module is not None:
        trials = gate.reduce(folder, graphs, precision, part.module, progress=progress)
    save_companions(folder, part)
    facts = {
        "model": type(model).__name__,
        "source": provenance(source, part.original),
        **({"baked": list(part.baked)} if part.baked else {}),
        **({"members": len(model.members)} if isinstance(model, Ensemble) else {}),
        **({"averaged": mean} if (mean := averaged(source)) else {}),
        "task": head.task,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "inputs": _of_files({name: list(samples[name]) for name in graphs.files}),
        "outputs": _of_files({name: list(wrapper.outputs) for name, wrapper in graphs.files.items()}),
        "labels": len(head.labels),
        "precision": precision,
        **({"gate": trials} if trials else {}),
        "exporter": " and ".join(sorted(exporters)),
        "opset": opset,
        "max_length": max_length,
        "tolerance": tolerance,
        "worst absolute difference": max(row["absolute"] for row in rows),
        "worst relative difference": max(row["relative"] for row in rows),
        **({"written alike": proof} if proof else {}),
        "export_seconds": round(exported - started, 2),
        "parity_seconds": round(time.perf_counter() - exported, 2),
        "versions": {name: require(name).__version__ for name in ("torch", "transformers", "onnx", "onnxruntime")},
    }
    return Report(f"Exported {type(model).__name__} to ONNX", facts, rows)


def _together(reports: Mapping[str, Report]) -> Report:
    """Of several heads: their facts by task, and all rows."""
    rows = [{"task": name, **row} for name, report in reports.items() for row in report.rows]
    return Report("Exported to ONNX", {name: report.facts for name, report in reports.items()}, rows)


def _of_files(facts: Mapping[str, Any]) -> Any:
    """By file, where there are several."""
    return facts if len(facts) > 1 else next(iter(facts.values()))


def _shortened(names: Iterable[str]) -> list[str]:
    """Without the caches of all layers but the first."""
    return [name for name in names if "." not in name or ".0." in name]


def _check_numbers(opset: int, max_length: int, tolerance: float) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {opset}: 20 suits every runtime we know")
    if max_length < MIN_LENGTH:
        raise ValueError(f"max_length: expected {MIN_LENGTH} tokens or more, got {max_length}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a relative error between 0 and 1, got {tolerance}: 1e-5 suits float32")


def _check_precision(precision: Precision, gate: Gate | None) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(get_args(Precision))}")
    if (precision == "fp32") != (gate is None):
        raise ValueError(
            f"gate={gate!r} with precision={precision!r}: a graph in fewer bits is judged on validation data, and one "
            "in fp32 needs no other judge than its shapes. Give both, or neither"
        )


def _check_model(model: nn.Module) -> None:
    dtypes = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
    if dtypes:
        raise ValueError(f"model: expected float32 weights, got {', '.join(sorted(dtypes))}: call model.float() first")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"model: expected all weights on one device, got {', '.join(sorted(devices))}: load it whole")


def _check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    config = getattr(model, "config", None)
    pads = tokenizer.pad_token_id if config is None else config.pad_token_id
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != pads:
        # A decoder finds the token it classifies by this id, with no error when it is another one.
        raise ValueError(
            "tokenizer: expected the padding id of the model's config, got "
            f"tokenizer.pad_token_id={tokenizer.pad_token_id}, model.config.pad_token_id={pads}: "
            "set tokenizer.pad_token (a decoder's may be tokenizer.eos_token), then "
            "model.config.pad_token_id = tokenizer.pad_token_id"
        )
    if config is None:
        return
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if largest >= rows:
        raise ValueError(
            f"tokenizer: expected ids below the model's {rows} embeddings, got {largest}: give the tokenizer it was "
            "trained with, or call model.resize_token_embeddings(len(tokenizer)) before training"
        )


def _relabelled(head: Head, labels: Sequence[str]) -> Head:
    if isinstance(labels, str) or len(set(labels)) != len(labels) or len(labels) != len(head.labels):
        raise ValueError(
            f"labels: expected {len(head.labels)} different names, one for each of the model's classes, got "
            f"{labels!r}: leave it empty to take the model's own"
        )
    return replace(head, labels=tuple(labels))


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a model takes at most; None where nothing says so."""
    config = getattr(model, "config", None)
    limits = [tokenizer.model_max_length]
    with suppress(NotImplementedError):  # XLNet has no limit, and its configuration says so by raising
        limits.append(getattr(config, "max_position_embeddings", None))
    embedding = getattr(getattr(model, "base_model", None), "embeddings", None)
    offset = getattr(embedding, "padding_idx", None)
    # RoBERTa-like models count positions from the one after padding's on.
    if limits[-1] and isinstance(offset, int) and hasattr(embedding, "position_embeddings"):
        limits[-1] -= offset + 1
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1_000_000]
    return min(known, default=None)


def save_companions(folder: Path, part: Exportable) -> None:
    """Write configuration, tokenizer, ``head.json`` and, where it knows the task, ``predictor.py``."""
    config = copy.deepcopy(getattr(part.model, "config", None))
    if config is not None:
        config.architectures = [type(getattr(part.model, "first", part.model)).__name__]
        if labels := part.head.labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
        config.save_pretrained(folder)
    part.tokenizer.save_pretrained(folder)
    from lightning_ft.data.encoding import Padding

    padding = Padding.of(part.tokenizer)
    known = {
        **part.head.as_json(),
        "padding": {"token": padding.token, "token_type": padding.token_type, "left": padding.left},
        "max_length": longest_input(part.model, part.tokenizer),
    }
    if part.tokenizer.truncation_side != "right":
        known["truncation_side"] = part.tokenizer.truncation_side
    text = json.dumps(known, ensure_ascii=False, indent=2)
    (folder / "head.json").write_text(text + "\n", encoding="utf-8")
    if part.tokenizer.is_fast and part.head.task in READERS:
        (folder / "predictor.py").write_text(bundle("lightning_ft.export.predictor"), encoding="utf-8")
