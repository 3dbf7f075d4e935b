"""A fine-tuned model as a Hugging Face folder that was opened again and holds the same weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_ft.core.files import atomic_folder, sha256
from lightning_ft.core.report import Report
from lightning_ft.export.bake import baked, core_model
from lightning_ft.export.heads import read_models
from lightning_ft.export.manifest import is_export, provenance, seal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_hf(source: str | os.PathLike[str] | nn.Module, out: str | os.PathLike[str]) -> Report:
    """Write safetensors, configuration and tokenizer as the Auto classes open them.

    The folder is opened again, and every tensor compared to the bit, before it appears. A module of several heads
    becomes a folder for each task.

    Args:
        source: A Lightning checkpoint of a lightning_ft module, a Hugging Face folder, or a module of either.
        out: Folder to create, or an earlier export to replace, which is kept as ``OUT.previous``
            (:func:`lightning_ft.core.folders.atomic_folder`).

    Returns:
        A row for each folder: class, parameters, bytes and the weights' SHA-256; also written to ``report.json``.

    Raises:
        FileExistsError: ``out`` is a file, or a folder with content that is no export.
        FileNotFoundError: There is no such source.
        RuntimeError: What was written is not what is in the source.
        TypeError: The source is a module of neither kind.

    Example::

        export_hf("runs/run_0/checkpoints/best.ckpt", "mine")
        AutoModelForSequenceClassification.from_pretrained("mine")
    """
    from transformers import PreTrainedModel

    from lightning_ft.modules import TransformerModule

    rows, sources = [], {}
    with atomic_folder(out, replace=is_export) as folder:
        for name, (part, tokenizer) in read_models(source).items():
            model, done = baked(core_model(part.model if isinstance(part, TransformerModule) else part))
            if not isinstance(model, PreTrainedModel):
                raise TypeError(
                    f"source: expected a module of lightning_ft or of transformers, got {type(part).__name__}: give "
                    "its inner Hugging Face model"
                )
            place = folder / name
            model.save_pretrained(place)
            if tokenizer is not None:
                tokenizer.save_pretrained(place)
            _check(model, place)
            sources[name] = provenance(source, model)
            row = {"task": name} if name else {}
            rows.append(
                {
                    **row,
                    "model": type(model).__name__,
                    "parameters": model.num_parameters(),
                    "baked": ", ".join(done),
                    "tokenizer": tokenizer is not None,
                    "bytes": sum(file.stat().st_size for file in place.iterdir()),
                    "sha256": " ".join(sha256(file)[:16] for file in sorted(place.glob("*.safetensors"))),
                }
            )
        facts = {"source": sources[""]} if "" in sources else {n: {"source": found} for n, found in sources.items()}
        return seal(folder, Report("Exported to a Hugging Face folder", facts, rows), out)


def _check(model: PreTrainedModel, folder: Path) -> None:
    """That a reader gets the same tensors."""
    again = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).state_dict()
    before = model.state_dict()
    different = sorted(name for name in before.keys() | again.keys() if not _equal(before.get(name), again.get(name)))
    if different:
        raise RuntimeError(
            f"{type(model).__name__}: what from_pretrained reads differs from the model in {', '.join(different[:5])}"
            f"{' …' if len(different) > 5 else ''}: nothing was written. Remove parametrisations and adapters first"
        )


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.cpu(), other)
