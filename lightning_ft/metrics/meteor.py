"""METEOR: word matches by form, stem and synonym, and the order they stand in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from heapq import nsmallest
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_ft.metrics.porter import porter_stem

_BEAM = 64


def meteor_score(
    text: Sequence[str],
    reference: Sequence[str],
    *,
    alpha: float = 0.9,
    beta: float = 3.0,
    gamma: float = 0.5,
    synonyms: bool = False,
) -> float:
    """METEOR of one tokenised text against one reference.

    score = (1 − γ·(chunks / m)^β) · P·R / (α·P + (1 − α)·R), with m matched words, P = m / words of the text,
    R = m / words of the reference, and chunks the runs of matches that are adjacent in both.

    Words match if they are the same, or have the same stem (:func:`porter_stem`), or, among those left over and with
    ``synonyms``, share a WordNet synset. As many words as possible are matched, and of all such alignments one with
    the fewest chunks is taken (by a beam search, exact where it meets no more than 64 alignments at a time). NLTK takes
    the last match at hand instead, and so finds as many matches, but sometimes more chunks.

    Args:
        text: Words of the text; case does not count.
        reference: Words of the reference.
        alpha: Weight of precision; with 0.9 recall weighs nine times as much.
        beta: Exponent of the penalty for fragments.
        gamma: Greatest penalty.
        synonyms: Match synonyms, which needs NLTK with its WordNet data.

    Raises:
        ImportError: ``synonyms`` without NLTK and WordNet.

    Example:
        >>> meteor_score("the cats sat".split(), "the cat sat".split())  # 0.9815 = 1 − 0.5·(1/3)³
        0.9814814814814815

    Reference:
        Banerjee and Lavie 2005, "METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with Human
        Judgments"; the parameters of Lavie and Agarwal 2007.
    """
    made, wanted = ([word.lower() for word in words] for words in (text, reference))
    pairs = _align([porter_stem(word) for word in made], [porter_stem(word) for word in wanted])
    if synonyms:
        pairs = sorted(pairs + _synonym_pairs(made, wanted, pairs))
    if not pairs:
        return 0.0
    chunks = 1 + sum((a[0] + 1, a[1] + 1) != b for a, b in pairwise(pairs))
    precision, recall = len(pairs) / len(made), len(pairs) / len(wanted)
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    return float((1 - gamma * (chunks / len(pairs)) ** beta) * mean)


class METEOR(Metric):
    """Mean :func:`meteor_score` of texts; of several references the best counts.

    Words are runs of letters and digits, and every other sign by itself.

    Args:
        synonyms: Match synonyms too, as the paper does; needs NLTK with its WordNet data. Without them scores are a
            little lower, on every machine the same.

    Example:
        >>> metric = METEOR()
        >>> metric.update(["the cats sat", "no"], [["a dog", "the cat sat"], ["yes"]])
        >>> metric.compute()
        tensor(0.4907)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    texts: Tensor

    def __init__(self, *, synonyms: bool = False) -> None:
        super().__init__()
        self.synonyms = synonyms
        if synonyms:
            _wordnet()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("texts", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts.

        Args:
            texts: The generated texts.
            references: One reference or more for each of them.
        """
        for text, known in zip(texts, references, strict=True):
            self.total += max(meteor_score(_words(text), _words(part), synonyms=self.synonyms) for part in known)
        self.texts += len(texts)

    @override
    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.total / self.texts


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _align(made: Sequence[str], wanted: Sequence[str]) -> list[tuple[int, int]]:
    """As many pairs of positions of equal words as there can be, in as few chunks as are found."""
    places: dict[str, list[int]] = {}
    for position, word in enumerate(wanted):
        places.setdefault(word, []).append(position)
    ahead = Counter(made)
    quota = {word: min(count, len(places.get(word, ()))) for word, count in ahead.items()}
    # Of alignments of the words so far: taken positions as bits, and the last word's, decide what can follow. Kept is
    # the one of the fewest chunks, then of the shortest moves; its pairs are a chain (pair, earlier pairs).
    states: dict[tuple[int, int], tuple[int, int, Any]] = {(0, -2): (0, 0, None)}
    for i, word in enumerate(made):
        ahead[word] -= 1
        spots = places.get(word, [])
        bits = sum(1 << j for j in spots)
        after: dict[tuple[int, int], tuple[int, int, Any]] = {}
        for (taken, last), (chunks, moves, pairs) in states.items():
            due = quota[word] - (taken & bits).bit_count()
            following = [
                ((taken | 1 << j, j), (chunks + (j != last + 1), moves + abs(i - j), ((i, j), pairs)))
                for j in (spots if due else [])
                if not taken >> j & 1
            ]
            if ahead[word] >= due:
                following.append(((taken, -2), (chunks, moves, pairs)))
            for key, value in following:
                if key not in after or value[:2] < after[key][:2]:
                    after[key] = value
        states = dict(nsmallest(_BEAM, after.items(), key=lambda state: state[1][:2]))
    chain = min(states.values(), key=lambda state: state[:2])[2]
    pairs = []
    while chain is not None:
        pair, chain = chain
        pairs.append(pair)
    return pairs[::-1]


def _synonym_pairs(
    made: Sequence[str], wanted: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Pairs of words not matched yet that share a synset, from the left; the nearest place counts."""
    left = sorted(set(range(len(wanted))) - {j for _, j in pairs})
    found = []
    for i in sorted(set(range(len(made))) - {i for i, _ in pairs}):
        near = [j for j in left if _synsets(made[i]) & _synsets(wanted[j])]
        if near:
            j = min(near, key=lambda j: abs(i - j))
            left.remove(j)
            found.append((i, j))
    return found


@lru_cache(maxsize=100_000)
def _synsets(word: str) -> frozenset[str]:
    return frozenset(synset.name() for synset in _wordnet().synsets(word))


def _wordnet() -> Any:
    try:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
    except (ImportError, LookupError) as error:
        raise ImportError(
            "synonyms=True needs NLTK and its WordNet data: pip install nltk; python -m nltk.downloader wordnet"
        ) from error
    return wordnet
