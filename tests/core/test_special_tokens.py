"""The special tokens around a text, of every kind of tokenizer."""

from __future__ import annotations

import pytest
import tokenizers as tk
import transformers as hf
from tokenizers import models, pre_tokenizers, processors

from lightning_ft.core.special_tokens import around
from lightning_ft.data.chunks import RowCutter
from tests.pretrained import tokenizer


def words_only(*vocabulary: str, framed: bool = True) -> hf.PreTrainedTokenizerFast:
    """A tokenizer that makes nothing of letters that it does not know."""
    raw = tk.Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, []))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if framed:
        raw.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def test_every_kind_of_tokenizer() -> None:
    for kind, names in (("bert", "cls sep"), ("roberta", "bos eos"), ("bart", "bos eos")):
        words = tokenizer(kind)  # type: ignore[arg-type]
        before, after = (getattr(words, f"{name}_token_id") for name in names.split())
        assert around(words) == ([before], [after])
    t5 = tokenizer("t5")
    assert around(t5) == ([], [t5.eos_token_id])
    assert around(tokenizer("gpt2")) == ([], [])


def test_a_tokenizer_that_makes_nothing_of_a_letter() -> None:
    words = words_only("[CLS]", "[SEP]", "[PAD]", "東", "京")
    assert words("a", add_special_tokens=False)["input_ids"] == []
    assert around(words) == ([0], [1])
    rows = RowCutter(words, "mlm", "documents", 8, words=False)(["東 京"], [0], last=True)
    assert rows["input_ids"].to_pylist() == [[0, 3, 4, 1]]
    assert around(words_only("[CLS]", "[SEP]", "[PAD]", "東", framed=False)) == ([], [])


def test_a_tokenizer_that_makes_nothing_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="makes no token of any text: its vocabulary is no use"):
        around(words_only("[CLS]", "[SEP]", "[PAD]"))


def test_special_tokens_inside_a_text_are_refused() -> None:
    def odd(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 5, 2, 6, 3] if add_special_tokens else [5, 6]}

    odd.name_or_path = "odd"
    with pytest.raises(ValueError, match=r"'odd' makes \[1, 5, 2, 6, 3\] of a text with special tokens and \[5, 6\]"):
        around(odd)  # type: ignore[arg-type]
