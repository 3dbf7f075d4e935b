"""Texts and pairs of texts: their class, their score, or what they look like to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_ft.export.reading.reader import Exported, Item, Part, Reader
from lightning_ft.export.reading.tokens import TextEncoder, check_texts, single

if TYPE_CHECKING:
    import numpy as np

A_TEXT = "a text, a pair of texts or a mapping of them"


class TextReader(Reader):
    """``{"label", "score", "probabilities"}`` of a text or a pair; for regression ``{"score"}``."""

    defaults: ClassVar = {"problem": "single_label"}

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.graph = exported.open_graph("model.onnx")
        self.tokens = TextEncoder(exported)

    def encode(self, row: Any, where: str) -> Item:
        """A text, two texts, or ``{"text", "text_pair"}``."""
        return single(self.tokens(where, *read_texts(row, where)))

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """The logits of each."""
        return list(as_floats(self.graph.run(["logits"], self.close_up(parts, self.graph.inputs))[0]))

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        [logits] = outputs
        problem, labels = self.settings["problem"], self.exported.labels
        if problem == "regression":
            return {"score": float(logits[0])}
        if problem == "multi_label":
            shares = _sigmoid(logits)
            chosen: Any = [name for name, share in zip(labels, shares, strict=True) if share > 0.5]
        else:
            shares = softmax(logits)
            chosen = labels[int(shares.argmax())]
        return {"label": chosen, "score": float(shares.max()), "probabilities": shares.tolist()}


class FeatureReader(Reader):
    """``{"embedding"}`` of a text or a pair: the mean of the last layer over its tokens."""

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.graph = exported.open_graph("model.onnx")
        self.tokens = TextEncoder(exported)

    def encode(self, row: Any, where: str) -> Item:
        """A text, two texts, or ``{"text", "text_pair"}``."""
        return single(self.tokens(where, *read_texts(row, where)))

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """The embedding of each."""
        return list(self.graph.run(["embedding"], self.close_up(parts, self.graph.inputs))[0])

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As a list of numbers."""
        return {"embedding": outputs[0].tolist()}


class ChoiceReader(Reader):
    """``{"choice", "score", "probabilities"}`` of ``{"context", "choices"}``; the choice is a number, from 0."""

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        self.graph = exported.open_graph("model.onnx")
        self.tokens = TextEncoder(exported, strategy="only_first")

    def encode(self, row: Any, where: str) -> Item:
        """A sequence of tokens for each choice."""
        choices = row.get("choices") if isinstance(row, Mapping) else None
        if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
            raise TypeError(f"{where}: expected a mapping with context and choices, two or more")
        context, *texts = check_texts(where, row, [row.get("context"), *choices], "texts as context and choices")
        for number, choice in enumerate(texts):
            self._check_room(where, number, choice, context)
        encoded = [self.tokens(where, context, choice) for choice in texts]
        return Item([Part([part.ids for part in encoded], [part.type_ids for part in encoded])])

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """The logits of each."""
        return list(as_floats(self.graph.run(["logits"], self.close_up(parts, self.graph.inputs))[0]))

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts."""
        shares = softmax(outputs[0])
        return {"choice": int(shares.argmax()), "score": float(shares.max()), "probabilities": shares.tolist()}

    def _check_room(self, where: str, number: int, choice: str, context: str) -> None:
        # The context is cut, of which one token stays; the tokenizer would panic.
        if self.tokens.limit is None:
            return
        room = self.tokens.limit - self.tokens.tokenizer.num_special_tokens_to_add(True)
        count, beside = (
            len(self.tokens.tokenizer.encode(text, add_special_tokens=False).ids) for text in (choice, context)
        )
        if count > room - bool(beside):
            raise ValueError(
                f"{where}: choice {number} has {count} tokens, and max_length={self.tokens.limit} leaves {room} for it "
                "and the context: raise max_length, or shorten it"
            )


def read_texts(row: Any, where: str) -> list[str]:
    """The text of a row, or its two."""
    if isinstance(row, Mapping):
        text, pair = row.get("text"), row.get("text_pair")
    else:
        text, pair = row if isinstance(row, tuple | list) and len(row) == 2 else (row, None)
    return check_texts(where, row, [text] if pair is None else [text, pair], A_TEXT)


def as_floats(values: np.ndarray) -> np.ndarray:
    """Outputs in fp32, whatever the graph computes in."""
    import numpy as np

    return values.astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of scores along the last axis."""
    import numpy as np

    powers = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return result


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    import numpy as np

    result: np.ndarray = 0.5 * (1 + np.tanh(0.5 * logits))  # of large numbers, exp would overflow
    return result
