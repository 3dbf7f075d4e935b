"""What an exported folder says of itself: its files, its version, and the weights that it came from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ft.core.anchor import Anchor
from lightning_ft.core.files import sha256
from lightning_ft.core.report import Report

REPORT = "report.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt")
"""Files of weights in a folder that is a source."""


def read_report(folder: str | os.PathLike[str]) -> Report | None:
    """The report that an export left in its folder; None where there is none."""
    try:
        known = json.loads((Path(folder) / REPORT).read_text(encoding="utf-8"))
        report = Report(known["title"], known["facts"], known["rows"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return report if report.title.startswith("Exported") and isinstance(report.facts, dict) else None


def is_export(folder: Path) -> bool:
    """Whether a folder was written by an export, so that the next one may replace it."""
    return read_report(folder) is not None


def seal(folder: Path, report: Report, out: str | os.PathLike[str]) -> Report:
    """Write ``report.json``, the last file of an export, with the version and the size and hash of every other.

    Args:
        folder: Where the other files are.
        report: What was done.
        out: Where the folder will be: an export that lies there is the version before.

    Returns:
        The report with these facts.
    """
    before = read_report(out)
    number = 0 if before is None else before.facts.get("version", 1)
    facts = {
        **report.facts,
        "version": number + 1,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": {name: describe(path) for name, path in files_of(folder).items()},
    }
    sealed = Report(report.title, facts, report.rows)
    (folder / REPORT).write_text(sealed.to_json() + "\n", encoding="utf-8")
    return sealed


def files_of(folder: Path) -> dict[str, Path]:
    """Every file of a folder but its ``report.json``, by its name relative to the folder."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(REPORT, None)
    return found


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def provenance(source: str | os.PathLike[str] | nn.Module, model: nn.Module) -> dict[str, Any]:
    """What a served folder is traced to its weights by.

    Args:
        source: What was exported, a path or a module.
        model: The model that it held.

    Returns:
        ``path``, absolute, and ``files``, the SHA-256 of each file of weights there; of a module ``class`` instead;
        ``fingerprint``, of the parameters (:meth:`lightning_ft.core.anchor.Anchor.fingerprint`), and
        ``weights_sha256`` (:func:`weights_sha256`), which say the same of a module and of the file it was saved to.
    """
    # References alone: nothing is copied.
    fingerprint = Anchor({name: p.detach() for name, p in model.named_parameters()}).fingerprint()
    weights = {"fingerprint": fingerprint, "weights_sha256": weights_sha256(model.state_dict())}
    if isinstance(source, nn.Module):
        return {"class": type(source).__name__, **weights}
    path = Path(source).absolute()
    found: Iterable[Path] = [path] if path.is_file() else (file for kind in WEIGHTS for file in path.glob(kind))
    return {"path": str(path), "files": {file.name: sha256(file) for file in sorted(found)}, **weights}


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex digest of names, types, shapes and values, whatever the order: one tensor after another, without a copy.

    Args:
        state: Such as a ``state_dict``, on any device.

    Example:
        >>> one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> weights_sha256(one.state_dict()) == weights_sha256(other.state_dict())
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # What is contiguous and in main memory is read where it is.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
