"""How near every head of every architecture stays to its model, in every precision, on tiny random models.

    python benchmarks/parity_table.py [--jobs 2] [--known FOLDER] [--quick]

writes `benchmarks/results/parity.json` and `parity.md`. The models are those of `tests/export/test_heads.py`: random
weights of a standard deviation of 0.2, which no training has made robust, so that fewer bits cost more here than in a
fine-tuned model; what they cost there is what the gate measures. To add cells, append to `CELLS`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnxruntime
import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightning_ft.core.files import atomic_file  # noqa: E402
from lightning_ft.export import export_onnx  # noqa: E402
from lightning_ft.export.compare import prepare, reference  # noqa: E402
from lightning_ft.export.graph import inference_state  # noqa: E402
from lightning_ft.export.graphs import Graphs  # noqa: E402
from lightning_ft.export.heads import open_source  # noqa: E402
from lightning_ft.export.parity import Probe, open_graph  # noqa: E402
from lightning_ft.export.quantize import Precision, quantize  # noqa: E402
from lightning_ft.export.static_quantize import Calibration, watch  # noqa: E402
from lightning_ft.modules import Architecture, Cloze  # noqa: E402
from tests.export import test_generation_export, test_heads  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MAX_LENGTH = 24
TOLERANCES = {"fp32": 1e-5, "fp16": 1e-2}
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Args:
        task: Name of the head.
        family: Name of the architecture.
        make: Gives the source and its tokenizer (None where the source holds one), or raises what makes it impossible.
        measure: Gives what is known of each precision: a row as :func:`measure` does.
    """

    task: str
    family: str
    make: Callable[[], tuple[Any, Any]]
    measure: Callable[[Any, Any], dict[str, dict[str, Any]]]

    @property
    def name(self) -> str:
        return f"{self.task} {self.family}"


CRASHES = {
    ("token-classification", "xlnet", "fp16"): "ONNX Runtime 1.31.1 (CPU) crashes when it opens the graph",
    ("question-answering", "xlnet", "fp16"): "ONNX Runtime 1.31.1 (CPU) crashes when it opens the graph",
}
"""What would end the process."""


def measure(source: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Export a source, and compare its graphs in each precision with the model."""
    (part,) = open_source(source, tokenizer=tokenizer).values()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        export_onnx(source, out, tokenizer=tokenizer, max_length=MAX_LENGTH)
        with inference_state(part.original):
            graphs, probes = prepare(part, max_length=MAX_LENGTH)
            expected = reference(part, probes)
            found = {}
            for precision in PRECISIONS:
                if reason := CRASHES.get((part.head.task, part.original.config.model_type, precision)):
                    found[precision] = {"impossible": reason}
                    continue
                try:
                    got = _run(graphs, probes, out, out / precision, precision)
                except Exception as error:  # noqa: BLE001  the table names whatever makes a cell impossible
                    found[precision] = {"impossible": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
                    continue
                masks = [probe.inputs["attention_mask"].bool() for probe in probes]
                found[precision] = _distances(got, expected, masks, graphs.per_token)
        return found


def _run(
    graphs: Graphs, probes: Sequence[Probe], out: Path, place: Path, precision: Precision
) -> list[dict[str, Tensor]]:
    """What the graphs give in a precision; static int8 is calibrated on the probes themselves."""
    place.mkdir()
    ranges: dict[str, Mapping[str, float]] = {}
    if precision == "int8-static":
        with ExitStack() as stack:
            watched = {name: stack.enter_context(watch(out / name, Calibration(), threads=1)) for name in graphs.files}
            for probe in probes:
                graphs.run(watched, probe)
        ranges = {name: graph.ranges() for name, graph in watched.items()}
    for name in graphs.files:
        quantize(out / name, place / name, precision, ranges=ranges.get(name))
    sessions = {name: open_graph(place / name, threads=1) for name in graphs.files}
    return [graphs.run(sessions, probe) for probe in probes]


def _distances(
    got: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Mapping[str, Tensor]],
    masks: Sequence[Tensor],
    per_token: Sequence[str],
) -> dict[str, Any]:
    """Over all outputs the worst difference, relative to the largest value; root mean square; equal decisions."""
    worst, squares, scale, same, decisions = 0.0, 0.0, 0.0, 0, 0
    for name in expected[0]:
        pairs = [
            (one[name][mask], other[name][mask]) if name in per_token else (one[name], other[name])
            for one, other, mask in zip(got, expected, masks, strict=True)
        ]
        largest = max(float(other.abs().max()) for _, other in pairs)
        worst = max(worst, max(float((one - other).abs().max()) for one, other in pairs) / largest)
        squares += sum(float((one - other).square().sum()) for one, other in pairs)
        scale += sum(float(other.square().sum()) for _, other in pairs)
        if name in ("logits", "scores") and pairs[0][1].shape[-1] > 1:
            same += sum(int((one.argmax(-1) == other.argmax(-1)).sum()) for one, other in pairs)
            decisions += sum(other[..., 0].numel() for _, other in pairs)
    agreement = same / decisions if decisions else None
    return {"worst": worst, "distance": (squares / scale) ** 0.5, "agreement": agreement}


def _model(task: str, family: str) -> Callable[[], tuple[Any, Any]]:
    return lambda: (test_heads.make(task, family), test_heads.tokenizer_of(family))


def _cloze(family: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        decoder = family == "gpt2"
        tokenizer = test_heads.tiny_tokenizer(types=False) if decoder else test_heads._words()
        architecture = Architecture(test_heads.make("feature-extraction", family).config, tokenizer)
        return Cloze(architecture, {"no": "w5", "yes": "w6"}, ["{text} w10 {mask}"]), None

    return make


def _causal(family: str) -> Callable[[], tuple[Any, Any]]:
    return lambda: (test_generation_export.causal(family).eval(), test_generation_export.left_tokenizer())


def _paired(family: str) -> Callable[[], tuple[Any, Any]]:
    def make() -> tuple[Any, Any]:
        config = test_heads.make("text-classification", family).config
        torch.manual_seed(0)
        return transformers.AutoModelForSeq2SeqLM.from_config(config), test_heads.tokenizer_of(family)

    return make


CELLS: list[Cell] = [
    *(Cell(task, family, _model(task, family), measure) for task, family in test_heads.CELLS),
    *(Cell("cloze", family, _cloze(family), measure) for family in ("bert", "gpt2")),
    *(Cell("text-generation", family, _causal(family), measure) for family in ("gpt2", "llama", "qwen3")),
    *(Cell("text2text-generation", family, _paired(family), measure) for family in ("t5", "bart")),
]
IMPOSSIBLE: dict[str, str] = {
    f"{task} {family}": "writes the whole text anew: no masked language model"
    if (task, family) == ("fill-mask", "bart")
    else "transformers has no such class"
    for task, families in test_heads.NO_CLASS.items()
    for family in families
}
"""By the name of the cell, why there is none."""


def row_of(cell: Cell) -> dict[str, Any]:
    """The row of a cell."""
    return {"task": cell.task, "family": cell.family, "precisions": cell.measure(*cell.make())}


def run(cells: Sequence[Cell], known: Path, jobs: int = 1) -> list[dict[str, Any]]:
    """A row for each cell, each in a process of its own, whose end ends no other.

    Args:
        cells: What to measure.
        known: A folder where rows are kept as they come: a run that was stopped goes on.
        jobs: Processes at once.

    Raises:
        RuntimeError: Cells have no row.
    """
    known.mkdir(parents=True, exist_ok=True)
    files = {cell.name: known / f"{cell.name.replace(' ', '.')}.json" for cell in cells}
    running: dict[int, str] = {}
    left = [cell for cell in cells if not files[cell.name].is_file()]
    while left or running:
        while left and len(running) < jobs:
            cell = left.pop(0)
            if (child := os.fork()) == 0:
                with atomic_file(files[cell.name]) as path:
                    path.write_text(json.dumps(row_of(cell)), encoding="utf-8")
                os._exit(0)
            running[child] = cell.name
        child, status = os.wait()
        done = sum(path.is_file() for path in files.values())
        print(f"{done}/{len(cells)} {running.pop(child)}: status {status}", file=sys.stderr, flush=True)
    if missing := [name for name, path in files.items() if not path.is_file()]:
        raise RuntimeError(f"no row for {', '.join(missing)}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in files.values()]


def markdown(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The table, and what there is no cell for."""
    head = ["task", "architecture", *PRECISIONS]
    lines = [
        "# Parity of exported graphs",
        "",
        "Tiny random models (width 32, two layers, weights of standard deviation 0.2) against PyTorch on ten shapes, "
        f"from 1x1 to {MAX_LENGTH} tokens, padded and whole. fp32 and fp16: worst difference of an output, relative to "
        "the largest one (tolerances 1e-5, 1e-2). In fewer bits: share of equal decisions on random tokens, and the "
        "root mean square of the difference over that of the outputs. Random weights bear fewer bits worse than "
        "trained ones: of a trained model, its gate decides.",
        "",
        f"Written by `benchmarks/parity_table.py`: {', '.join(f'{k} {v}' for k, v in machine.items())}.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    for row in rows:
        cells = [_cell(precision, row["precisions"].get(precision)) for precision in PRECISIONS]
        lines.append(f"| {' | '.join([row['task'], row['family'], *cells])} |")
    lines += ["", "## Cells that there are not", "", "| task | architecture | reason |", "|---|---|---|"]
    lines += [f"| {' | '.join([*name.split(), reason])} |" for name, reason in sorted(IMPOSSIBLE.items())]
    return "\n".join(lines) + "\n"


def _cell(precision: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if "impossible" in found:
        return f"impossible: {found['impossible']}".replace("|", "/")
    if (tolerance := TOLERANCES.get(precision)) is not None:
        return f"{found['worst']:.1e}{'' if found['worst'] <= tolerance else ' (above)'}"
    agreement = "" if found["agreement"] is None else f"{100 * found['agreement']:.1f} %, "
    return f"{agreement}{found['distance']:.3f}"


def main() -> None:
    """Run the cells and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--known", type=Path, help="folder where rows are kept as they come, to go on from")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(CELLS[:2] if options.quick else CELLS, options.known or Path(folder), options.jobs)
    machine = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    table = markdown(rows, machine)
    print(table)
    for name, text in (("json", json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"), ("md", table)):
        with atomic_file(options.results / f"parity.{name}") as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
