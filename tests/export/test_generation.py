"""Tokens chosen in numpy against transformers' ``generate``, on the same model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from torch import Tensor

from lightning_ft.export.generation import (
    CausalDecoder,
    EncoderDecoder,
    GenerationSettings,
    generate,
    stream,
)
from tests.export.conftest import Written

NEW = 10
ENDS = tuple(range(3, 110, 4))
"""Many, so that texts of a batch end at different times."""

CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "min_length": {"min_length": 8},
    "min_new_tokens": {"min_new_tokens": 5},
    "bad_words_ids": {"bad_words_ids": ((30,), (31, 32), (19,))},
    "suppress_tokens": {"suppress_tokens": tuple(range(0, 100, 3))},
    "begin_suppress_tokens": {"begin_suppress_tokens": tuple(range(0, 100, 3))},
    "forced_eos_token_id": {"forced_eos_token_id": (3,)},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "one end": {"eos_token_id": (3,)},
    "no end": {"eos_token_id": ()},
}
BEAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "long": {"num_beams": 4, "length_penalty": 2.0},
    "short": {"num_beams": 2, "length_penalty": -1.0},
    "early": {"num_beams": 3, "early_stopping": True},
    "never early": {"num_beams": 3, "early_stopping": "never"},
}


def open_session(folder: Any, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])


def decoder_of(made: Written) -> tuple[CausalDecoder | EncoderDecoder, tuple[int, ...]]:
    if not (made.folder / "encoder.onnx").exists():
        return CausalDecoder(open_session(made.folder, "model.onnx")), ()
    start = (made.model().config.decoder_start_token_id,)
    sessions = [open_session(made.folder, f"{part}.onnx") for part in ("encoder", "decoder")]
    return EncoderDecoder(*sessions, start=start), start


def prompts(left: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 60, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(1, 4):
        mask[row, : 2 * row] = 0
    mask = mask if left else mask.flip(1)
    return ids.where(mask.bool(), 1), mask


def expected(model: Any, ids: Tensor, mask: Tensor, settings: GenerationSettings) -> Tensor:
    """What ``generate`` writes; the model's own settings would fill in what these leave open."""
    given = {name: value for name, value in settings._asdict().items() if value not in ((), None)}
    start = given.pop("decoder_start_token_id", (None,))[0]
    for name in ("top_k", "top_p", "min_p", "temperature"):
        given.pop(name)
    idle = [name for name in ("min_length", "min_new_tokens") if not given[name]]
    idle += [] if settings.num_beams > 1 else ["length_penalty", "early_stopping"]
    plain = {name: _plain(value) for name, value in given.items() if name not in idle}
    model.generation_config = hf.GenerationConfig(**plain, decoder_start_token_id=start)
    found: Tensor = model.generate(input_ids=ids, attention_mask=mask)
    return found[:, 1 if start is not None else ids.shape[1] :]


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "bart")]


@pytest.mark.parametrize("kind", ["gpt2", "t5", *OTHERS])
def test_tokens_are_those_of_generate(kind: str, written: Callable[[str], Written]) -> None:
    made = written(kind)
    model, (decoder, start) = made.model(), decoder_of(made)
    ids, mask = prompts(left=not start)
    base = GenerationSettings(max_new_tokens=NEW, eos_token_id=ENDS, pad_token_id=1, decoder_start_token_id=start)
    texts = set()
    for choice, chosen in CHOICES.items():
        # All ways to search with the plain settings, two with each of the others.
        for beams, searched in BEAMS.items() if choice == "plain" else list(BEAMS.items())[:2]:
            settings = base._replace(**chosen, **searched)
            wanted = expected(model, ids, mask, settings)
            got = generate(decoder, ids.numpy(), mask.numpy(), settings)
            assert got.tolist() == wanted.tolist(), (choice, beams)
            texts |= {tuple(row) for row in got.tolist()}
    assert len(texts) > 15  # the settings matter


def test_a_text_does_not_depend_on_its_batch(written: Callable[[str], Written]) -> None:
    decoder, _ = decoder_of(written("gpt2"))
    ids, mask = (tensor.numpy() for tensor in prompts(left=True))
    drawn = GenerationSettings(max_new_tokens=NEW, do_sample=True, temperature=2.0, eos_token_id=ENDS, pad_token_id=1)
    together = generate(decoder, ids, mask, drawn, seeds=[5, 6, 7, 8])
    assert (together != generate(decoder, ids, mask, drawn, seeds=[6, 7, 8, 9])).any()
    for row, seed in enumerate([5, 6, 7, 8]):
        alone = generate(decoder, ids[row : row + 1, 2 * row :], mask[row : row + 1, 2 * row :], drawn, seeds=[seed])
        assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()
        assert (together[row, alone.shape[1] :] == 1).all()


@pytest.mark.parametrize(
    "warped",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8},
    ],
)
def test_tokens_are_drawn_from_the_right_distribution(warped: Mapping[str, Any]) -> None:
    """Against transformers' own warpers, on scores of which every token's share is large enough to be counted."""
    scores = torch.linspace(-1, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))][None]
    config = hf.GenerationConfig(do_sample=True, **{"top_k": 0, **warped})
    warpers = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=4, n_head=1, vocab_size=12))._get_logits_processor(
        config, input_ids_seq_length=1
    )
    shares = warpers(torch.zeros(1, 1, dtype=torch.long), scores.clone()).softmax(-1)[0].numpy()
    count = 6000
    decoder = Fixed(np.repeat(scores.numpy(), count, 0))
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, **warped)
    ids = np.zeros((count, 1), np.int64)
    drawn = generate(decoder, ids, np.ones_like(ids), settings)[:, 0]  # type: ignore[arg-type]
    found = np.bincount(drawn, minlength=12) / count
    assert (found[shares == 0] == 0).all()
    assert np.abs(found - shares).max() < 0.03  # five standard errors


class Fixed:
    """A decoder that always says the same."""

    reads_prompt = True

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def begin(self, input_ids: Any, attention_mask: Any) -> Any:
        return self.logits


def test_beams_can_be_drawn(written: Callable[[str], Written]) -> None:
    """With one token left to draw from, drawing is a search."""
    decoder, _ = decoder_of(written("gpt2"))
    ids, mask = (tensor.numpy() for tensor in prompts(left=True))
    settings = GenerationSettings(max_new_tokens=NEW, num_beams=2, eos_token_id=(3,), pad_token_id=1)
    drawn = settings._replace(do_sample=True, temperature=1e-4)
    assert generate(decoder, ids, mask, drawn).shape[0] == 4
    assert (generate(decoder, ids, mask, drawn) == generate(decoder, ids, mask, drawn)).all()


def test_tokens_come_one_by_one(written: Callable[[str], Written]) -> None:
    decoder, _ = decoder_of(written("llama"))
    ids, mask = (tensor.numpy() for tensor in prompts(left=True))
    settings = GenerationSettings(max_new_tokens=NEW, eos_token_id=ENDS, pad_token_id=1)
    parts = list(stream(decoder, ids, mask, settings))
    assert (np.stack(parts, 1) == generate(decoder, ids, mask, settings)).all()
    with pytest.raises(ValueError, match="num_beams=2: a beam search knows its text at the end only"):
        next(stream(decoder, ids, mask, settings._replace(num_beams=2)))


class Foreign:
    """A session of another runtime: no binding of outputs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def run(self, names: Sequence[str], feed: Mapping[str, Any]) -> Any:
        assert all(isinstance(value, np.ndarray) for value in feed.values())
        return self._session.run(list(names), dict(feed))


def test_sessions_of_other_runtimes(written: Callable[[str], Written]) -> None:
    made = written("t5")
    decoder, start = decoder_of(made)
    foreign = EncoderDecoder(
        *(Foreign(open_session(made.folder, f"{part}.onnx")) for part in ("encoder", "decoder")), start=start
    )
    ids, mask = (tensor.numpy() for tensor in prompts(left=False))
    settings = GenerationSettings(
        max_new_tokens=NEW, num_beams=2, eos_token_id=ENDS, pad_token_id=1, decoder_start_token_id=start
    )
    assert (generate(foreign, ids, mask, settings) == generate(decoder, ids, mask, settings)).all()
