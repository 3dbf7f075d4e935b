from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ft.plugins import AtomicCheckpointIO


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def breaks_off(content: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", breaks_off)
    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_temporary_file_lies_beside_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: (folders.append(file.parent), save(content, file)))
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert folders == [tmp_path]
