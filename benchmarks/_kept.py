"""Results of finished runs, kept in a folder, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ft.core.files import atomic_file


def kept(folder: Path | None, name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` gave under this name, now or before.

    Args:
        folder: Where results are kept; None to keep none. Empty it when the code has changed.
        name: Says everything that the result depends on.
        run: Gives a JSON-able result.
    """
    file = None if folder is None else folder / f"{name}.json"
    if file is not None and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    result = run()
    print(f"{name}: {result}", flush=True)
    if file is not None:
        with atomic_file(file) as path:
            path.write_text(json.dumps(result), encoding="utf-8")
    return result
