"""Which reader reads which task."""

from __future__ import annotations

from lightning_ft.export.reading.answers import AnswerReader
from lightning_ft.export.reading.cloze import ClozeReader
from lightning_ft.export.reading.entities import EntityReader
from lightning_ft.export.reading.masks import MaskReader
from lightning_ft.export.reading.reader import Reader
from lightning_ft.export.reading.texts import ChoiceReader, FeatureReader, TextReader
from lightning_ft.export.reading.writing import PromptReader, SourceReader

READERS: dict[str, type[Reader]] = {
    "text-classification": TextReader,
    "token-classification": EntityReader,
    "question-answering": AnswerReader,
    "multiple-choice": ChoiceReader,
    "fill-mask": MaskReader,
    "cloze": ClozeReader,
    "feature-extraction": FeatureReader,
    "text-generation": PromptReader,
    "text2text-generation": SourceReader,
}
