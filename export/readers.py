"""Which reader reads which task."""

from __future__ import annotations

from lightning_ft.export.reading.reader import Reader
from lightning_ft.export.reading.texts import ChoiceReader, FeatureReader, TextReader

READERS: dict[str, type[Reader]] = {
    "text-classification": TextReader,
    "multiple-choice": ChoiceReader,
    "feature-extraction": FeatureReader,
}
