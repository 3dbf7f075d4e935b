"""What every method that trains a part of a model keeps of its promises on four kinds of models. No time.

    python benchmarks/methods_table.py [--known FOLDER] [--methods NAME ...]

writes `benchmarks/results/methods.json` and `methods.md`. Cells are those of `tests/methods.py`: tiny random models
with real tokenizers, two epochs of sixteen rows with dropout, shuffling, accumulation 2 and validation in mid-epoch. A
cell that breaks a promise stops the script. To add a method, append to `METHODS` in `tests/method_rows.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from _kept import kept  # noqa: E402
from _timing import machine, save  # noqa: E402

from lightning_ft.core.files import atomic_file  # noqa: E402
from tests.method_rows import METHODS, WHY  # noqa: E402
from tests.methods import KINDS, PROPERTIES, measure  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TITLES = {
    "share": "trains of all values",
    "trains": "only what is to train moves",
    "resumes": "resumes bit for bit",
    "saves": "saved, of the base's bytes",
    "reloads": "same logits over the base",
    "merges": "merged − unmerged",
    "exports": "ONNX − PyTorch",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and below it why what is not there cannot be."""
    lines = [
        "# Methods that train a part of a model",
        "",
        "Tiny random classifiers (width 16, three blocks) of four kinds; two epochs with dropout, shuffling, "
        "accumulation 2 and validation in mid-epoch, killed on an epoch's last batch and resumed. Shares are large "
        "because the models are small. Written by `benchmarks/methods_table.py`.",
        "",
        "| method | model | " + " | ".join(TITLES.values()) + " |",
        "|" + "---|" * (2 + len(TITLES)),
    ]
    notes: list[str] = []
    for row in rows:
        cells = []
        for what in PROPERTIES:
            value = row["found"].get(what)
            if isinstance(value, dict):
                if (note := value["impossible"]) not in notes:
                    notes.append(note)
                cells.append(f"no ({notes.index(note) + 1})")
            elif value is True:
                cells.append("yes")
            else:
                cells.append(f"{100 * value:.3g} %" if what in ("share", "saves") else f"{value:.0e}")
        lines.append(f"| {row['method']} | {row['kind']} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{i}. {note}{f': {WHY[note]}' if note in WHY else ''}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", type=Path, default=None, help="folder of finished cells; empty it for new code")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for noisy in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    rows = [
        {"method": name, "kind": kind, "found": kept(options.known, f"{name} {kind}", partial(measure, method, kind))}
        for name, method in METHODS.items()
        if name in options.methods
        for kind in KINDS
    ]
    save("methods", options.results, machine=machine(), rows=rows)
    with atomic_file(options.results / "methods.md") as file:
        file.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
