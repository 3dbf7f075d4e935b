"""The way into the folder for a graph in fewer bits: it must still do its task."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.core.report import format_table
from lightning_ft.export.extras import require
from lightning_ft.export.judge import Judgement, calibration_batches, drop, judge, main_metric
from lightning_ft.export.parity import open_graph
from lightning_ft.export.quantize import Precision, quantizable, quantize
from lightning_ft.export.static_quantize import Calibration, watch

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from lightning_ft.export.graphs import Graphs
    from lightning_ft.modules import TransformerModule

DEFAULT = Calibration()
Node = tuple[str, str]
"""The file and the name of a node."""
Ranges = Mapping[str, Mapping[str, float]]
"""Of each file the ranges of its activations; empty but for ``int8-static``."""

RANKED_ON = 8
"""Batches on which nodes are ranked: 38 graphs of MiniLM are run on them."""


class GateError(RuntimeError):
    """A graph in fewer bits does its task worse than its source; the message holds the table of what was tried."""


@dataclass(frozen=True)
class Gate:
    """What a graph in fewer bits is held to.

    Args:
        data: Its validation data judge the graph, by the metrics of the module's head.
        max_drop: How much of the metric may be lost, as a share: 0.005 is half a point of accuracy. Of perplexity and
            losses, which shall be low, how much they may rise (:func:`lightning_ft.export.judge.drop`); four bits
            cost a decoder some 0.05.
        metric: Its name, such as ``"val_f1"``; by default the one that counts for the head.
        calibration: How ``int8-static`` finds the scales of activations: on the training data of ``data``, or on the
            validation data where there are none.

    Raises:
        ValueError: ``max_drop`` is not a share.
    """

    data: LightningDataModule
    max_drop: float = 0.005
    metric: str | None = None
    calibration: Calibration = DEFAULT

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop={self.max_drop!r} must be a share in [0, 1): 0.005 is half a point of accuracy")

    def reduce(
        self,
        folder: Path,
        graphs: Graphs,
        precision: Precision,
        module: TransformerModule,
        *,
        threads: int | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> list[dict[str, Any]]:
        """Rewrite graphs in fewer bits; the nodes that cannot bear it stay as they are.

        Where the whole graph in fewer bits loses too much, each node is left out once, and those without which the
        outputs come closest to the fp32 graph's are kept in fp32: one, two, four and so on, up to half of them.

        Args:
            folder: Where the files of the graphs lie, in fp32; replaced when a trial passes.
            graphs: What they compute, which is what the module does.
            precision: What to write it in.
            module: Gives the metrics.
            threads: Of ONNX Runtime.
            progress: Is told each thing as it begins.

        Returns:
            A row for each trial, the fp32 graph first.

        Raises:
            GateError: No trial passes. The files are as they were.
            ValueError: The metric is not measured.
        """
        nodes = _nodes(folder, graphs, precision)
        progress(f"judging the fp32 graph on {type(self.data).__name__}")
        reference = self._judge(folder, graphs, module, threads)
        rows = [self._row("fp32", 0, folder, reference, reference, module)]
        ranges = self._calibrate(folder, graphs, module, threads, progress) if precision == "int8-static" else {}
        ranked: list[Node] = []
        kept = 0
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".trial-") as name:
            trial = Path(name)
            while True:
                progress(f"judging {precision} with {kept} of {len(nodes)} nodes in fp32")
                _quantize(folder, trial, graphs, precision, ranked[:kept], ranges)
                found = self._judge(trial, graphs, module, threads)
                rows.append(self._row(precision, kept, trial, found, reference, module))
                if rows[-1]["drop"] <= self.max_drop:
                    _take(trial, folder, graphs)
                    return rows
                ranked = ranked or self._rank(
                    folder, trial, graphs, precision, nodes, ranges, reference, module, threads, progress
                )
                kept = max(1, 2 * kept)
                if kept > len(nodes) / 2:
                    break
        table = "\n".join(format_table(rows))
        raise GateError(
            f"in {precision} the graph loses more than max_drop={self.max_drop:g} of {self._metric(module)}, with half "
            f"of its nodes in fp32, too; nothing was written. Raise max_drop, or take fp16 or fp32.\n{table}"
        )

    def _judge(
        self, folder: Path, graphs: Graphs, module: TransformerModule, threads: int | None, batches: int | None = None
    ) -> Judgement:
        sessions = {name: open_graph(folder / name, threads=threads) for name in graphs.files}
        return judge(module, self.data, graphs.replacements(module, sessions), batches=batches)

    def _rank(
        self,
        folder: Path,
        trial: Path,
        graphs: Graphs,
        precision: Precision,
        nodes: list[Node],
        ranges: Ranges,
        reference: Judgement,
        module: TransformerModule,
        threads: int | None,
        progress: Callable[[str], None],
    ) -> list[Node]:
        """Nodes by how close the outputs come when they alone stay in fp32, the closest first."""
        first = replace(reference, outputs=reference.outputs[:RANKED_ON])
        distances = {}
        for number, node in enumerate(nodes, 1):
            progress(f"leaving out node {number} of {len(nodes)}: {node[1]}")
            _quantize(folder, trial, graphs, precision, [node], ranges)
            distances[node] = self._judge(trial, graphs, module, threads, RANKED_ON).distance(first)
        return sorted(nodes, key=lambda node: distances[node])

    def _calibrate(
        self,
        folder: Path,
        graphs: Graphs,
        module: TransformerModule,
        threads: int | None,
        progress: Callable[[str], None],
    ) -> Ranges:
        """What the graphs' activations are, where the module's ``forward`` is computed by them."""
        split, batches = calibration_batches(self.data)
        progress(f"calibrating on the {split} data of {type(self.data).__name__}")
        with ExitStack() as stack:
            watched = {
                name: stack.enter_context(watch(folder / name, self.calibration, threads=threads))
                for name in graphs.files
            }
            forward = graphs.replacements(module, watched)["forward"]
            for batch in self.calibration.some(batches, progress):
                forward(batch)
        return {name: graph.ranges() for name, graph in watched.items()}

    def _row(
        self, precision: str, kept: int, folder: Path, found: Judgement, reference: Judgement, module: TransformerModule
    ) -> dict[str, Any]:
        name = self._metric(module)
        if name not in found.metrics:
            raise ValueError(f"metric={name!r} is not measured in validation; there are: {', '.join(found.metrics)}")
        return {
            "precision": precision,
            "nodes in fp32": kept,
            name: found.metrics[name],
            "drop": drop(module, name, reference.metrics[name], found.metrics[name]),
            "agreement": found.agreement(reference),
            "distance": found.distance(reference),
            "MB": round(sum(file.stat().st_size for file in folder.glob("*.onnx*")) / 1e6, 2),
        }

    def _metric(self, module: TransformerModule) -> str:
        return self.metric or main_metric(module)


def _nodes(folder: Path, graphs: Graphs, precision: Precision) -> list[Node]:
    onnx = require("onnx")
    return [
        (name, node)
        for name in graphs.files
        for node in quantizable(onnx.load(folder / name, load_external_data=False), precision)
    ]


def _quantize(
    folder: Path, trial: Path, graphs: Graphs, precision: Precision, keep: list[Node], ranges: Ranges
) -> None:
    for file in trial.iterdir():
        file.unlink()
    for name in graphs.files:
        kept = [node for file, node in keep if file == name]
        quantize(folder / name, trial / name, precision, keep=kept, ranges=ranges.get(name))


def _take(trial: Path, folder: Path, graphs: Graphs) -> None:
    """The files of a trial in place of those that are there; nobody reads the folder yet."""
    for file in folder.glob("*.onnx*"):
        file.unlink()
    for file in trial.iterdir():
        os.replace(file, folder / file.name)
