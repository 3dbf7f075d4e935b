"""Proof that a graph computes what the model computes, on shapes the exporter has not seen."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_ft.core.report import format_table
from lightning_ft.export.extras import require
from lightning_ft.export.reading.graph import PROVIDERS, SLOW_FUSIONS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.export.wrappers import GraphWrapper

PROVIDER = PROVIDERS["cpu"]

ROUNDING = 4
"""How much more than rounding errors of the model's own make may be one of ONNX Runtime's. SmolLM2: 1.4 was seen."""


class ParityError(RuntimeError):
    """An exported graph does not compute what its model computes; the message holds the table of shapes."""


class Probe(NamedTuple):
    """One batch to compare on."""

    batch: int
    length: int
    padded: bool
    inputs: dict[str, Tensor]


def load_session(folder: str | os.PathLike[str], *, threads: int | None = None) -> InferenceSession:
    """Open an exported folder for inference on the CPU, with the settings measured to be fastest.

    Args:
        folder: What :func:`lightning_ft.export.export_onnx` wrote.
        threads: Threads within one operator; None leaves the choice to ONNX Runtime (all cores).

    Returns:
        The session.

    Raises:
        FileNotFoundError: ``folder`` has no ``model.onnx``.
        ImportError: onnxruntime is missing.
        ValueError: ``threads`` is below 1.
        RuntimeError: ONNX Runtime chose another provider than the CPU's.
    """
    path = Path(folder) / "model.onnx"
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected an exported folder with a model.onnx, got {folder}: run export_onnx first"
        )
    return open_graph(path, threads=threads)


def open_graph(
    path: Path, *, threads: int | None = None, fusions_off: Sequence[str] = SLOW_FUSIONS
) -> InferenceSession:
    """:func:`load_session` of a graph's own file, with some optimisers of ONNX Runtime left out."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads: expected 1 or more, or None, got {threads}")
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=[PROVIDER], disabled_optimizers=list(fusions_off))
    # A provider that cannot start is replaced in silence; a proof must know what it ran on.
    if session.get_providers() != [PROVIDER]:
        raise RuntimeError(f"expected {PROVIDER} alone, got {session.get_providers()}")
    return session


def make_probes(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], *, max_length: int, seed: int = 0
) -> list[Probe]:
    """Batches of random tokens in ten shapes, from 1x1 to ``max_length``, whole and padded.

    Ids are ordinary tokens: a random special token would end or mask a sequence in mid-text. Padding is as the
    tokenizer would write it, id and side, since decoders find their last token by the padding id. Where the
    model reads token types, the second half of each row is of type 1.

    Args:
        tokenizer: Gives the vocabulary and the padding.
        names: The graph's inputs.
        max_length: Tokens in the longest probe.
        seed: Of the generator, which is private: the global random state stays as it is.

    Returns:
        The probes.
    """
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)))
    half = max_length // 2 + 1
    shapes = [
        (1, 1, False), (3, 1, False), (2, 2, False), (1, 5, False), (2, 7, True), (4, min(33, max_length), True),
        (3, half, False), (5, half, True), (1, max_length, False), (2, max_length, True),
    ]  # fmt: skip

    def random_ids(high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(high, size, generator=generator)

    probes = []
    for batch, length, padded in shapes:
        ids = ordinary[random_ids(len(ordinary), (batch, length))]
        lengths = torch.full((batch, 1), length)
        if padded:
            lengths[1:] = 1 + random_ids(length - 1, (batch - 1, 1))
        positions = torch.arange(length).expand(batch, length)
        if tokenizer.padding_side == "left":
            positions = positions - (length - lengths)
        mask = (positions >= 0) & (positions < lengths)
        made = {
            "input_ids": ids.where(mask, torch.tensor(tokenizer.pad_token_id)),
            "attention_mask": mask.long(),
            "token_type_ids": (mask & (positions >= lengths // 2)).long(),
        }
        probes.append(Probe(batch, length, padded, {name: made[name] for name in names}))
    return probes


def run_torch(wrapper: GraphWrapper, probe: Probe) -> dict[str, Tensor]:
    """The wrapper's outputs on a probe, by name."""
    return dict(zip(wrapper.outputs, wrapper(**probe.inputs), strict=True))


def run_onnx(session: InferenceSession, probe: Probe) -> dict[str, Tensor]:
    """The graph's outputs on a probe, by name."""
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in probe.inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def check_parity(
    run: InferenceSession | Callable[[Probe], Mapping[str, Tensor]],
    probes: Sequence[Probe],
    expected: Sequence[Mapping[str, Tensor]],
    *,
    tolerance: float,
    per_token: Collection[str] = (),
    rounding: Callable[[Probe], Iterable[Mapping[str, Tensor]]] | None = None,
) -> list[dict[str, Any]]:
    """Compare a graph with its model on every probe.

    For an output y with the model's values y* the error is ``max|y - y*| / s``, where ``s = max|y*|`` over all probes:
    relative to the scale of the logits, not to single ones, which may be near zero by cancellation.

    Args:
        run: The graph, or what computes outputs of a probe with several.
        probes: What to run it on.
        expected: The model's outputs, one mapping a probe.
        tolerance: Largest error allowed.
        per_token: Outputs that are compared where the attention mask is 1 alone, and in shape.
        rounding: The model's outputs of a probe with other rounding errors, several times. It is asked where a probe
            errs by more than ``tolerance``, and allows for four times the largest error that these make: trained
            decoders magnify what rounding does to some tokens of a text, in PyTorch as in ONNX Runtime.

    Returns:
        One row a probe: batch, length, padded, absolute, relative; with ``rounding``, too, None where it was not asked.

    Raises:
        ParityError: A probe errs by more than ``tolerance`` or not by a number, gives other names or shapes, or
            cannot be run at all.
    """
    compute = run if callable(run) else partial(run_onnx, run)
    compared = [_read(values, probe, per_token) for probe, values in zip(probes, expected, strict=True)]
    scale = {name: max(float(values[name].abs().max()) for values in compared) or math.ulp(0.0) for name in expected[0]}
    rows: list[dict[str, Any]] = []
    problems, sound = [], True
    for probe, whole, wanted in zip(probes, expected, compared, strict=True):
        absolute = relative = math.inf
        try:
            got = compute(probe)
            _check_shapes(got, whole)
            absolute, relative = _difference(_read(got, probe, per_token), wanted, scale)
        except Exception as error:  # noqa: BLE001  ONNX Runtime's exceptions share no other base; reported below
            problems.append(f"{probe.batch}x{probe.length}: {error}")
        row = {"batch": probe.batch, "length": probe.length, "padded": probe.padded}
        rows.append({**row, "absolute": absolute, "relative": relative})
        noise = None
        if rounding is not None:
            if tolerance < relative < math.inf:
                others = [_read(outputs, probe, per_token) for outputs in rounding(probe)]
                noise = max(_difference(outputs, wanted, scale)[1] for outputs in others)
            rows[-1]["rounding"] = noise
        # Written so that NaN fails.
        sound = sound and relative <= max(tolerance, ROUNDING * (noise or 0.0))
    if problems or not sound:
        table = "\n".join([*format_table(rows), *problems])
        raise ParityError(
            f"the ONNX graph differs from the model by more than tolerance={tolerance:g}, relative to the largest "
            f"logit; nothing was written. Only where all of it is rounding, raise the tolerance.\n{table}"
        )
    return rows


def _read(outputs: Mapping[str, Tensor], probe: Probe, per_token: Collection[str]) -> dict[str, Tensor]:
    """What of the outputs means anything."""
    return {
        name: value[probe.inputs["attention_mask"].bool()] if name in per_token else value
        for name, value in outputs.items()
    }


def _check_shapes(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (got, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the graph gives {shapes[0]}, the model {shapes[1]}")


def _difference(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], scale: Mapping[str, float]
) -> tuple[float, float]:
    worst = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    return max(worst.values()), max(worst[name] / scale[name] for name in worst)
