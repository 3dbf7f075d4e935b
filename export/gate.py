"""The way into the folder for a graph in fewer bits: it must still do its task."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.core.report import format_table
from lightning_ft.export.extras import require
from lightning_ft.export.judge import PERCENT, Judgement, calibration_batches, graph_feed, judge, main_metric
from lightning_ft.export.parity import open_graph
from lightning_ft.export.quantize import Precision, quantizable, quantize
from lightning_ft.export.static_quantize import Calibration, calibrate

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from lightning_ft.modules import TransformerModule

DEFAULT = Calibration()
RANKED_ON = 8
"""Batches on which nodes are ranked: 38 graphs of MiniLM are run on them."""


class GateError(RuntimeError):
    """A graph in fewer bits does its task worse than its source; the message holds the table of what was tried."""


@dataclass(frozen=True)
class Gate:
    """What a graph in fewer bits is held to.

    Args:
        data: Its validation data judge the graph, by the metrics of the module's head.
        max_drop: How much of the metric may be lost, as a share: 0.005 is half a point of accuracy.
        metric: Its name, such as ``"val_f1"``; by default the one that counts for the head. More is better.
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
        path: Path,
        precision: Precision,
        module: TransformerModule,
        *,
        threads: int | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> list[dict[str, Any]]:
        """Rewrite a graph in fewer bits; the nodes that cannot bear it stay as they are.

        Where the whole graph in fewer bits loses too much, each node is left out once, and those without which the
        outputs come closest to the fp32 graph's are kept in fp32: one, two, four and so on, up to half of them.

        Args:
            path: An fp32 graph that computes what the module does; replaced when a trial passes.
            precision: What to write it in.
            module: Gives the metrics.
            threads: Of ONNX Runtime.
            progress: Is told each thing as it begins.

        Returns:
            A row for each trial, the fp32 graph first.

        Raises:
            GateError: No trial passes. ``path`` is as it was.
            ValueError: The metric is not measured.
        """
        trial = path.with_name(f"trial-{path.name}")
        nodes = quantizable(require("onnx").load(path), precision)
        progress(f"judging the fp32 graph on {type(self.data).__name__}")
        reference = judge(module, self.data, open_graph(path, threads=threads))
        rows = [self._row("fp32", 0, path, reference, reference, module)]
        ranges = None
        if precision == "int8-static":
            ranges = self._calibrate(path, module, threads, progress)
        ranked: list[str] = []
        kept = 0
        try:
            while True:
                progress(f"judging {precision} with {kept} of {len(nodes)} nodes in fp32")
                quantize(path, trial, precision, keep=ranked[:kept], ranges=ranges)
                found = judge(module, self.data, open_graph(trial, threads=threads))
                rows.append(self._row(precision, kept, trial, found, reference, module))
                if rows[-1]["drop"] <= self.max_drop:
                    os.replace(trial, path)
                    return rows
                ranked = ranked or self._rank(
                    path, trial, precision, nodes, ranges, reference, module, threads, progress
                )
                kept = max(1, 2 * kept)
                if kept > len(nodes) / 2:
                    break
        finally:
            trial.unlink(missing_ok=True)
        table = "\n".join(format_table(rows))
        raise GateError(
            f"in {precision} the graph loses more than max_drop={self.max_drop:g} of {self._metric(module)}, with half "
            f"of its nodes in fp32, too; nothing was written. Raise max_drop, or take fp16 or fp32.\n{table}"
        )

    def _rank(
        self,
        path: Path,
        trial: Path,
        precision: Precision,
        nodes: list[str],
        ranges: Mapping[str, float] | None,
        reference: Judgement,
        module: TransformerModule,
        threads: int | None,
        progress: Callable[[str], None],
    ) -> list[str]:
        """Nodes by how close the outputs come when they alone stay in fp32, the closest first."""
        first = replace(reference, outputs=reference.outputs[:RANKED_ON])
        distances = {}
        for number, node in enumerate(nodes, 1):
            progress(f"leaving out node {number} of {len(nodes)}: {node}")
            quantize(path, trial, precision, keep=[node], ranges=ranges)
            found = judge(module, self.data, open_graph(trial, threads=threads), batches=RANKED_ON)
            distances[node] = found.distance(first)
        return sorted(nodes, key=lambda node: distances[node])

    def _calibrate(
        self, path: Path, module: TransformerModule, threads: int | None, progress: Callable[[str], None]
    ) -> dict[str, float]:
        names = [value.name for value in require("onnx").load(path, load_external_data=False).graph.input]
        split, batches = calibration_batches(self.data)
        progress(f"calibrating on the {split} data of {type(self.data).__name__}")
        feeds = (graph_feed(module, batch, names) for batch in batches)
        return calibrate(path, feeds, self.calibration, threads=threads, progress=progress)

    def _row(
        self, precision: str, kept: int, path: Path, found: Judgement, reference: Judgement, module: TransformerModule
    ) -> dict[str, Any]:
        name = self._metric(module)
        if name not in found.metrics:
            raise ValueError(f"metric={name!r} is not measured in validation; there are: {', '.join(found.metrics)}")
        scale = 100 if type(module).__name__ in PERCENT else 1
        return {
            "precision": precision,
            "nodes in fp32": kept,
            name: found.metrics[name],
            "drop": (reference.metrics[name] - found.metrics[name]) / scale,
            "agreement": found.agreement(reference),
            "distance": found.distance(reference),
            "MB": round(path.stat().st_size / 1e6, 2),
        }

    def _metric(self, module: TransformerModule) -> str:
        return self.metric or main_metric(module)
