"""Against the official script's definitions, transcribed, and torchmetrics on SQuAD 1.1."""

from __future__ import annotations

import collections
import json
import re
import string
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.text

from lightning_ft.metrics.squad import Squad, best_threshold, normalize_answer, squad_scores

# ---- evaluate-v2.0.py, with dictionaries by question as there


def o_normalize(s: str) -> str:
    s = "".join(ch for ch in s.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", s).split())


def o_f1(a_gold: str, a_pred: str) -> float:
    gold_toks = o_normalize(a_gold).split() if a_gold else []
    pred_toks = o_normalize(a_pred).split() if a_pred else []
    common = collections.Counter(gold_toks) & collections.Counter(pred_toks)
    num_same = sum(common.values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(pred_toks)
    recall = 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


def o_raw(preds: dict, golds: dict) -> tuple[dict, dict]:
    exact, f1 = {}, {}
    for qid, answers in golds.items():
        gold_answers = [a for a in answers if o_normalize(a)]
        if not gold_answers:
            gold_answers = [""]
        exact[qid] = max(int(o_normalize(a) == o_normalize(preds[qid])) for a in gold_answers)
        f1[qid] = max(o_f1(a, preds[qid]) for a in gold_answers)
    return exact, f1


def o_threshold(scores: dict, na_probs: dict, has_ans: dict, thresh: float) -> dict:
    return {qid: float(not has_ans[qid]) if na_probs[qid] > thresh else s for qid, s in scores.items()}


def o_best(preds: dict, scores: dict, na_probs: dict, has_ans: dict) -> tuple[float, float]:
    num_no_ans = sum(1 for k in has_ans if not has_ans[k])
    cur_score = num_no_ans
    best_score = cur_score
    best_thresh = 0.0
    for qid in sorted(na_probs, key=lambda k: na_probs[k]):
        cur_score += scores[qid] if has_ans[qid] else -1 if preds[qid] else 0
        if cur_score > best_score:
            best_score = cur_score
            best_thresh = na_probs[qid]
    return 100.0 * best_score / len(scores), best_thresh


def official(preds: list, golds: list, nulls: list | None = None, thresh: float = 1.0) -> dict[str, float]:
    p, g = dict(enumerate(preds)), dict(enumerate(golds))
    has_ans = {k: bool(v) for k, v in g.items()}
    na = dict(enumerate(nulls)) if nulls is not None else dict.fromkeys(p, 0.0)
    raw = dict(zip(("exact", "f1"), o_raw(p, g), strict=True))
    out = {}
    for name, scores in raw.items():
        final = o_threshold(scores, na, has_ans, thresh)
        out[name] = 100.0 * sum(final.values()) / len(final)
        if not all(has_ans.values()):
            for prefix, value in (("has_ans", True), ("no_ans", False)):
                part = [final[k] for k in final if has_ans[k] == value]
                if part:
                    out[f"{prefix}_{name}"] = 100.0 * sum(part) / len(part)
            if nulls is not None:
                out[f"best_{name}"], out[f"best_{name}_thresh"] = o_best(p, scores, na, has_ans)
    return out


# ---- data

TEXTS = [
    "the Eiffel Tower",
    "Eiffel",
    "tower, the",
    "in 1889",
    "1889.",
    "café",
    "CAFÉ",
    "the",
    "a.",
    "東京 tower",
    "",
    "!",
]


def rows(count: int, *, seed: int = 0, answerable: float = 0.6) -> tuple[list[str], list[list[str]], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def pick() -> str:
        return TEXTS[int(torch.randint(len(TEXTS), (1,), generator=generator))]

    predictions = [pick() for _ in range(count)]
    has = (torch.rand(count, generator=generator) < answerable).tolist()
    answers = [[pick() for _ in range(1 + i % 3)] if yes else [] for i, yes in enumerate(has)]
    return predictions, answers, torch.randn(count, generator=generator)


def measured(metric: Squad) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("seed", range(4))
def test_predictions_as_they_are_score_as_the_official_script_has_it(seed: int) -> None:
    predictions, answers, _ = rows(200, seed=seed)
    metric = Squad()
    for part in range(0, 200, 30):
        metric.update(predictions[part : part + 30], answers[part : part + 30])
    assert measured(metric) == pytest.approx(official(predictions, answers), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_are_the_official_ones(seed: int) -> None:
    predictions, answers, nulls = rows(200, seed=seed)
    # The best span of a row is never empty, and where a row has no answer it is wrong, to the official search. Half of
    # the answers are right: where answering nothing is best, the official threshold is 0 and does not do that.
    predictions = [a[0] if a and i % 2 else p for i, (p, a) in enumerate(zip(predictions, answers, strict=True))]
    predictions = [p if normalize_answer(p) else "tower" for p in predictions]
    nulls -= torch.tensor([2.0 * bool(a) for a in answers])
    expected = official(predictions, answers, nulls.tolist(), thresh=0.3)
    metric = Squad(threshold=0.3)
    metric.update(predictions, answers, nulls)
    assert measured(metric) == pytest.approx(expected, rel=1e-5)
    tuned = Squad(threshold=None)
    tuned.update(predictions, answers, nulls)
    results = measured(tuned)
    assert results["f1"] == pytest.approx(expected["best_f1"], rel=1e-5)
    assert results["best_f1_thresh"] == pytest.approx(expected["best_f1_thresh"], rel=1e-5)
    fixed = Squad(threshold=results["best_f1_thresh"])
    fixed.update(predictions, answers, nulls)
    assert measured(fixed) == pytest.approx(results)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_gives_its_score_also_among_ties(seed: int) -> None:
    predictions, answers, nulls = rows(60, seed=seed, answerable=0.3)
    nulls = (nulls * 2).round()
    has = {i: bool(a) for i, a in enumerate(answers)}
    _, f1 = o_raw(dict(enumerate(predictions)), dict(enumerate(answers)))

    def score(threshold: float) -> float:
        values = o_threshold(f1, dict(enumerate(nulls.tolist())), has, threshold).values()
        return sum(values) / len(values)

    found = best_threshold(torch.tensor(list(f1.values())), nulls, torch.tensor(list(has.values())))
    best = max(score(threshold) for threshold in [-100.0, *nulls.tolist()])
    assert found.score.item() == pytest.approx(best)
    assert score(found.value.item()) == pytest.approx(best)


def test_threshold_where_answering_nothing_is_best() -> None:
    metric = Squad(threshold=None)
    metric.update(["x", "y", "z"], [[], [], ["w"]], torch.tensor([-5.0, -3.0, -4.0]))
    results = measured(metric)
    assert results["best_f1_thresh"] == -6  # the official 0.0 would answer all three
    assert results["f1"] == results["exact"] == results["best_f1"] == pytest.approx(200 / 3)


def test_without_unanswerable_rows_every_row_is_answered() -> None:
    metric = Squad(threshold=None)
    metric.update(["x", "the y"], [["x"], ["y"]], torch.tensor([50.0, -3.0]))
    assert measured(metric) == {"exact": 100, "f1": 100}


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_torchmetrics_on_squad_1(seed: int) -> None:
    predictions, answers, _ = rows(100, seed=seed, answerable=1.1)
    answers = [[a for a in row if normalize_answer(a)] or ["tower"] for row in answers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchmetrics.text.SQuAD()
    theirs.update(
        [{"id": str(i), "prediction_text": p} for i, p in enumerate(predictions)],
        [{"id": str(i), "answers": {"text": a, "answer_start": [0] * len(a)}} for i, a in enumerate(answers)],
    )
    expected = theirs.compute()
    ours = Squad()
    ours.update(predictions, answers)
    assert measured(ours) == pytest.approx(
        {"exact": expected["exact_match"].item(), "f1": expected["f1"].item()}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("prediction", "answers", "scores"),
    [
        ("", [], (1, 1)),
        ("x", [], (0, 0)),
        ("the", [], (1, 1)),  # both are nothing
        ("the", ["the"], (1, 1)),
        ("x", ["the"], (0, 0)),
        ("", ["x"], (0, 0)),
        ("x", ["the", "X!"], (1, 1)),
        ("x x y", ["x y y"], (0, 2 / 3)),
        ("Über-Straße", ["über straße"], (0, 0)),  # punctuation goes without leaving a space
        ("“x”", ["x"], (0, 0)),  # only ASCII punctuation is punctuation
        ("theatre an", ["theatre"], (1, 1)),
        ("x", ["y z", "x z"], (0, 2 / 3)),
        ("x\u00a0y", ["x y"], (1, 1)),
    ],
)
def test_single_answers(prediction: str, answers: list[str], scores: tuple[float, float]) -> None:
    assert squad_scores(prediction, answers) == pytest.approx(scores)
    exact, f1 = o_raw({0: prediction}, {0: answers})
    assert (exact[0], f1[0]) == pytest.approx(scores)


def test_normalization_of_real_answers(real_data: Path) -> None:
    lines = (real_data / "squad" / "dev.jsonl").read_text().splitlines()
    texts = {text for line in lines for text in json.loads(line)["answers"]["text"]}
    assert len(texts) > 1000
    assert all(normalize_answer(text) == o_normalize(text) for text in texts)


def test_two_processes_measure_what_one_does() -> None:
    predictions, answers, nulls = rows(50)
    whole, first, second = (Squad(threshold=None) for _ in range(3))
    for metric, part in ((whole, slice(0, 50)), (first, slice(0, 20)), (second, slice(20, 50))):
        for half in (slice(0, 10), slice(10, 50)):
            chosen: Any = [values[part][half] for values in (predictions, answers, nulls)]
            metric.update(*chosen)
    first.distributed_available_fn = lambda: True
    first.dist_sync_fn = lambda state, group: [state, torch.cat(second.rows)]
    assert measured(first) == measured(whole)


def test_rows_must_match() -> None:
    with pytest.raises(ValueError, match=r"of \(2, 1, 2\) rows: they must be of as many"):
        Squad().update(["x", "y"], [["x"]])
