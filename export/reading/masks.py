"""What stands at the mask tokens of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning_ft.export.reading.reader import Exported, Item, Part, Reader
from lightning_ft.export.reading.texts import as_floats, softmax
from lightning_ft.export.reading.tokens import check_texts, open_tokenizer


class MaskReader(Reader):
    """``{"tokens", "filled"}`` of a text with the tokenizer's mask token in it, once or more."""

    defaults: ClassVar = {"top_k": 5, "mask": None, "before": [], "after": [], "clean_up": False}

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.graph = exported.open_graph("model.onnx")
        self.tokenizer = open_tokenizer(exported.place)
        self.mask: int | None = self.settings["mask"]
        if self.mask is None:
            raise ValueError(f"{exported.place}: its tokenizer has no mask token to fill in")
        self._frame: int = len(self.settings["before"]) + len(self.settings["after"])
        if exported.max_length is not None and exported.max_length <= self._frame:
            raise ValueError(
                f"max_length={exported.max_length} leaves no room for text beside {self._frame} special tokens"
            )

    def encode(self, row: Any, where: str) -> Item:
        """A text, or ``{"text"}``."""
        text = row.get("text") if isinstance(row, Mapping) else row
        check_texts(where, row, [text], "a text or a mapping with text")
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        limit = self.exported.max_length
        room = len(ids) if limit is None else limit - self._frame
        if len(ids) > room and not self.exported.truncate:
            raise ValueError(
                f"{where}: it has {len(ids) + self._frame} tokens, and max_length={limit}: shorten it, or set "
                "truncate=True to leave out its end"
            )
        if self.mask in ids[room:]:
            raise ValueError(
                f"{where}: a mask token stands at token {room + ids[room:].index(self.mask)} (from 0), past "
                f"max_length={limit}: shorten the text before it, or raise max_length"
            )
        framed = [*self.settings["before"], *ids[:room], *self.settings["after"]]
        if not framed:
            raise ValueError(f"{where}: the tokenizer makes no token of it: give a text")
        return Item([Part([framed], [[0] * len(framed)])])

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """Of each the likeliest tokens at each mask and their probabilities, ``(masks, top_k)``."""
        import numpy as np

        logits = self.graph.run(["logits"], self.close_up(parts, self.graph.inputs))[0]
        found = []
        for row, part in zip(logits, parts, strict=True):
            masks = np.array(part.ids[0]) == self.mask
            shares = softmax(as_floats(row[self.columns(part.width, logits.shape[1])][masks]))
            best = np.argsort(-shares, axis=-1, kind="stable")[:, : self.settings["top_k"]]
            found.append((best, np.take_along_axis(shares, best, -1)))
        return found

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        [(best, shares)] = outputs
        tokens = [
            [{"token": self._text([token]), "score": score} for token, score in zip(*pair, strict=True)]
            for pair in zip(best.tolist(), shares.tolist(), strict=True)
        ]
        fills = iter(best[:, 0].tolist())
        [ids] = item.parts[0].ids
        filled = [next(fills) if token == self.mask else token for token in ids]
        return {"tokens": tokens, "filled": self._text(filled, skip_special_tokens=True)}

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.settings["clean_up"] else text


def clean_up(text: str) -> str:
    """A text without the spaces before punctuation that decoding leaves: what transformers does where asked."""
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1])
    text = text.replace(" ' ", "'")
    for ending in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending[1:])
    return text
