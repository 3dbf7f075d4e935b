"""Entities in texts, or the tags of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_ft.export.reading.reader import Exported, Item, Part, Reader, shown
from lightning_ft.export.reading.texts import as_floats, softmax
from lightning_ft.export.reading.tokens import check_texts, open_tokenizer
from lightning_ft.functional.entity_reading import read_entities
from lightning_ft.functional.word_windows import word_windows


class EntityReader(Reader):
    """``{"entities"}`` of a text; of a list of words also ``"tags"``; ``"words"`` of a text where tags have no scheme.

    A text that is longer than ``max_length`` lies in windows that share ``stride`` tokens (by default a quarter of
    ``max_length``), and each word is read where it has most context.
    """

    defaults: ClassVar = {"scheme": None, "types": None, "table": None, "max_length": 128, "stride": None}

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.graph = exported.open_graph("model.onnx")
        self.tokenizer = open_tokenizer(exported.place)
        self.max_length = exported.max_length or 128
        stride = self.settings["stride"]
        self.stride: int = self.max_length // 4 if stride is None else stride
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(False)
        if not 0 <= self.stride < room:
            raise ValueError(
                f"max_length={self.max_length} leaves {room} tokens of text in a window, of which stride={self.stride} "
                "would be those of the one before: give a smaller stride or a greater max_length"
            )
        self._outside = exported.labels.index("O") if "O" in exported.labels else 0

    def encode(self, row: Any, where: str) -> Item:
        """A text or ``{"text"}``, a list of words or ``{"tokens"}``."""
        if isinstance(row, Mapping):
            cell = row["tokens"] if "tokens" in row else row.get("text")
        else:
            cell = list(row) if isinstance(row, tuple) else row
        expected = "a text, a list of words, or a mapping with text or tokens"
        if not isinstance(cell, str | list):
            raise TypeError(f"{where}: expected {expected}, got {shown(row)}")
        check_texts(where, row, cell if isinstance(cell, list) else [cell], expected)
        found = word_windows([cell], [0], self.tokenizer.encode_batch, self.max_length, self.stride)
        columns = [found[name] for name in ("input_ids", "token_type_ids", "words")]
        if not len(columns[0][0]):
            raise ValueError(f"{where}: the tokenizer makes no token of it: give a text")
        # Marks below 0 are of words that another window has more context for.
        parts = [Part([ids], [types], marks.clip(min=0)) for ids, types, marks in zip(*columns, strict=True)]
        offsets = list(zip(found["starts"][0].tolist(), found["ends"][0].tolist(), strict=True))
        return Item(parts, (cell, offsets))

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """Of each window the numbers of the words that it tells, their tags, and the tags' probabilities."""
        logits = as_floats(self.graph.run(["logits"], self.close_up(parts, self.graph.inputs))[0])
        found = []
        for row, part in zip(logits, parts, strict=True):
            [at] = part.known.nonzero()
            shares = softmax(row[self.columns(part.width, logits.shape[1])][at])
            found.append((part.known[at] - 1, shares.argmax(-1), shares.max(-1)))
        return found

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        cell, offsets = item.row
        # A word without a token is outside.
        tags, scores = [self._outside] * len(offsets), [0.0] * len(offsets)
        for numbers, chosen, shares in outputs:
            for word, tag, share in zip(numbers.tolist(), chosen.tolist(), shares.tolist(), strict=True):
                tags[word], scores[word] = tag, share
        text = cell if isinstance(cell, str) else " ".join(cell)
        names = [self.exported.labels[tag] for tag in tags]
        if self.settings["table"] is None:
            words = [
                {"label": name, "text": text[start:end], "start": start, "end": end, "score": score}
                for name, (start, end), score in zip(names, offsets, scores, strict=True)
            ]
            return {"words": words} if isinstance(cell, str) else {"words": words, "tags": names}
        found = read_entities(tags, scores, offsets, text, self.settings["types"], self.settings["table"])
        return {"entities": found} if isinstance(cell, str) else {"entities": found, "tags": names}
