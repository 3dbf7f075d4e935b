"""Predictions as JSON Lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.core.files import atomic_file


class WritePredictions(BasePredictionWriter):
    """Write what ``predict_step`` returns to one file, a line for each input row, in the order of ``row``.

    ``predict_step`` must return a mapping from column name to one JSON-able value a row, as the modules of
    lightning_ft do; rows without a column ``row`` keep the order of the loader. The file is whole or absent.

    Args:
        path: The file to write or replace.

    Raises:
        TypeError: ``predict_step`` returned something else.
    """

    def __init__(self, path: str | os.PathLike[str] = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)

    @override
    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        rows = [row for batch in _batches(predictions) for row in _rows(batch)]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            # A distributed sampler repeats rows to give all ranks as many: keep one of each.
            rows = list({row.get("row", id(row)): row for part in parts for row in part}.values())
        if not trainer.is_global_zero:
            return
        if all("row" in row for row in rows):
            rows.sort(key=lambda row: row["row"])
        with atomic_file(self.path) as path, path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        rank_zero_info(f"WritePredictions: {len(rows)} rows in {self.path}")


def _batches(predictions: Sequence[Any]) -> list[Any]:
    """The batches of one loader, or of several one after the other."""
    return [batch for part in predictions for batch in (part if isinstance(part, list) else [part])]


def _rows(batch: Any) -> list[dict[str, Any]]:
    if not isinstance(batch, dict):
        raise TypeError(
            f"WritePredictions needs predict_step to return a dict of columns, one value a row; it returned a "
            f"{type(batch).__name__}"
        )
    columns = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
