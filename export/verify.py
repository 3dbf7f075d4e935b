"""Whether an exported folder still is what was written, and what it was written from."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_ft.core.report import Report, format_table
from lightning_ft.export.compare import compare
from lightning_ft.export.graphs import MODEL
from lightning_ft.export.heads import open_source
from lightning_ft.export.manifest import describe, files_of, provenance, read_report
from lightning_ft.export.parity import open_graph

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_ft.export.heads import Exportable, Head

log = logging.getLogger(__name__)

PARITY = ("fp32", "fp16")
"""Precisions whose outputs are near enough to the source's to be compared; fewer bits are judged by their task."""
FP16_TOLERANCE = 1e-2


class VerificationError(RuntimeError):
    """A folder is not what was exported; the message holds the table of what differs."""


def verify(
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | nn.Module | None = None,
    head: Head | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    members: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    progress: Callable[[str], None] = log.info,
) -> Report:
    """Check an exported folder: each file's size and hash, that its graph loads, and that it has the inputs recorded.

    With a ``source`` its weights must also be those that were exported, to the bit, and the outputs are compared on
    the shapes of the export again; a graph in fewer bits than fp16 is not compared, since it was judged by its task.

    Args:
        folder: What :func:`lightning_ft.export.export_onnx` or :func:`lightning_ft.export.export_hf` wrote.
        source: What it was made of.
        head: As it was given to the export.
        tokenizer: As it was given to the export.
        members: As they were given to the export.
        progress: Is told each thing as it begins.

    Returns:
        The version, and a row for each file. Files that were put there later are named and not judged.

    Raises:
        FileNotFoundError: It is no exported folder.
        ParityError: The graph differs from the source's model.
        VerificationError: Something is not as it was recorded.

    Example::

        print(verify("served", source="runs/run_0/checkpoints/best.ckpt"))
    """
    place = Path(folder)
    report = read_report(place)
    if report is None or "files" not in report.facts:
        raise FileNotFoundError(f"folder: {folder} has no report.json of an export with checksums: export it (again)")
    progress(f"reading {len(report.facts['files'])} files of {folder}")
    rows = _files(place, report.facts["files"])
    problems = [row for row in rows if row["found"] != "as recorded"]
    if not problems:
        graphs = {name: facts for name, facts in _parts(report).items() if "inputs" in facts}
        for name, facts in graphs.items():
            progress(f"loading {name or 'the graph'}")
            problems += _graph(place / name, facts)
    if problems:
        table = "\n".join(format_table(problems))
        raise VerificationError(
            f"{folder} is not what was exported (version {report.facts.get('version')}): export it again, or put the "
            f"files back.\n{table}"
        )
    facts = {name: report.facts[name] for name in ("version", "written") if name in report.facts}
    added = sorted(files_of(place).keys() - report.facts["files"].keys())
    if added:
        facts["added later"] = added
    if source is not None:
        parts = open_source(source, head=head, tokenizer=tokenizer, members=members)
        facts["parity"] = _compare(place, report, source, parts, progress)
    return Report(f"Verified {folder}", facts, rows)


def _parts(report: Report) -> dict[str, Mapping[str, Any]]:
    """The facts of each graph: by task for several heads, else those under ``""``."""
    several = {name: facts for name, facts in report.facts.items() if isinstance(facts, Mapping) and "source" in facts}
    return several or {"": report.facts}


def _files(place: Path, recorded: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, known in recorded.items():
        path = place / name
        if not path.is_file():
            found = "missing"
        elif (size := path.stat().st_size) != known["bytes"]:
            found = f"{size:,} bytes"
        else:
            found = "as recorded" if describe(path) == dict(known) else "another hash"
        rows.append({"file": name, "bytes": known["bytes"], "found": found})
    return rows


def _graph(place: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    several = isinstance(facts["inputs"], Mapping)
    problems = []
    for file in facts["inputs"] if several else (MODEL,):
        recorded = {kind: list(facts[kind][file] if several else facts[kind]) for kind in ("inputs", "outputs")}
        try:
            session = open_graph(place / file)
        except Exception as error:  # noqa: BLE001  ONNX Runtime's exceptions share no other base; reported by the caller
            problems.append(_row(place / file, "loads", f"{error}"))
            continue
        given = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
        found = {kind: [entry.name for entry in entries] for kind, entries in given.items()}
        problems += [_row(place / file, kind, str(found[kind])) for kind in found if found[kind] != recorded[kind]]
    return problems


def _row(graph: Path, what: str, found: str) -> dict[str, Any]:
    return {"file": f"{graph.parent.name}/{graph.name}: {what}", "bytes": 0, "found": found}


def _compare(
    place: Path,
    report: Report,
    source: str | os.PathLike[str] | nn.Module,
    parts: Mapping[str, Exportable],
    progress: Callable[[str], None],
) -> Any:
    """The worst relative difference from the source, by task for several heads."""
    recorded = _parts(report)
    worst: dict[str, Any] = {}
    if parts.keys() != recorded.keys():
        raise VerificationError(f"source: it holds {sorted(parts)}, and {place} was made of {sorted(recorded)}")
    for name, part in parts.items():
        facts = recorded[name]
        found, known = provenance(source, part.original), facts["source"]
        if found["weights_sha256"] != known["weights_sha256"]:
            rows = [{"weights of": who, **of["fingerprint"]} for who, of in (("source", found), ("folder", known))]
            table = "\n".join(format_table(rows))
            raise VerificationError(f"source: its weights are not those that {place} was made of.\n{table}")
        if facts.get("precision") not in PARITY or "inputs" not in facts:
            worst[name] = "same weights"
            continue
        tolerance = facts["tolerance"] if facts["precision"] == "fp32" else FP16_TOLERANCE
        progress(f"comparing {name or 'the graph'} with {part.source}")
        rows = compare(part, place / name, max_length=facts["max_length"], tolerance=tolerance)
        worst[name] = max(row["relative"] for row in rows)
    return worst.get("", worst)
