"""Answers to questions, as spans of a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_ft.export.reading.reader import Exported, Item, Part, Reader, shown
from lightning_ft.export.reading.texts import as_floats
from lightning_ft.export.reading.tokens import check_texts, open_tokenizer
from lightning_ft.functional.answer_reading import AnswerWindow, read_answer
from lightning_ft.functional.context_windows import check_room, place_tokens, shorten


class AnswerReader(Reader):
    """``{"answer", "score", "start", "end", "null_score", "n_best"}`` of ``{"question", "context"}``.

    A context that is longer than fits beside the question lies in windows that share ``stride`` tokens, by default a
    third of ``max_length``.
    """

    defaults: ClassVar = {
        "n_best": 20,
        "max_answer_length": 30,
        "no_answer": True,
        "no_answer_threshold": 0.0,
        "max_length": 384,
        "stride": None,
        "context_first": False,
        "cls": None,
    }

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.graph = exported.open_graph("model.onnx")
        self.max_length = exported.max_length or 384
        stride = self.settings["stride"]
        self.stride: int = self.max_length // 3 if stride is None else stride
        self.context_first: bool = self.settings["context_first"]
        self.whole, self.windows = open_tokenizer(exported.place), open_tokenizer(exported.place)
        self.special: int = self.whole.num_special_tokens_to_add(True)
        if not 0 <= self.stride < self.max_length - self.special:
            raise ValueError(
                f"stride={self.stride} must be 0 or more and below max_length={self.max_length} less {self.special} "
                "special tokens: windows share it"
            )
        self.windows.enable_truncation(
            self.max_length,
            stride=self.stride,
            strategy="only_first" if self.context_first else "only_second",
            direction=exported.truncation_side,
        )

    def encode(self, row: Any, where: str) -> Item:
        """``{"question", "context"}``, or the two as a pair."""
        pair: Sequence[Any] = row if isinstance(row, tuple | list) else ()
        if isinstance(row, Mapping):
            pair = [row.get("question"), row.get("context")]
        if len(pair) != 2:
            raise TypeError(f"{where}: expected a mapping with question and context, or a pair, got {shown(row)}")
        question, context = check_texts(where, row, pair, "texts as question and context")
        question = question.lstrip()  # as in training
        self._check(question, context, where)
        first = self.windows.encode(*((context, question) if self.context_first else (question, context)))
        encodings = [first, *first.overflowing]
        tokens, starts, ends, outside, cls = place_tokens(
            encodings, [0] * len(encodings), [context], context_first=self.context_first, cls=self.settings["cls"]
        )
        if outside.all():
            raise ValueError(f"{where}: the tokenizer makes no token of the context {shorten(context)!r}")
        known = zip(tokens.by_window(starts), tokens.by_window(ends), cls.tolist(), strict=True)
        parts = [Part([e.ids], [e.type_ids], places) for e, places in zip(encodings, known, strict=True)]
        return Item(parts, context)

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """The logits of each window, beside the characters of its tokens."""
        outputs = self.graph.run(["start_logits", "end_logits"], self.close_up(parts, self.graph.inputs))
        starts, ends = (as_floats(values) for values in outputs)
        return [
            AnswerWindow(start[: part.width].copy(), end[: part.width].copy(), *part.known)
            for part, start, end in zip(parts, starts, ends, strict=True)
        ]

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        threshold = self.settings["no_answer_threshold"]
        return read_answer(
            item.row,
            outputs,
            n_best=self.settings["n_best"],
            max_answer_length=self.settings["max_answer_length"],
            no_answer=self.settings["no_answer"],
            no_answer_threshold=float("inf") if threshold is None else threshold,
        )

    def columns(self, length: int, width: int) -> slice:
        """On the left, whatever the tokenizer does elsewhere: as in training."""
        return slice(0, length)

    def _check(self, question: str, context: str, where: str) -> None:
        def count(text: str) -> int:
            return len(self.whole.encode(text, add_special_tokens=False).ids)

        if not (tokens := count(question)):
            raise ValueError(f"{where}: the tokenizer makes no token of the question {shorten(question)!r}")
        check_room(
            *([question], [context], [tokens], count, lambda _: where),
            max_length=self.max_length,
            special=self.special,
            stride=self.stride,
        )
