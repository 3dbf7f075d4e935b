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

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]  # they make encoders slower on a CPU
TASKS = ("text-classification", "multiple-choice", "feature-extraction")


class Predictor:
    """An exported model that takes texts.

    Args:
        folder: What ``lightning-ft export`` wrote; by default where this file lies.
        provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``. One that cannot run is an error: ONNX Runtime would take
            the CPU in silence.
        threads: Threads within one operator; None leaves the choice to ONNX Runtime (all cores).
        batch_size: Rows that are run at once; rows of similar length are put together.
        max_length: Tokens that are kept of a row; by default, and at most, as many as the model takes.
        session: What runs the graph, with the two methods of an ``onnxruntime.InferenceSession`` that are used here,
            ``get_inputs()`` and ``run(names, feed)``: a graph that a server holds. ``provider`` and ``threads`` then
            mean nothing.

    Raises:
        FileNotFoundError: The folder is not an exported one.
        RuntimeError: ONNX Runtime took another provider.
        ValueError: A number is out of range, or the task is none that is read here.

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
        session: Any = None,
    ) -> None:
        place = Path(__file__).parent if folder is None else Path(folder)
        for name in ("head.json", "tokenizer.json", *(("model.onnx",) if session is None else ())):
            if not (place / name).is_file():
                raise FileNotFoundError(f"{place / name} does not exist: give a folder that lightning-ft export wrote")
        head = json.loads((place / "head.json").read_text(encoding="utf-8"))
        self.task: str = head["task"]
        self.labels: list[str] = head["labels"]
        self.settings: dict[str, Any] = head["settings"]
        self._padding: dict[str, Any] = head["padding"]
        if self.task not in TASKS:
            raise ValueError(f"{place} is for {self.task!r}, and only {', '.join(TASKS)} are read here yet")
        limit = head["max_length"]
        for name, value in {"threads": threads, "batch_size": batch_size, "max_length": max_length}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if max_length is not None and limit is not None and max_length > limit:
            raise ValueError(f"max_length={max_length} is more than the {limit} tokens that the model takes")
        self.batch_size = batch_size
        self.max_length: int | None = limit if max_length is None else max_length
        self._tokenizer = self._load_tokenizer(place)
        self._session = self._load_graph(place, provider, threads) if session is None else session
        self._inputs = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, rows: Any) -> Any:
        """Predict.

        Args:
            rows: A text, a pair of texts, or a list of them. For multiple choice a mapping with ``context`` and
                ``choices``, or a list of such. Mappings with ``text`` and ``text_pair`` are taken for texts, too.

        Returns:
            What ``lightning-ft predict`` writes, a mapping for each row: ``label``, ``score`` and ``probabilities``;
            for regression ``score``; for multiple choice ``choice``, ``score`` and ``probabilities``; ``embedding``
            where the model has no head. One mapping alone for a single row.

        Raises:
            TypeError: A row that is none of these.
            ValueError: A row without a text.
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
            TypeError: A row that is none of those a call takes.
            ValueError: A row without a text.
        """
        return [self._pairs(row, number) for number, row in enumerate(rows)]

    def answer(self, items: Sequence[Any]) -> list[Any]:
        """Run items of :meth:`encode`, which may have come from several calls: the second half of a call.

        Args:
            items: What :meth:`encode` gave.

        Returns:
            A mapping for each item, as a call returns.
        """
        found: list[Any] = [None] * len(items)
        for chosen in self._batches(items):
            for number, answer in zip(chosen, self._run([items[i] for i in chosen]), strict=True):
                found[number] = answer
        return found

    # ---- rows

    def _pairs(self, row: Any, number: int) -> list[Any]:
        """The encoded texts of a row: one, or one for each choice."""
        if self.task == "multiple-choice":
            texts = self._choices(row, number)
        elif isinstance(row, Mapping):
            texts = [(row.get("text"), row.get("text_pair"))]
        else:
            texts = [tuple(row) if isinstance(row, tuple | list) and len(row) == 2 else (row, None)]
        for text, pair in texts:
            if not isinstance(text, str) or not (pair is None or isinstance(pair, str)):
                given = row if len(repr(row)) < 80 else f"{repr(row)[:77]}..."
                raise TypeError(f"row {number}: expected a text, a pair of texts or a mapping of them, got {given}")
        encoded = [self._tokenizer.encode(*(part for part in pair if part is not None)) for pair in texts]
        if not all(part.ids for part in encoded):
            raise ValueError(f"row {number}: the tokenizer makes no token of it: give a text")
        return encoded

    @staticmethod
    def _choices(row: Any, number: int) -> list[tuple[Any, Any]]:
        choices = row.get("choices") if isinstance(row, Mapping) else None
        if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
            raise TypeError(f"row {number}: expected a mapping with context and choices, two or more")
        return [(row.get("context"), choice) for choice in choices]

    def _batches(self, items: Sequence[list[Any]]) -> Iterator[list[int]]:
        """Numbers of rows that are run together: of similar length, with as many choices."""
        lengths = [max(len(part.ids) for part in item) for item in items]
        order = sorted(range(len(items)), key=lambda i: (len(items[i]), lengths[i]))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) == self.batch_size or len(items[i]) != len(items[batch[0]])):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    # ---- the graph

    def _run(self, items: list[list[Any]]) -> list[dict[str, Any]]:
        import numpy as np

        parts = [part for item in items for part in item]
        width = max(len(part.ids) for part in parts)
        columns = {
            "input_ids": ([part.ids for part in parts], self._padding["token"]),
            "attention_mask": ([[1] * len(part.ids) for part in parts], 0),
            "token_type_ids": ([part.type_ids for part in parts], self._padding["token_type"]),
        }
        feed = {}
        for name in self._inputs:
            values, value = columns[name]
            table = np.full((len(parts), width), value, np.int64)
            for row, ids in enumerate(values):
                begin = width - len(ids) if self._padding["left"] else 0
                table[row, begin : begin + len(ids)] = ids
            shape = (len(items), len(items[0]), width) if self.task == "multiple-choice" else table.shape
            feed[name] = table.reshape(shape)
        if self.task == "feature-extraction":
            return [{"embedding": row.tolist()} for row in self._session.run(["embedding"], feed)[0]]
        logits = self._session.run(["logits"], feed)[0].astype(np.float32)
        return [self._answer(row) for row in logits]

    def _answer(self, logits: Any) -> dict[str, Any]:
        import numpy as np

        problem = self.settings.get("problem", "single_label")
        if problem == "regression":
            return {"score": float(logits[0])}
        if problem == "multi_label":
            shares = 1 / (1 + np.exp(-logits))
            label: Any = [name for name, share in zip(self.labels, shares, strict=True) if share > 0.5]
        else:
            powers = np.exp(logits - logits.max())
            shares = powers / powers.sum()
            best = int(shares.argmax())
            label = best if self.task == "multiple-choice" else self.labels[best]
        name = "choice" if self.task == "multiple-choice" else "label"
        return {name: label, "score": float(shares.max()), "probabilities": shares.tolist()}

    # ---- files

    def _load_tokenizer(self, place: Path) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        tokenizer.no_padding()
        if self.max_length is None:
            tokenizer.no_truncation()
        else:
            strategy = "only_first" if self.task == "multiple-choice" else "longest_first"
            tokenizer.enable_truncation(self.max_length, strategy=strategy)
        return tokenizer

    @staticmethod
    def _load_graph(place: Path, provider: str, threads: int | None) -> Any:
        import onnxruntime as ort

        if provider not in PROVIDERS:
            raise ValueError(f"provider={provider!r}: expected one of {', '.join(PROVIDERS)}")
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            raise RuntimeError(
                f"provider={provider!r}: this onnxruntime has {', '.join(ort.get_available_providers())}"
            )
        off = SLOW_FUSIONS if provider == "cpu" else []
        path = str(place / "model.onnx")
        session = ort.InferenceSession(path, options, providers=[wanted], disabled_optimizers=off)
        if (used := session.get_providers()[0]) != wanted:
            raise RuntimeError(f"provider={provider!r} cannot run here: ONNX Runtime took {used}")
        return session


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict rows of JSON Lines and write them with their predictions to standard output."""
    parser = argparse.ArgumentParser(description="Predict: a text, or a JSON object, on each line.")
    parser.add_argument("rows", nargs="?", help="file of JSON Lines or plain texts; standard input by default")
    parser.add_argument("--folder", default=Path(__file__).parent, help="exported folder")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int)
    chosen = parser.parse_args(arguments)
    text = sys.stdin.read() if chosen.rows is None else Path(chosen.rows).read_text(encoding="utf-8")
    rows = [json.loads(line) if line[:1] in '{["' else line for line in text.splitlines() if line.strip()]
    predict = Predictor(
        chosen.folder,
        provider=chosen.provider,
        threads=chosen.threads,
        batch_size=chosen.batch_size,
        max_length=chosen.max_length,
    )
    for number, answer in enumerate(predict(rows)):
        print(json.dumps({"row": number, **answer}, ensure_ascii=False))


if __name__ == "__main__":
    main()
