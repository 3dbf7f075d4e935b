"""Span corruption: lengths of the original code, the text restored, uniform partitions, sentinels looked up."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from lightning_ft.functional.span_corruption import corrupted_lengths, raw_length, sentinel_ids, span_corruption
from tests.pretrained import tokenizer

SENTINELS = list(range(1000, 1100))
EOS = 1


def restore(inputs: list[int], targets: list[int]) -> list[int]:
    """The text, from inputs with the spans of the targets put back."""
    assert (inputs[-1], targets[-1]) == (EOS, EOS)
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= 1000:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    return [token for piece in inputs[:-1] for token in (spans[piece] if piece >= 1000 else [piece])]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 141, 568])
@pytest.mark.parametrize("noise", [0.15, 0.5, 0.9])
def test_merging_inputs_and_targets_restores_the_text(length: int, noise: float) -> None:
    for seed in range(10):
        ids = torch.randint(2, 1000, (length,))
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = span_corruption(ids, SENTINELS, EOS, noise=noise, generator=generator)
        assert restore(inputs.tolist(), targets.tolist()) == ids.tolist()
        assert (len(inputs), len(targets)) == corrupted_lengths(length, noise=noise)
        used = [token for token in inputs.tolist() if token >= 1000]
        assert used == SENTINELS[: len(used)] == [token for token in targets.tolist() if token >= 1000]
        # Text first, no two spans side by side: each sentinel of the inputs follows a token of text.
        if length > 1:
            assert all(before < 1000 <= token or token < 1000 for before, token in pairwise(inputs))
            assert inputs[0] < 1000


def test_lengths_are_those_of_the_authors_code() -> None:
    def authors(inputs_length: int, noise: float, mean: float) -> tuple[int, int]:
        # text-to-text-transfer-transformer, `random_spans_helper`, Apache-2.0.
        def lengths(tokens_length: int) -> tuple[int, int]:
            noise_tokens = round(tokens_length * noise)
            noise_spans = round(noise_tokens / mean)
            return tokens_length - noise_tokens + noise_spans + 1, noise_tokens + noise_spans + 1

        tokens_length = inputs_length
        while lengths(tokens_length + 1)[0] <= inputs_length:
            tokens_length += 1
        return tokens_length, lengths(tokens_length)[1]

    for inputs_length in (64, 128, 256, 512, 1024):
        for noise, mean in ((0.15, 3.0), (0.15, 8.0), (0.3, 3.0)):
            raw = raw_length(inputs_length, noise=noise, mean_span=mean)
            found = (raw, corrupted_lengths(raw, noise=noise, mean_span=mean)[1])
            assert found == authors(inputs_length, noise, mean)
    assert (raw_length(512), raw_length(128)) == (568, 141)
    assert (corrupted_lengths(568), corrupted_lengths(141)) == ((512, 114), (128, 29))


def test_all_partitions_are_equally_likely() -> None:
    # 8 tokens, 4 of them noise in 2 spans: text and spans are each 1+3, 2+2 or 3+1, so 9 outcomes.
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(2, 10)
    draws = 4500
    counts = Counter(
        tuple(span_corruption(ids, SENTINELS, EOS, noise=0.5, mean_span=2.0, generator=generator)[0].tolist())
        for _ in range(draws)
    )
    assert len(counts) == 9
    deviation = (draws / 9 * 8 / 9) ** 0.5
    assert all(abs(count - draws / 9) < 4 * deviation for count in counts.values())


def test_the_generator_decides() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return span_corruption(torch.arange(2, 200), SENTINELS, EOS, generator=generator)[0].tolist()

    assert draw(1) == draw(1) != draw(2)


def test_type_is_kept() -> None:
    inputs, targets = span_corruption(torch.arange(2, 30, dtype=torch.int32), SENTINELS, EOS)
    assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int32)


def test_sentinels_are_looked_up() -> None:
    words = tokenizer("t5")
    assert sentinel_ids(words) == words.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    words.add_tokens(["dermatology"])  # which shifts those who count from the vocabulary's end
    assert words.convert_ids_to_tokens(sentinel_ids(words)) == [f"<extra_id_{i}>" for i in range(20)]
    with pytest.raises(ValueError, match="has no sentinel tokens"):
        sentinel_ids(tokenizer("bert"))


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (0, {}, r"one row of one token or more, got the shape \(0,\)"),
        (9, {"noise": 0.0}, "noise=0.0 must lie between 0 and 1"),
        (9, {"noise": 1.0}, "noise=1.0 must lie between 0 and 1"),
        (9, {"mean_span": 0.5}, "mean_span=0.5 must be 1 token or more"),
        (3000, {}, "3000 tokens make 150 spans, and there are 100 sentinels"),
    ],
)
def test_what_cannot_be_is_refused(length: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        span_corruption(torch.zeros(length, dtype=torch.int64), SENTINELS, EOS, **options)
    with pytest.raises(ValueError, match="inputs_length=1 has no room"):
        raw_length(1)
