from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset, Features, List, Value
from tokenizers import processors

from lightning_ft.data.question_answering import QuestionAnsweringData
from lightning_ft.metrics.squad import normalize_answer
from tests.pretrained import Kind, tokenizer

CONTEXT = "  The film is a dull but well made story about people who sing in London , doesn't she ?"
ROW = {
    "id": "a",
    "question": "  what is it ?",
    "context": CONTEXT,
    "answers": {"text": ["dull but well", "dull"], "answer_start": [CONTEXT.index("dull")] * 2},
}
NONE = {**ROW, "id": "b", "question": "is she good ?", "answers": {"text": [], "answer_start": []}}


def labelled(batch: dict[str, Any]) -> dict[int, list[str]]:
    """By source row, the text of the labelled tokens of each window that holds an answer."""
    found: dict[int, list[str]] = {row: [] for row in batch["row"].tolist()}
    for w, at in enumerate(batch["example"].tolist()):
        start, end, cls = (int(batch[name][w]) for name in ("start_positions", "end_positions", "cls"))
        assert start <= end
        if start != cls:
            text = batch["context"][at][batch["char_starts"][w, start] : batch["char_ends"][w, end]]
            found[int(batch["row"][at])].append(text)
        else:
            assert end == cls
    return found


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_real_answers_come_back_from_every_window(name: str, minilm: str, real_data: Path) -> None:
    path = real_data / name / "dev.jsonl"
    data = QuestionAnsweringData(minilm, test=str(path), max_length=100, stride=40, eval_batch_size=50)
    data.setup("test")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    seen: dict[int, list[str]] = {}
    for batch in data.test_dataloader():
        seen |= labelled(batch)
        assert batch["answers"] == [lines[row]["answers"]["text"] for row in batch["row"]]
        assert batch["context"] == [lines[row]["context"] for row in batch["row"]]
    assert sorted(seen) == list(range(len(lines)))
    wrong = [
        (texts, line["answers"]["text"])
        for texts, line in ((seen[row], lines[row]) for row in seen)
        if bool(texts) != bool(line["answers"]["text"])
        or {normalize_answer(text) for text in texts} - {normalize_answer(a) for a in line["answers"]["text"][:1]}
    ]
    assert not wrong
    assert sum(len(texts) > 1 for texts in seen.values()) > 20  # answers in the part that windows share


def test_windows_are_the_tokenizers_own(minilm: str, real_data: Path) -> None:
    path = real_data / "squad_v2" / "dev.jsonl"
    data = QuestionAnsweringData(minilm, str(path), max_length=90, stride=30, batch_size=16)
    data.setup("fit")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    made = hf.AutoTokenizer.from_pretrained(minilm)
    theirs = made(
        [line["question"] for line in lines],
        [line["context"] for line in lines],
        truncation="only_second",
        max_length=90,
        stride=30,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    expected = set()
    for w, row in enumerate(theirs["overflow_to_sample_mapping"]):
        start, end = hf_positions(theirs, w, lines[row]["answers"])
        expected.add((row, start, end, *theirs["input_ids"][w]))
    got = set()
    for batch in data.train_dataloader():
        assert set(batch) == {
            *("input_ids", "token_type_ids", "attention_mask", "row", "cls", "start_positions", "end_positions")
        }
        names = ("row", "start_positions", "end_positions", "input_ids", "attention_mask")
        for row, start, end, ids, mask in zip(*(batch[name].tolist() for name in names), strict=True):
            got.add((row, start, end, *ids[: sum(mask)]))
    assert got == expected
    assert len({row for row, start, *_ in got if start}) == sum(bool(line["answers"]["text"]) for line in lines)


def hf_positions(encoded: Any, w: int, answers: Any) -> tuple[int, int]:
    """Labels as `prepare_train_features` of transformers' run_qa.py makes them, for a tokenizer whose CLS is first."""
    offsets, sequence_ids = encoded["offset_mapping"][w], encoded.sequence_ids(w)
    if len(answers["answer_start"]) == 0:
        return 0, 0
    start_char = answers["answer_start"][0]
    end_char = start_char + len(answers["text"][0])
    token_start_index = sequence_ids.index(1)
    token_end_index = len(sequence_ids) - 1 - sequence_ids[::-1].index(1)
    if not (offsets[token_start_index][0] <= start_char and offsets[token_end_index][1] >= end_char):
        return 0, 0
    while token_start_index < len(offsets) and offsets[token_start_index][0] <= start_char:
        token_start_index += 1
    while offsets[token_end_index][1] >= end_char:
        token_end_index -= 1
    return token_start_index - 1, token_end_index + 1


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("context_first", [False, True])
def test_every_kind_of_tokenizer(kind: Kind, context_first: bool, tmp_path: Path) -> None:
    made = tokenizer(kind)
    made.save_pretrained(tmp_path)
    rows = Dataset.from_list([ROW, NONE])
    data = QuestionAnsweringData(
        str(tmp_path), rows, rows, predict=rows, max_length=42, stride=20, context_first=context_first, id="id"
    )
    data.tokenizer.padding_side = "left"  # of no effect
    data.setup(None)
    [batch] = data.val_dataloader()
    width = batch["input_ids"].shape[1]
    found = labelled(batch)
    assert set(found[0]) == {"dull but well"}
    assert found[1] == []
    assert batch["attention_mask"][:, 0].all()
    special = made.cls_token_id
    cls = batch["input_ids"].gather(1, batch["cls"][:, None]).squeeze(1)
    if special is not None:
        assert (cls == special).all()
    else:  # the first token that is not the context's
        places = torch.arange(width)
        last = torch.where(batch["char_ends"] > 0, places, -1).amax(1)
        assert ((batch["cls"] > last) if context_first else (batch["cls"] == 0)).all()
    for w, at in enumerate(batch["example"].tolist()):
        text, starts, ends = batch["context"][at], batch["char_starts"][w], batch["char_ends"][w]
        assert ((starts == 0) & (ends == 0) | (starts < ends)).all()
        pieces = [text[s:e] for s, e in zip(starts, ends, strict=True) if e > 0]
        assert all(piece and piece == piece.strip() for piece in pieces)
        assert not ends[batch["attention_mask"][w] == 0].any()
        assert (int((ends > 0).long().argmax()) < 4) == context_first
    covered = {
        c
        for s, e in zip(batch["char_starts"].flatten(), batch["char_ends"].flatten(), strict=True)
        for c in range(s, e)
    }
    assert covered == {c for c, letter in enumerate(CONTEXT) if not letter.isspace()}
    assert width <= 42
    [batch] = data.predict_dataloader()
    assert set(batch) - {"token_type_ids"} == {
        *("input_ids", "attention_mask", "row", "id", "example", "cls", "char_starts", "char_ends", "context")
    }
    assert batch["id"] == ["a", "b"]
    facts = data.describe().facts
    assert (facts["training questions"], facts["without an answer"]) == (2, 1)
    assert facts["whose answer is longer than fits a window"] == 0


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("context_first", [False, True])
def test_an_answer_at_the_first_character_is_an_answer(kind: Kind, context_first: bool, tmp_path: Path) -> None:
    tokenizer(kind).save_pretrained(tmp_path)
    bare = {"context": CONTEXT.strip()}
    rows = Dataset.from_list(
        [{**ROW, **bare, "answers": {"text": ["The film"], "answer_start": [0]}}, {**NONE, **bare}]
    )
    data = QuestionAnsweringData(str(tmp_path), rows, max_length=128, stride=9, context_first=context_first)
    data.setup("fit")
    [batch] = data.train_dataloader()
    cls = torch.tensor(data.need("train").tokens.with_format(None)["cls"])[batch["row"]]
    assert ((batch["start_positions"] == cls) == (batch["row"] == 1)).all()
    assert ((batch["end_positions"] == cls) == (batch["row"] == 1)).all()


def test_cls_at_the_end(tmp_path: Path) -> None:
    """As XLNet has it; and a text that reads like it is none."""
    made = tokenizer("bert")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]", pair="$A [SEP] $B:1 [SEP]:1 [CLS]:2", special_tokens=[("[SEP]", 3), ("[CLS]", 2)]
    )
    made.save_pretrained(tmp_path)
    rows = Dataset.from_list([{**ROW, "question": "what [CLS] is ?"}, NONE])
    data = QuestionAnsweringData(str(tmp_path), val=rows, max_length=30, stride=9, context_first=True)
    data.setup("validate")
    [batch] = data.val_dataloader()
    assert (batch["cls"] == batch["attention_mask"].sum(1) - 1).all()
    found = labelled(batch)
    assert set(found[0]) == {"dull but well"}
    assert found[1] == []


def test_an_answer_that_fits_no_window_is_counted(minilm: str) -> None:
    rows = Dataset.from_list([{**ROW, "answers": {"text": [CONTEXT], "answer_start": [0]}}, ROW])
    data = QuestionAnsweringData(minilm, rows, max_length=18, stride=6)
    data.setup("fit")
    assert data.describe().facts["whose answer is longer than fits a window"] == 1


@pytest.mark.parametrize(
    ("context", "answer", "start", "text"),
    [
        ("a well made film", " well made ", 1, "well made"),  # white space around an answer is none of it
        ("a well-made film", "made", 7, "made"),
        ("the backwards film", "wards", 8, "backwards"),  # a part of a token is the whole token
        ("Café Straße is naïve", "Straße", 5, "Straße"),  # characters, not bytes
        ("\u200bwell \u200bmade\u200b", "\u200bmade\u200b", 6, "made"),  # characters of which there are no tokens
        ("𝒳 東京 film", "東京", 2, "東京"),
        ("[CLS] well", "well", 6, "well"),
        ("well", "well", 0, "well"),
    ],
)
def test_odd_answers(context: str, answer: str, start: int, text: str, minilm: str) -> None:
    row = {"question": "[CLS] what ?", "context": context, "answers": {"text": [answer], "answer_start": [start]}}
    data = QuestionAnsweringData(minilm, val=Dataset.from_list([row]), max_length=30, stride=8)
    data.setup("validate")
    [batch] = data.val_dataloader()
    assert labelled(batch) == {0: [text]}
    assert batch["cls"].tolist() == [0]


def nested(*rows: dict[str, Any]) -> dict[str, Any]:
    def answers(row: dict[str, Any]) -> list[dict[str, Any]]:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        return [{"answer_start": start, "text": text} for text, start in pairs]

    questions = [{"id": row["id"], "question": row["question"], "answers": answers(row)} for row in rows]
    for question in questions:
        if not question["answers"]:
            question |= {"is_impossible": True, "plausible_answers": [{"text": "film", "answer_start": 6}]}
    return {"version": "v2.0", "data": [{"title": "Film", "paragraphs": [{"context": CONTEXT, "qas": questions}]}]}


def test_all_forms_of_answers_give_the_same_batches(minilm: str, tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, [ROW, NONE]))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(nested(ROW, NONE), indent=1))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(nested(ROW, NONE)).encode()))
    listed = [
        {
            **row,
            "answers": [
                dict(zip(("text", "answer_start"), pair, strict=True))
                for pair in zip(*row["answers"].values(), strict=True)
            ],
        }
        for row in (ROW, NONE)
    ]
    (tmp_path / "listed.jsonl").write_text("\n".join(map(json.dumps, listed)))
    hub = Features(
        {
            **dict.fromkeys(("id", "question", "context"), Value("string")),
            "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
        }
    )
    Dataset.from_list([ROW, NONE], features=hub).to_parquet(str(tmp_path / "a.parquet"))
    batches = []
    for name in ("a.jsonl", "a.json", "a.json.gz", "listed.jsonl", "a.parquet"):
        data = QuestionAnsweringData(minilm, predict=str(tmp_path / name), val=str(tmp_path / name), id="id")
        data.setup(None)
        [batch], [predicted] = data.val_dataloader(), data.predict_dataloader()
        assert predicted["id"] == ["a", "b"]
        batches.append(batch)
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        for key, value in batch.items():
            assert torch.equal(value, batches[0][key]) if isinstance(value, torch.Tensor) else value == batches[0][key]
    (tmp_path / "none.jsonl").write_text(json.dumps(NONE))  # empty lists alone have no type
    data = QuestionAnsweringData(minilm, str(tmp_path / "none.jsonl"))
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist() == [0]


def test_val_fraction_divides_questions_with_and_without_an_answer(minilm: str) -> None:
    rows = Dataset.from_list([{**(ROW if i % 4 else NONE), "question": f"what is it , {i} ?"} for i in range(40)])
    data = QuestionAnsweringData(minilm, rows, val_fraction=0.25, max_length=20, stride=5, batch_size=64)
    data.setup("fit")
    train = {row for batch in data.train_dataloader() for row in batch["row"].tolist()}
    val = [
        (row, answers)
        for batch in data.val_dataloader()
        for row, answers in zip(batch["row"].tolist(), batch["answers"], strict=True)
    ]
    assert len(val) == 10
    assert train | {row for row, _ in val} == set(range(40))
    assert len(train) == 30
    assert sum(not answers for _, answers in val) in (2, 3)
    assert all(bool(answers) == bool(row % 4) for row, answers in val)


def change(**columns: Any) -> dict[str, Any]:
    return {**ROW, **columns}


def answers(text: Any, start: Any) -> dict[str, Any]:
    return change(answers={"text": text, "answer_start": start})


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no column": (
        {"question": "what ?", "context": "x"},
        ValueError,
        r"line 2 has no column 'answers'; there are: 'question', 'context'",
    ),
    "null question": (change(question=None), ValueError, r"line 2: column 'question' is null"),
    "null context": (change(context=None), ValueError, r"line 2: column 'context' is null"),
    "question without tokens": (
        change(question=" "),
        ValueError,
        r"line 2: the tokenizer makes no token of the question ''",
    ),
    "context without tokens": (
        change(context=" \n ", answers=NONE["answers"]),
        ValueError,
        r"line 2: the tokenizer makes no token of the context ' \\n '",
    ),
    "answer without tokens": (
        change(context="a \u200b film", answers={"text": ["\u200b"], "answer_start": [2]}),
        ValueError,
        r"line 2: the tokenizer makes no token of the answer",
    ),
    "null answers": (change(answers=None), ValueError, r"line 2: column 'answers': null: .* has empty lists"),
    "null text": (answers([None], [3]), ValueError, r"line 2: .*text None and answer_start 3 must be a string and a"),
    "null start": (answers(["film"], [None]), ValueError, r"line 2: .*text 'film' and answer_start None must be"),
    "null list": (answers(None, [3]), ValueError, r"line 2: .*text and answer_start must be lists"),
    "fraction": (answers(["film"], [6.5]), ValueError, r"line [12]: .*answer_start \d+\.\d must be a string and a"),
    "elsewhere": (
        answers(["film"], [5]),
        ValueError,
        r"line 2: column 'answers': answer 'film' is not in the context at answer_start=5, where ' fil' stands: it "
        r"stands at 6",
    ),
    "nowhere": (answers(["fim"], [6]), ValueError, r"where 'fil' stands: it stands nowhere in the context; correct or"),
    "past the end": (
        answers(["she ?"], [len(CONTEXT) - 4]),
        ValueError,
        rf"line 2: .*'she \?' would stand at characters {len(CONTEXT) - 4} to {len(CONTEXT) + 1} of a context of "
        rf"{len(CONTEXT)}: offsets count characters from 0; it stands at {len(CONTEXT) - 5}",
    ),
    "negative": (answers(["she ?"], [-5]), ValueError, r"would stand at characters -5 to 0 of a context"),
    "second answer": (answers(["film", "dull"], [6, 7]), ValueError, r"'dull' is not in the context at answer_start=7"),
    "lengths": (answers(["film", "dull"], [6]), ValueError, r"line 2: .*2 texts and 1 values of answer_start"),
    "empty text": (answers([""], [6]), ValueError, r"line 2: .*the answer '' is empty: .* has empty lists"),
    "space": (answers([" "], [0]), ValueError, r"the answer ' ' is empty"),
    "long question": (
        change(question="what is it " * 20),
        ValueError,
        r"line 2: the question 'what is it what .*\.\.\.' takes 60 of max_length=32 tokens and leaves 0 for its "
        r"context, no more than stride=16, which windows share: raise max_length, lower stride, or shorten it",
    ),
    "stride": (
        change(question="what is it " * 4 + "?"),
        ValueError,
        r"line 2: the question .* takes 13 of max_length=32 tokens and leaves 16 for its context, no more than",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_faults_of_rows(fault: str, split: str, minilm: str, tmp_path: Path) -> None:
    row, error, message = FAULTS[fault]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROW, row])))
    data = QuestionAnsweringData(minilm, **{split: str(path)}, max_length=32, stride=16)
    with pytest.raises(error, match=message):
        data.setup("fit" if split == "train" else "validate")


def test_a_long_question_about_a_short_context_fits(minilm: str) -> None:
    row = change(
        question="what is it " * 4 + "?", context="a dull film", answers={"text": ["dull"], "answer_start": [2]}
    )
    data = QuestionAnsweringData(minilm, val=Dataset.from_list([row]), max_length=32, stride=16)
    data.setup("validate")
    assert labelled(next(iter(data.val_dataloader()))) == {0: ["dull"]}


WHOLE = json.dumps(nested(ROW)).encode()
NOT_SQUAD = r"after \d questions: not of SQuAD's form data\[\]\.paragraphs\[\]\.qas\[\] "


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.json", b"", r"a\.json: not JSON \(Expecting value: line 1 column 1"),
        ("a.json", WHOLE[:-3], r"a\.json: not JSON \(.*line 1 column \d+"),
        ("a.json", json.dumps(ROW).encode() + b"\n" + json.dumps(ROW).encode(), r"not JSON .*belong in \.jsonl"),
        ("a.json", b'{"data": []}', r"a\.json has no rows"),
        ("a.json", b'{"data": [{"title": "x", "paragraphs": [{"context": "x", "qas": []}]}]}', r"a\.json has no rows"),
        ("a.json", json.dumps({"data": [ROW]}).encode(), NOT_SQUAD + r"\(KeyError: 'paragraphs'\)"),
        ("a.json", json.dumps([ROW]).encode(), NOT_SQUAD + r"\(TypeError"),
        ("a.json", WHOLE.replace(b'"context"', b'"text"'), NOT_SQUAD + r"\(KeyError: 'context'\)"),
        ("a.json", WHOLE.replace(b'"answer_start"', b'"start"'), NOT_SQUAD + r"\(KeyError: 'answer_start'\)"),
        ("a.json", WHOLE.replace(b'"  what is it ?"', b'"\\ud800"'), r"not of SQuAD's form .*Unicode"),
        ("a.json", WHOLE.replace(b'"answers"', b'"others"'), r"a\.json, row 0 \(from 0\): column 'answers': null"),
        ("a.json", WHOLE.replace(b"The film", b"The caf\xe9"), r"a\.json, line 1: not UTF-8"),
        ("a.jsonl", b'{"question": "\xe9"}', r"a\.jsonl, line 1: not UTF-8"),
        ("a.json.gz", gzip.compress(WHOLE)[:-20], r"a\.json\.gz: damaged after line \d"),
        ("a.jsonl.gz", gzip.compress(json.dumps(ROW).encode())[:-20], r"a\.jsonl\.gz: damaged after line \d"),
        ("a.json.gz", WHOLE, r"a\.json\.gz: damaged after line 0"),
    ],
)
def test_faults_of_files(name: str, content: bytes, message: str, minilm: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        QuestionAnsweringData(minilm, str(tmp_path / name)).setup("fit")


def test_faults_of_columns_and_arguments(minilm: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"b\.json does not exist \(from"):
        QuestionAnsweringData(minilm, str(tmp_path / "b.json")).setup("fit")
    flat = Dataset.from_dict({"question": ["q"], "context": ["c"], "answers": ["c"]})
    with pytest.raises(TypeError, match=r'row 0 .*column .answers. must hold \{"text": \[\.\.\.\].* got string'):
        QuestionAnsweringData(minilm, flat).setup("fit")
    other = Dataset.from_list([change(answers={"text": ["film"], "start": [6]})])
    with pytest.raises(TypeError, match=r"got struct<text: list<item: string>, start: list<item: int64>>"):
        QuestionAnsweringData(minilm, other).setup("fit")
    with pytest.raises(ValueError, match="question, context and answers must be different columns, got 'a', 'a'"):
        QuestionAnsweringData(minilm, question="a", context="a")
    for stride in (-1, 384):
        with pytest.raises(ValueError, match=rf"stride={stride} must be 0 or more and below max_length=384"):
            QuestionAnsweringData(minilm, stride=stride)
    data = QuestionAnsweringData(minilm, Dataset.from_list([ROW]))
    data.tokenizer = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match=r"answers need a fast one \(tokenizer\.json\)"):
        data.setup("fit")


def test_names_of_columns(minilm: str) -> None:
    rows = Dataset.from_list([{"q": ROW["question"], "c": ROW["context"], "a": ROW["answers"]}])
    data = QuestionAnsweringData(
        minilm, val=rows, predict=rows.remove_columns("a"), question="q", context="c", answers="a"
    )
    data.setup(None)
    [batch], [predicted] = data.val_dataloader(), data.predict_dataloader()
    assert batch["answers"] == [ROW["answers"]["text"]]
    assert batch["context"] == predicted["context"] == [CONTEXT]
    assert "answers" not in predicted
