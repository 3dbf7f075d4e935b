"""Labels by the words that a language model puts into the gap of a pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_ft.core.pattern import parse_patterns
from lightning_ft.export.reading.reader import Exported, Item, Part, Reader
from lightning_ft.export.reading.texts import as_floats, softmax
from lightning_ft.export.reading.tokens import check_texts, open_tokenizer
from lightning_ft.functional.cloze_windows import Frame, cloze_windows, content_free

if TYPE_CHECKING:
    import numpy as np

UNLIMITED = 1_000_000_000


class ClozeReader(Reader):
    """``{"label", "score", "probabilities", "pattern_probabilities"}`` of a row of the patterns' columns."""

    defaults: ClassVar = {
        "patterns": [],
        "decoder": False,
        "masks": 1,
        "words": {},
        "calibrate": False,
        "mask_token": None,
        "before": [],
        "after": [],
        "contexts": [],
        "context_room": 0,
    }

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported)
        if not self.settings["patterns"] or not self.settings["words"]:
            raise ValueError(f"{exported.place}: its head.json has no patterns or no words of labels: export it anew")
        self.graph = exported.open_graph("model.onnx")
        self.tokenizer = PlainTokenizer(exported.place, self.settings["mask_token"])
        self.patterns = parse_patterns(self.settings["patterns"])
        self.names = list(dict.fromkeys(column for pattern in self.patterns for column in pattern.columns))
        self.frame = Frame(self.settings["before"], self.settings["after"], self.settings["decoder"])
        self._bias: np.ndarray | None = None

    def encode(self, row: Any, where: str) -> Item:
        """A mapping with a text for each column of the patterns; where they have one column, also the text alone."""
        given = {self.names[0]: row} if isinstance(row, str) and len(self.names) == 1 else row
        expected = f"a mapping with {', '.join(self.names)}" + (", or a text" if len(self.names) == 1 else "")
        found = [given.get(name) if isinstance(given, Mapping) else None for name in self.names]
        texts = check_texts(where, row, found, expected)
        columns = {name: [text] for name, text in zip(self.names, texts, strict=True)}
        try:
            windows = self._windows(columns, self._room)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not self.exported.truncate and any(windows["truncated"]):
            longest = max(len(ids) for ids in self._windows(columns, UNLIMITED)["input_ids"])
            raise ValueError(
                f"{where}: in its pattern it has {longest} tokens, and max_length={self.exported.max_length}: shorten "
                "it, or set truncate=True to leave out its end"
            )
        if not all(windows["input_ids"]):
            raise ValueError(
                f"{where}: nothing stands before {{mask}} for a decoder to go on from: let the pattern begin with a "
                "word, or remove the row"
            )
        return Item(_parts(windows))

    def run(self, parts: Sequence[Part]) -> Sequence[Any]:
        """The scores of the labels in each window."""
        import numpy as np

        feed = self.close_up(parts, self.graph.inputs)
        width = feed["input_ids"].shape[1]
        begins = [self.columns(part.width, width).start for part in parts]
        feed["gap"] = np.array(
            [[begin + place for place in part.known[0]] for begin, part in zip(begins, parts, strict=True)], np.int64
        )
        feed["pattern"] = np.array([part.known[1] for part in parts], np.int64)
        return list(as_floats(self.graph.run(["scores"], feed)[0]))

    def answer(self, item: Item, outputs: Sequence[Any]) -> dict[str, Any]:
        """As the module predicts: the mean of log-probabilities over patterns and demonstrations."""
        scores = self._by_draw(outputs)
        if self.settings["calibrate"]:
            scores = _log_softmax(scores + self._calibration())
        by_pattern = scores.mean(0)
        shares = softmax(by_pattern.mean(0))
        best = int(shares.argmax())
        return {
            "label": self.exported.labels[best],
            "score": float(shares[best]),
            "probabilities": shares.tolist(),
            "pattern_probabilities": softmax(by_pattern).tolist(),
        }

    @property
    def _room(self) -> int:
        """Tokens that a filled pattern may have."""
        limit = self.exported.max_length
        if limit is None:
            return UNLIMITED
        ending = 0 if self.frame.decoder else len(self.frame.after)
        return limit - int(self.settings["context_room"]) - len(self.frame.before) - ending

    def _windows(self, columns: Mapping[str, Sequence[str]], room: int) -> dict[str, list[Any]]:
        rows = range(len(next(iter(columns.values()))))
        word = next(iter(self.settings["words"].values()))[0]
        return cloze_windows(
            *(self.patterns, self.tokenizer, self.frame, columns, rows),
            room=room,
            word=word,
            contexts=self.settings["contexts"],
        )

    def _by_draw(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Log-probabilities, ``(draws, patterns, labels)``."""
        import numpy as np

        table = np.stack(outputs)
        return _log_softmax(table).reshape(-1, len(self.patterns), table.shape[-1])

    def _calibration(self) -> np.ndarray:
        """What to add to log-probabilities, ``(draws, patterns, labels)``: −log p of inputs without content."""
        import numpy as np

        if self._bias is None:
            texts = content_free(self.settings["mask_token"])
            windows = self._windows(dict.fromkeys(self.names, texts), self._room)
            if not all(windows["input_ids"]):
                raise ValueError("calibrate shows the model an empty text: let every pattern begin with a word")
            parts, size = _parts(windows), self.exported.batch_size
            outputs = [row for at in range(0, len(parts), size) for row in self.run(parts[at : at + size])]
            shares = softmax(np.stack(outputs))
            mean = shares.reshape(len(texts), -1, len(self.patterns), shares.shape[-1]).mean(0)
            self._bias = -np.log(np.maximum(mean, 1e-6))
        return self._bias


class PlainTokenizer:
    """As much of transformers' interface as patterns are encoded with.

    Args:
        place: The exported folder.
        mask_token: What stands in a gap.
    """

    is_fast = True

    def __init__(self, place: Path, mask_token: str | None) -> None:
        self.mask_token = mask_token
        self._tokenizer: Any = open_tokenizer(place)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[Any]]:
        """Tokens and their characters, without special tokens."""
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return {"input_ids": [e.ids for e in encodings], "offset_mapping": [e.offsets for e in encodings]}


def _parts(windows: Mapping[str, Sequence[Any]]) -> list[Part]:
    columns = (windows[name] for name in ("input_ids", "mask_positions", "pattern"))
    return [
        Part([ids], [[0] * len(ids)], ([place for place, gap in enumerate(gaps) if gap], pattern))
        for ids, gaps, pattern in zip(*columns, strict=True)
    ]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    import numpy as np

    shifted = scores - scores.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
