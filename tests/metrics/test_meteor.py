"""METEOR against NLTK's, numbers worked by hand, and all alignments of short texts."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest

from lightning_ft.metrics import meteor
from lightning_ft.metrics.meteor import METEOR, meteor_score
from lightning_ft.metrics.porter import porter_stem


class NoWordNet:
    def synsets(self, word: str) -> list[str]:
        return []


def test_stems_are_nltks(real_data: Path) -> None:
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer(mode="MARTIN_EXTENSIONS")
    text = (real_data / "scitldr" / "dev.jsonl").read_text() + (real_data / "grimm" / "train.jsonl").read_text()
    words = set(re.findall(r"[a-z]+", text.lower()))
    assert len(words) > 5000
    assert {word: porter_stem(word) for word in words} == {word: porter.stem(word) for word in words}


def test_scores_are_nltks_where_the_alignment_is_no_choice(real_data: Path) -> None:
    nltk = pytest.importorskip("nltk.translate.meteor_score")
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer(mode="MARTIN_EXTENSIONS")
    lines = (real_data / "scitldr" / "dev.jsonl").read_text().splitlines()[:80]
    rows = [json.loads(line) for line in lines]
    higher = equal = 0
    for row in rows:
        text, reference = (meteor._words(part) for part in (row["source"][:150], row["target"]))
        theirs = nltk.single_meteor_score(reference, text, stemmer=porter, wordnet=NoWordNet())
        ours = meteor_score(text, reference)
        stems = [[porter_stem(word.lower()) for word in words] for words in (text, reference)]
        shared = set(stems[0]) & set(stems[1])
        if all(part.count(stem) == 1 for part in stems for stem in shared):
            assert ours == pytest.approx(theirs, abs=1e-12)
            equal += 1
        assert ours >= theirs - 1e-12
        higher += ours > theirs + 1e-12
    assert equal > 10
    assert higher > 0  # NLTK takes the last place of a word, whatever its neighbours are


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1 - 0.5 * (1 / 6) ** 3),
        # All words, in the other order: 2 chunks of 4 words.
        ("on mat the cat", "the cat on mat", 1 - 0.5 * (2 / 4) ** 3),
        # P = 1/2, R = 1/3: mean 1/6 / (0.45 + 0.0333...); one chunk of one word.
        ("a dog", "the dog barks", 0.5 * (1 / 6) / (0.9 / 2 + 0.1 / 3)),
        ("Cats", "cat", 0.5),
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
    ],
)
def test_scores_by_hand(text: str, reference: str, expected: float) -> None:
    assert meteor_score(text.split(), reference.split()) == pytest.approx(expected)


def test_parameters_of_the_first_paper() -> None:
    """Banerjee and Lavie's own: F = 10PR / (R + 9P), penalty 0.5·(chunks / matches)³."""
    text, reference = "the president then spoke to the audience", "the president spoke to the audience"
    # The paper's worked example of chunks: "the president" and "spoke to the audience".
    precision, recall = 6 / 7, 1
    expected = (10 * precision * recall / (recall + 9 * precision)) * (1 - 0.5 * (2 / 6) ** 3)
    assert meteor_score(text.split(), reference.split()) == pytest.approx(expected)


def test_alignments_have_the_fewest_chunks_of_all() -> None:
    numbers = random.Random(0)
    for _ in range(300):
        made, wanted = (numbers.choices("abc", k=numbers.randint(1, 6)) for _ in range(2))
        pairs = meteor._align(made, wanted)
        count, chunks = _best(made, wanted)
        assert len(pairs) == count
        assert all(made[i] == wanted[j] for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == count
        assert _chunks(pairs) == chunks


def _best(made: list[str], wanted: list[str]) -> tuple[int, int]:
    """Matches and chunks of the best of all alignments."""
    best = (0, 0)
    for places in itertools.product([None, *range(len(wanted))], repeat=len(made)):
        pairs = [(i, j) for i, j in enumerate(places) if j is not None]
        if len({j for _, j in pairs}) == len(pairs) and all(made[i] == wanted[j] for i, j in pairs):
            best = max(best, (len(pairs), -_chunks(pairs)))
    return best[0], -best[1]


def _chunks(pairs: list[tuple[int, int]]) -> int:
    return sum(n == 0 or (pairs[n - 1][0] + 1, pairs[n - 1][1] + 1) != pair for n, pair in enumerate(pairs))


def test_repeated_words_do_not_explode() -> None:
    assert meteor_score(["the"] * 128, ["the"] * 40 + ["end"]) > 0.5


def test_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Synset:
        def __init__(self, name: str) -> None:
            self.name = lambda: name

    class WordNet:
        def synsets(self, word: str) -> list[Synset]:
            return [Synset("car.n.01")] if word in ("car", "automobile") else []

    monkeypatch.setattr(meteor, "_wordnet", WordNet)
    meteor._synsets.cache_clear()
    text, reference = ["my", "car", "stops"], ["my", "automobile", "stopped"]
    assert meteor_score(text, reference, synonyms=True) == pytest.approx(1 - 0.5 / 27)
    assert meteor_score(text, reference) == pytest.approx((1 - 0.5) * 2 / 3)
    metric = METEOR(synonyms=True)
    metric.update(["my car stops"], [["my automobile stopped"]])
    assert metric.compute().item() == pytest.approx(1 - 0.5 / 27)
    meteor._synsets.cache_clear()


def test_synonyms_without_wordnet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nltk.corpus", None)
    with pytest.raises(ImportError, match=r"pip install nltk; python -m nltk\.downloader wordnet"):
        METEOR(synonyms=True)
