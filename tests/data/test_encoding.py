"""What is found again on the disk, and what is not; what leaves no room for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from datasets import Dataset

from lightning_ft.data import encoding
from lightning_ft.data.classification import ClassificationData
from lightning_ft.data.encoding import encode_once
from lightning_ft.data.seq2seq import Seq2SeqData
from tests.pretrained import tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(words: Any) -> bool:
    """Whether a text was encoded, and not found."""
    calls = []

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        calls.append(1)
        return {"input_ids": [[1]] * len(batch["text"])}

    encode_once(Dataset.from_dict({"text": ["a film"]}).data.table, encode, words, ["a task"], "Tokenising")
    return bool(calls)


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_everything_that_decides_tokens_decides_what_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        words = tokenizer("bert")
        if kind == "slow":
            monkeypatch.setattr(type(words), "is_fast", False)
        return words

    assert encoded(make())
    assert not encoded(make())
    used = make()
    used(["a", "a film"], padding=True, truncation=True, max_length=3)  # leaves its marks in the tokenizer
    used.padding_side = "left"
    assert not encoded(used)
    for name, value in (
        ("mask_token", "[UNK]"),
        ("eos_token", "[SEP]"),
        ("split_special_tokens", True),
        ("truncation_side", "left"),
        ("model_input_names", ["input_ids"]),
        ("src_lang", "de"),
    ):
        changed = make()
        setattr(changed, name, value)
        assert encoded(changed), name
        assert not encoded(changed), name


def test_what_another_version_encoded_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer("bert")
    assert encoded(words)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "version", lambda package: f"{package} 99")
        assert encoded(words)
        assert not encoded(words)
    assert not encoded(words)
    monkeypatch.setattr(encoding, "_FORMAT", encoding._FORMAT + 1)
    assert encoded(words)


def test_folders_that_differ_in_how_they_read_special_tokens(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["the film [MASK] is dull"], "label": ["a"]})
    ids = []
    for name, split in (("whole", False), ("parts", True)):
        words = tokenizer("bert")
        words.save_pretrained(tmp_path / name)
        settings = tmp_path / name / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "split_special_tokens": split}))
        assert hf.AutoTokenizer.from_pretrained(tmp_path / name).split_special_tokens == split
        data = ClassificationData(str(tmp_path / name), predict=rows)
        data.setup("predict")
        [batch] = data.predict_dataloader()
        ids.append(batch["input_ids"][0].tolist())
    assert words.mask_token_id in ids[0]
    assert words.mask_token_id not in ids[1]


@pytest.mark.parametrize(
    ("length", "pair", "special"), [(1, None, 2), (2, None, 2), (3, "label", 3), (3, None, 0), (4, "label", 0)]
)
def test_a_length_without_room_for_text_is_refused(length: int, pair: str | None, special: int, tmp_path: Path) -> None:
    tokenizer("bert").save_pretrained(tmp_path)
    rows = Dataset.from_dict({"text": ["the film is dull"] * 2, "label": ["a", "b"]})
    data = ClassificationData(str(tmp_path), predict=rows, text_pair=pair, label="none", max_length=length)
    if special:
        message = f"max_length={length} leaves no room for text beside {special} special tokens: raise it"
        with pytest.raises(ValueError, match=message):
            data.setup("predict")
        return
    data.setup("predict")
    [batch] = data.predict_dataloader()
    assert batch["input_ids"].shape == (2, length)


def test_a_target_length_without_room_for_text_is_refused(tmp_path: Path) -> None:
    tokenizer("bart").save_pretrained(tmp_path)
    rows = Dataset.from_dict({"source": ["the film"], "target": ["a story"]})
    with pytest.raises(ValueError, match="max_target_length=2 leaves no room for text beside 2 special tokens"):
        Seq2SeqData(str(tmp_path), rows, max_target_length=2).setup("fit")


@pytest.mark.parametrize("name", ["max_length", "batch_size", "eval_batch_size", "pad_to_multiple_of"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value} must be 1 or more"):
        ClassificationData("-", **{name: value})


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_workers=-1 must be 0 \(this process loads\) or more"):
        ClassificationData("-", num_workers=-1)
