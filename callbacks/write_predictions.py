"""Predictions as JSON Lines."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ft.core.files import atomic_file


@runtime_checkable
class ResumablePredictions(Protocol):
    """A data module whose prediction can go on where it was interrupted; those of lightning_ft are such."""

    def prediction_identity(self) -> str:
        """Changes when the rows to predict do."""

    def skip_predicted(self, rows: Collection[int]) -> None:
        """Leave out rows, by the numbers in the column ``row``, in the next prediction."""


class WritePredictions(Callback):
    """Write what ``predict_step`` returns to one file, a line for each input row.

    ``predict_step`` must return a mapping from column name to one JSON-able value a row, as the modules of
    lightning_ft do. Lines are in the order of the loaders and, in each, of the column ``row``; where there is none, in
    the order in which they came, and not under several processes, whose rows cannot be told apart without it. The
    file is whole or absent.

    Rows are kept in a hidden file beside it as they come. A prediction that was interrupted goes on from there when it
    is started again with the same rows and the same checkpoint, if the data module is a
    :class:`ResumablePredictions`; else it begins anew.

    Args:
        path: The file to write or replace.

    Raises:
        TypeError: ``predict_step`` returned something else.
        ValueError: Several processes predict rows without a column ``row``, or a value is NaN or infinite, which JSON
            does not know.
    """

    def __init__(self, path: str | os.PathLike[str] = "predictions.jsonl") -> None:
        self.path = Path(path)
        self._rows: list[tuple[int, dict[str, Any]]] = []
        self._journal: TextIO | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The last hook before the loader is built; the data module has been set up, the weights are not loaded yet.
        self._rows, self._journal = [], None
        data = getattr(trainer, "datamodule", None)
        if stage != "predict" or not isinstance(data, ResumablePredictions):
            return
        identity = _identity(trainer, pl_module, data)
        pattern = f".{glob.escape(self.path.name)}.*.part"
        files = sorted(self.path.parent.glob(pattern)) if trainer.is_global_zero else []
        # Rank 0 decides for all: ranks that left out different rows would between them lose some.
        rows = trainer.strategy.broadcast([row for file in files for row in _read(file, identity)])
        data.skip_predicted({row["row"] for _, row in rows})
        if trainer.is_global_zero:
            self._rows = rows
            mine = self._begin(0, identity)
            for file in files:
                if file != mine:
                    file.unlink()
            if rows:
                rank_zero_info(f"WritePredictions: {len(rows)} rows are there from an interrupted prediction")
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            self._begin(trainer.global_rank, identity)

    def _begin(self, rank: int, identity: str) -> Path:
        # Whole from the start, with what was found: an interruption here loses nothing.
        journal = self.path.with_name(f".{self.path.name}.{rank}.part")
        with atomic_file(journal) as path, path.open("w", encoding="utf-8") as file:
            file.writelines(_line(item) for item in (identity, *self._rows))
        self._journal = journal.open("a", encoding="utf-8")
        return journal

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = _rows(outputs)
        if trainer.world_size > 1 and not all("row" in row for row in rows):
            raise ValueError("WritePredictions under several processes needs predict_step to return a column `row`")
        items = [(dataloader_idx, row) for row in rows]
        self._rows += items
        if self._journal is not None:
            self._journal.writelines(_line(item) for item in items)
            self._journal.flush()

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self._rows
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [item for part in parts for item in part]
        if all("row" in row for _, row in rows):
            # A distributed sampler repeats rows to give all ranks as many: keep one of each.
            rows = list({(loader, row["row"]): (loader, row) for loader, row in rows}.values())
        if trainer.is_global_zero:
            rows.sort(key=lambda item: (item[0], item[1].get("row", 0)))
            with atomic_file(self.path) as path, path.open("w", encoding="utf-8") as file:
                file.writelines(_line(row) for _, row in rows)
            rank_zero_info(f"WritePredictions: {len(rows)} rows in {self.path}")
        if self._journal is not None:
            self._journal.close()
            Path(self._journal.name).unlink()
            self._journal = None
            trainer.datamodule.skip_predicted(())  # type: ignore[attr-defined]

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._journal is not None:
            self._journal.close()


def _line(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"WritePredictions: a prediction is no JSON ({error}): {value!r}"[:500]) from None


def _read(journal: Path, identity: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a journal; none of one that another model or other data wrote."""
    rows: list[tuple[int, dict[str, Any]]] = []
    with journal.open(encoding="utf-8", errors="replace") as file:
        if file.readline() != _line(identity):
            return []
        for line in file:
            try:
                loader, row = json.loads(line)
            except ValueError:  # the last line of a process that was killed while it wrote
                break
            rows.append((loader, row))
    return rows


def _identity(trainer: Trainer, module: LightningModule, data: ResumablePredictions) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(data.prediction_identity().encode())
    digest.update(json.dumps(dict(module.hparams), sort_keys=True, default=repr).encode())
    if trainer.ckpt_path is not None:
        file = Path(trainer.ckpt_path)
        stat = file.stat() if file.exists() else None
        digest.update(repr((str(file), stat and (stat.st_size, stat.st_mtime_ns))).encode())
    else:
        sums = [p.detach().double().sum().item() for p in module.parameters()]
        digest.update(repr(sums).encode())
    return digest.hexdigest()


def _rows(outputs: Any) -> list[dict[str, Any]]:
    if not isinstance(outputs, dict):
        raise TypeError(
            "WritePredictions needs predict_step to return a dict of columns, one value a row; it returned a "
            f"{type(outputs).__name__}"
        )
    columns = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
