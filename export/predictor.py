"""Texts in, answers out, from a folder that lightning_ft exported. It needs onnxruntime, tokenizers and numpy alone.

This file lies in the folder, too, and runs by itself: ``python predictor.py rows.jsonl``, or ``Predictor()("A text")``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ft.export.readers import READERS
from lightning_ft.export.reading.graph import PROVIDERS, Graph, open_graph
from lightning_ft.export.reading.reader import Exported, Part, Reader
from lightning_ft.export.reading.writing import PromptReader, SourceReader

TASKS = tuple(READERS)


class Predictor:
    """An exported model that takes texts, and gives what ``lightning-ft predict`` writes.

    A row and its answer, by task:

    - text-classification: a text, a pair of texts, or ``{"text", "text_pair"}``; ``label``, ``score`` and
      ``probabilities``, for regression ``score``.
    - token-classification: a text or ``{"text"}``, words as a list in the list of rows or as ``{"tokens"}``;
      ``entities``, each ``{"label", "text", "start", "end", "score"}``, and for words ``tags``. Where tags are of no
      scheme (parts of speech), ``words`` in place of ``entities``. Long texts lie in overlapping windows.
    - question-answering: ``{"question", "context"}``, or a pair; ``answer``, ``score``, ``start``, ``end``,
      ``null_score`` and ``n_best``. Long contexts lie in overlapping windows.
    - multiple-choice: ``{"context", "choices"}``; ``choice``, ``score`` and ``probabilities``.
    - fill-mask: a text with mask tokens, or ``{"text"}``; ``tokens``, for each mask the likeliest, and ``filled``.
    - cloze: a mapping with the patterns' columns, or a text where there is one column; ``label``, ``score``,
      ``probabilities`` and ``pattern_probabilities``.
    - feature-extraction: as text-classification; ``embedding``.
    - text-generation: a text or ``{"text"}``, ``{"instruction", "input"}``, or ``{"messages"}`` for the model's chat
      template (which needs jinja2); ``text``, what follows.
    - text2text-generation: a text or ``{"text"}``; ``text`` and ``score``, the mean log-probability of its tokens, in
      nats; of a model that chooses among labels ``label``, ``score`` and ``probabilities``.

    Args:
        folder: What ``lightning-ft export`` wrote; by default where this file lies.
        provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``. One that cannot run is an error: ONNX Runtime would take
            the CPU in silence.
        threads: Threads within one operator; None leaves the choice to ONNX Runtime (all cores).
        batch_size: Rows of the graph that are run at once: texts, windows of long ones, or patterns. Those of similar
            length are put together.
        max_length: Tokens that are kept of a row, or that a window has; by default, and at most, as many as the model
            takes. Where there are windows, by default what ``head.json`` says.
        truncate: Cut rows that are longer. If false, they are an error. Tasks with windows lose nothing either way.
        settings: Settings of ``head.json`` to replace, such as ``{"n_best": 3}``, or of a model that writes
            ``{"generation": {"max_new_tokens": 20, "do_sample": True}, "seed": 1}``.
        session: What runs the graph, with the two methods of an ``onnxruntime.InferenceSession`` that are used here,
            ``get_inputs()`` and ``run(names, feed)``: a graph that a server holds; for several graphs a mapping of
            their files' names to such. ``provider`` and ``threads`` then mean nothing.

    Raises:
        FileNotFoundError: The folder is not an exported one.
        RuntimeError: ONNX Runtime took another provider.
        ValueError: A number is out of range, a setting is none of the task's, or the task is none that is read here.

    Example::

        predict = Predictor("served")
        predict(["A moving film.", "Two hours of my life."])
        # [{"label": "positive", "score": 0.98, "probabilities": [0.02, 0.98]}, …]
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        truncate: bool = True,
        settings: Mapping[str, Any] | None = None,
        session: Any = None,
    ) -> None:
        place = Path(__file__).parent if folder is None else Path(folder)
        head, kind = _read_head(place, needs_graphs=session is None)
        for name, value in {"threads": threads, "batch_size": batch_size, "max_length": max_length}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self.task: str = head["task"]
        self.labels: list[str] = head["labels"]
        self.settings = _settle(kind, head["settings"], settings or {})
        self.batch_size = batch_size
        self.max_length = _longest(head["max_length"], max_length, self.settings.get("max_length"))
        held = session if isinstance(session, Mapping) else {"model.onnx": session} if session is not None else None
        if held is not None and (lacking := [name for name in kind.files if name not in held]):
            raise ValueError(f"session: it has {', '.join(held)}, and {self.task} needs {', '.join(lacking)}")
        self._reader = kind(
            Exported(
                place=place,
                task=self.task,
                labels=self.labels,
                settings=self.settings,
                padding=head["padding"],
                truncation_side=head.get("truncation_side", "right"),
                limit=head["max_length"],
                max_length=self.max_length,
                truncate=truncate,
                batch_size=batch_size,
                open_graph=lambda name: (
                    open_graph(place / name, provider, threads) if held is None else Graph(held[name])
                ),
            )
        )

    def __call__(self, rows: Any) -> Any:
        """Predict.

        Args:
            rows: A row of the task, or a list of rows.

        Returns:
            A JSON-able mapping for each row, as ``lightning-ft predict`` writes it; one mapping alone for a single row.

        Raises:
            TypeError: A row that is none of the task's.
            ValueError: A row that the model cannot read, such as one without a token.
        """
        if not isinstance(rows, list):
            return self([rows])[0]
        return self.answer(self.encode(rows))

    def encode(self, rows: Sequence[Any]) -> list[Any]:
        """Check and tokenise rows: the first half of a call, which needs no graph.

        Args:
            rows: As in a call.

        Returns:
            An item for each row, for :meth:`answer`; its type is no one else's business.

        Raises:
            TypeError: A row that is none of the task's.
            ValueError: A row that the model cannot read.
        """
        encoded = [self._reader.encode(row, f"row {number}") for number, row in enumerate(rows)]
        return [self._reader.number(item, number) for number, item in enumerate(encoded)]

    def length(self, item: Any) -> int:
        """Tokens of an item of :meth:`encode`, all its windows, choices or patterns together."""
        return sum(part.tokens for part in item.parts)

    def answer(self, items: Sequence[Any]) -> list[Any]:
        """Run items of :meth:`encode`, which may have come from several calls: the second half of a call.

        Args:
            items: What :meth:`encode` gave.

        Returns:
            A mapping for each item, as a call returns.
        """
        parts = [part for item in items for part in item.parts]
        outputs: list[Any] = [None] * len(parts)
        for chosen in self._batches(parts):
            for number, output in zip(chosen, self._reader.run([parts[i] for i in chosen]), strict=True):
                outputs[number] = output
        found = iter(outputs)
        return [self._reader.answer(item, [next(found) for _ in item.parts]) for item in items]

    def stream(self, row: Any) -> Iterator[str]:
        """Write on one row, and give each piece of the text as it comes; joined they are the text.

        Raises:
            TypeError: The model writes no texts.
            ValueError: The settings are those of a beam search, or the model chooses among labels.
        """
        if not isinstance(self._reader, PromptReader | SourceReader):
            raise TypeError(f"a model for {self.task} writes no text: call it")
        return self._reader.stream(self.encode([row])[0])

    def _batches(self, parts: Sequence[Part]) -> Iterator[list[int]]:
        """Numbers of parts that are run together: of one kind and of similar length."""
        kinds = [self._reader.kind(part) for part in parts]
        batch: list[int] = []
        for i in sorted(range(len(parts)), key=lambda i: (kinds[i], parts[i].width)):
            if batch and (len(batch) == self.batch_size or kinds[i] != kinds[batch[0]]):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def _read_head(place: Path, *, needs_graphs: bool) -> tuple[dict[str, Any], type[Reader]]:
    """What ``head.json`` says, and the reader of its task.

    Raises:
        FileNotFoundError: A file that is needed is not there.
        ValueError: There is no reader for the task.
    """
    if not (place / "head.json").is_file() and (
        tasks := sorted(file.parent.name for file in place.glob("*/head.json"))
    ):
        raise FileNotFoundError(
            f"{place} holds a model for each of {', '.join(tasks)}: give the folder of one, such as {place / tasks[0]}"
        )
    _need(place / "head.json")
    head: dict[str, Any] = json.loads((place / "head.json").read_text(encoding="utf-8"))
    if (kind := READERS.get(head["task"])) is None:
        raise ValueError(f"{place} is for {head['task']!r}, and only {', '.join(READERS)} are read here")
    if (runtime := head["settings"].get("runtime")) is not None:
        raise ValueError(f"{place} is for {runtime}, and graphs of ONNX Runtime are read here: export it to ONNX")
    for name in ("tokenizer.json", *(kind.files if needs_graphs else ())):
        _need(place / name)
    return head, kind


def _need(file: Path) -> None:
    if not file.is_file():
        why = ""
        if file.name == "tokenizer.json" and file.with_name("head.json").is_file():
            why = " (a model whose tokenizer is a slow one, written in Python, has none, and is not read here)"
        raise FileNotFoundError(f"{file} does not exist{why}: give a folder that lightning-ft export wrote")


def _settle(kind: type[Reader], written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The reader's settings."""
    known = {**kind.defaults, **written}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"settings: {', '.join(unknown)} is none of this task's: {', '.join(known) or 'it has none'}")
    grouped = {name: {**known[name], **given[name]} for name in kind.groups if name in given}
    return {**known, **given, **grouped}


def _longest(limit: int | None, given: int | None, usual: int | None) -> int | None:
    """Tokens of a row or window."""
    if given is None:
        known = [number for number in (limit, usual) if number is not None]
        return min(known, default=None)
    if limit is not None and given > limit:
        raise ValueError(f"max_length={given} is more than the {limit} tokens that the model takes")
    return given


def read_rows(text: str) -> list[Any]:
    """Rows of JSON Lines, or plain texts, one on a line; empty lines are left out.

    A line that begins with ``[`` or ``"`` and is no JSON is a plain text; one that begins with ``{`` must be JSON.

    Raises:
        ValueError: A line that must be JSON and is not.
    """
    rows: list[Any] = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line) if line.lstrip()[:1] in '{["' else line.removesuffix("\r"))
        except json.JSONDecodeError as error:
            if line.lstrip().startswith("{"):
                raise ValueError(f"row {len(rows)}: no JSON, {error}: {line[:60]}") from None
            rows.append(line.removesuffix("\r"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict rows of JSON Lines and write them with their predictions to standard output."""
    parser = argparse.ArgumentParser(description="Predict: a text, or a JSON object, on each line.")
    parser.add_argument("rows", nargs="?", help="file of JSON Lines or plain texts; standard input by default")
    parser.add_argument("--folder", default=Path(__file__).parent, help="exported folder")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--no-truncate", action="store_true", help="refuse rows that are too long")
    parser.add_argument("--settings", type=json.loads, help="JSON, such as '{\"n_best\": 3}'")
    chosen = parser.parse_args(arguments)
    try:
        # Not the locale's encoding: rows are UTF-8.
        text = sys.stdin.buffer.read() if chosen.rows is None else Path(chosen.rows).read_bytes()
        predict = Predictor(
            chosen.folder,
            provider=chosen.provider,
            threads=chosen.threads,
            batch_size=chosen.batch_size,
            max_length=chosen.max_length,
            truncate=not chosen.no_truncate,
            settings=chosen.settings,
        )
        answers = predict(read_rows(text.decode("utf-8-sig")))
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.exit(2, f"predictor.py: {error}\n")
    for number, answer in enumerate(answers):
        sys.stdout.buffer.write(json.dumps({"row": number, **answer}, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
