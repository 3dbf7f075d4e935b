"""Texts as arrays of characters, and which of them are white space or words of their own."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Scripts without spaces: in them each token is a word.
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"}


def code_points(text: str) -> np.ndarray:
    """The number of each character, ``(characters,)``."""
    import numpy as np

    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def are_spaces(codes: np.ndarray) -> np.ndarray:
    """Which characters, by their numbers, are white space."""
    import numpy as np

    table = _space_table()
    result: np.ndarray = table[np.minimum(codes, len(table) - 1)]
    return result


@cache
def _space_table() -> np.ndarray:
    import numpy as np

    return np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last one


@cache
def is_alone(code: int) -> bool:
    """Whether no word holds the character beside others: it is punctuation, or of a script without spaces."""
    # Marks (vowels of Indic scripts, accents) and joiners belong to the letters beside them.
    letter = unicodedata.category(chr(code))[0] in "LNM" or unicodedata.category(chr(code)) == "Cf"
    return not letter or unicodedata.name(chr(code), "").split(" ")[0].split("-")[0] in _UNSPACED


def are(codes: np.ndarray, test: Callable[[int], bool]) -> np.ndarray:
    """Which characters, by their numbers, pass a test."""
    import numpy as np

    distinct, which = np.unique(codes, return_inverse=True)
    return np.array([test(int(code)) for code in distinct], bool)[which]
