"""What an exported folder answers against what `lightning-ft predict` writes, for each task and several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import torch
import transformers as hf
from datasets import Dataset

from lightning_ft.data import (
    ClassificationData,
    ClozeData,
    LanguageModelingData,
    MultiTaskData,
    QuestionAnsweringData,
    TokenClassificationData,
)
from lightning_ft.export import Predictor, export_onnx, reading_settings
from lightning_ft.modules import (
    Cloze,
    MaskedLM,
    MultiTask,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    TransformerModule,
)
from tests.export.served import serve
from tests.export.test_predictor import as_predicted
from tests.modules.test_cloze import words
from tests.pretrained import CORPUS, pretrained, tokenizer

LONG = " ".join(CORPUS * 3)
UNICODE = "naïve café — 東京 is big ; 😀 a\u200db  <s> [SEP] Straße\u00a0!\nnew\tline"
TEXTS = [*CORPUS, LONG, UNICODE, "", " spaces  at  both ends ", "unknownword", "Anna", "...", LONG[:90]]
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}


def model_folder(path: Path, family: str, auto: Any) -> str:
    """A tiny random model with a tokenizer of its family's kind, and weights at which inputs make a difference."""
    if family in ("bert", "roberta", "gpt2"):
        return pretrained(path, family, auto, initializer_range=0.5)  # type: ignore[arg-type]
    torch.manual_seed(0)
    given: dict[str, Any] = {"initializer_range": 0.5}
    if family == "xlnet":  # which pads on the left
        unigram = json.loads((Path(__file__).parents[1] / "tokenizers" / "t5.json").read_text("utf-8"))["model"]
        pieces = [(piece, score) for piece, score in unigram["vocab"] if not piece.startswith("<")]
        special = [(piece, 0.0) for piece in ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>")]
        made: Any = hf.XLNetTokenizer(vocab=[*special, *pieces])
        config = hf.XLNetConfig(vocab_size=len(made), pad_token_id=made.pad_token_id, **XLNET, **given)
    else:
        made = tokenizer("bert")
        wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
        known = {"vocab_size": len(made), "pad_token_id": made.pad_token_id, "max_position_embeddings": 130}
        config = hf.AutoConfig.for_model(family, **wide, **known, **relative, **given)
    auto.from_config(config).save_pretrained(path)
    made.save_pretrained(path)
    return str(path)


def decide(module: TokenClassification) -> None:
    """Tags that change from word to word."""
    with torch.no_grad():
        module.model.classifier.weight.normal_(0, 3, generator=torch.Generator().manual_seed(1))


def assert_close(found: Any, wanted: Any) -> None:
    """Equal, but for numbers within 1e-5."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name in wanted:
            assert_close(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(wanted, float):
        assert isinstance(found, float)
        assert found == pytest.approx(wanted, abs=1e-5)
    else:
        assert found == wanted
        assert type(found) is type(wanted)


def check(
    module: TransformerModule,
    data: Any,
    rows: list[Any],
    out: Path,
    *,
    traced: bool = False,
    written: Any = None,
    **options: Any,
) -> Predictor:
    """All rows at once, in batches of another size, and one by one, as `lightning-ft predict` answers them."""
    if traced:
        export_onnx(module, out, max_length=32, settings=written)
    else:
        options["session"] = serve(module, out, written)
    wanted = as_predicted(module, data)
    assert len({json.dumps(row) for row in wanted}) > len(wanted) / 2
    predict = Predictor(out, threads=1, batch_size=5, **options)
    assert_close(predict(rows), wanted)
    alone = Predictor(out, threads=1, batch_size=1, **options)
    for row, answer in zip(rows, wanted, strict=True):
        assert_close(alone(row if not isinstance(row, list) else tuple(row)), answer)
    # Items of several calls are answered together.
    assert_close(predict.answer([*alone.encode(rows[3:]), *predict.encode(rows[:3])]), [*wanted[3:], *wanted[:3]])
    json.dumps(wanted)
    return predict


# ---- entities


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "xlnet"])
def test_entities_in_texts(family: str, tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", family, hf.AutoModelForTokenClassification)
    module = TokenClassification(path, LABELS)
    table = Dataset.from_dict({"text": TEXTS})
    data = TokenClassificationData(
        path, predict=table, text="text", labels=LABELS, max_length=24, stride=7, eval_batch_size=3
    )
    decide(module)
    traced = family == "bert"
    predict = check(module, data, TEXTS, tmp_path / "out", traced=traced, max_length=24, settings={"stride": 7})
    [item] = predict.encode([LONG])
    assert len(item.parts) > 3
    assert predict.length(item) == sum(len(part.ids[0]) for part in item.parts)
    assert predict([{"text": TEXTS[0]}]) == predict([TEXTS[0]])
    found = [entity for row in predict(TEXTS) for entity in row["entities"]]
    assert len(found) > 5
    with pytest.raises(TypeError, match=r"row 1: expected a text, a list of words, or a mapping with text or tokens"):
        predict(["a", 3])
    with pytest.raises(TypeError, match="row 0: expected a text, a list of words"):
        predict([["a", None]])


@pytest.mark.parametrize(("family", "scheme"), [("bert", "BIOES"), ("roberta", "IO")])
def test_tags_of_words(family: str, scheme: Any, tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", family, hf.AutoModelForTokenClassification)
    labels = ["O", *(f"{prefix}-{kind}" for kind in ("A", "B") for prefix in ("BIES" if scheme == "BIOES" else "I"))]
    module = TokenClassification(path, labels, scheme=scheme)
    rows = [text.split(" ") for text in TEXTS if text]
    data = TokenClassificationData(
        path, predict=Dataset.from_dict({"tokens": rows}), labels=labels, scheme=scheme, max_length=20
    )
    decide(module)
    predict = check(module, data, rows, tmp_path / "out", max_length=20)
    assert predict([{"tokens": rows[0]}]) == predict([rows[0]])
    assert any(row["entities"] for row in predict(rows))


def test_tags_of_no_scheme(tmp_path: Path) -> None:
    """Parts of speech: a label for each word."""
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForTokenClassification)
    model = hf.AutoModelForTokenClassification.from_pretrained(path, num_labels=3, ignore_mismatched_sizes=True)
    model.config.id2label = {0: "NOUN", 1: "VERB", 2: "X"}
    model.eval().save_pretrained(path)
    session = serve(path, tmp_path / "out")
    text = "the film is a dull story"
    found = Predictor(tmp_path / "out", session=session)(text)
    assert [word["text"] for word in found["words"]] == text.split()
    with torch.inference_mode():
        logits = model(**tokenizer("bert")(text, return_tensors="pt")).logits[0, 1:7].softmax(-1)
    wanted = [["NOUN", "VERB", "X"][i] for i in logits.argmax(-1)]
    assert [word["label"] for word in found["words"]] == wanted
    assert [word["score"] for word in found["words"]] == pytest.approx(logits.max(-1).values.tolist(), abs=1e-5)
    assert Predictor(tmp_path / "out", session=session)([text.split()])[0]["tags"] == wanted


@pytest.mark.parametrize(
    ("labels", "scheme"), [(["B-X", "I-X", "O"], "BIO"), (["O", "I-X"], "IO"), (["O", "B-X", "E-X", "S-X"], "BIOES")]
)
def test_scheme_of_a_model_that_says_none(labels: list[str], scheme: str, tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForTokenClassification)
    options = {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    model = hf.AutoModelForTokenClassification.from_pretrained(path, **options)
    model.config.id2label = dict(enumerate(labels))
    model.save_pretrained(path)
    predict = Predictor(tmp_path / "out", session=serve(path, tmp_path / "out"))
    assert predict.settings["scheme"] == scheme
    assert set(predict("Anna sings")) == {"entities"}


# ---- answers

QUESTIONS = [
    {"question": "  what is it ?", "context": LONG},
    {"question": "who sings ?", "context": "  " + CORPUS[0]},
    {"question": "where ?", "context": UNICODE},
    {"question": "is she good ?", "context": LONG[7:]},
    {"question": "what", "context": "Anna"},
    {"question": "東京 ?", "context": CORPUS[4]},
    *({"question": "what is it ?", "context": text} for text in CORPUS),
]


@pytest.mark.parametrize(
    ("family", "threshold"),
    [("bert", 0.0), ("roberta", -4.0), ("deberta-v2", 1.0), ("xlnet", -2.0), ("gpt2", 0.0), ("bert", None)],
)
def test_answers(family: str, threshold: float | None, tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", family, hf.AutoModelForQuestionAnswering)
    module = QuestionAnswering(path, n_best=7, max_answer_length=6, no_answer=threshold is not None)
    if threshold is not None:
        module.no_answer_threshold.fill_(threshold)
    first = family == "xlnet"
    data = QuestionAnsweringData(
        path, predict=Dataset.from_list(QUESTIONS), max_length=32, stride=9, context_first=first, eval_batch_size=3
    )
    settings = {"stride": 9, "context_first": first}
    traced = (family, threshold) == ("bert", 0.0)
    predict = check(module, data, QUESTIONS, tmp_path / "out", traced=traced, max_length=32, settings=settings)
    assert predict([("what is it ?", CORPUS[0])]) == predict([{"question": "what is it ?", "context": CORPUS[0]}])
    assert len(predict.encode(QUESTIONS[:1])[0].parts) > 3
    for row, error, message in (
        ({"question": "a"}, TypeError, "row 1: expected texts as question and context, got"),
        ("a text", TypeError, "row 1: expected a mapping with question and context, or a pair"),
        ({"question": "", "context": "a"}, ValueError, "row 1: the tokenizer makes no token of the question ''"),
        ({"question": "a", "context": ""}, ValueError, "row 1: the tokenizer makes no token of the context ''"),
        ({"question": "a " * 40, "context": LONG}, ValueError, r"row 1: the question .* takes .* of max_length=32"),
    ):
        with pytest.raises(error, match=message):
            predict([QUESTIONS[0], row])


# ---- masks


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_masks(family: str, tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", family, hf.AutoModelForMaskedLM)
    mask = "<mask>" if family == "roberta" else "[MASK]"
    texts = [text.replace("the", mask).replace("is", mask) for text in TEXTS if len(text) < 100]
    module = MaskedLM(path, top_k=4)
    data = LanguageModelingData(path, predict=Dataset.from_dict({"text": texts}), max_length=60, eval_batch_size=3)
    predict = check(module, data, texts, tmp_path / "out", traced=family == "bert", max_length=60)
    assert len(predict(f"{mask} {mask}")["tokens"]) == 2
    with pytest.raises(ValueError, match=r"row 0: a mask token stands at token .*, past max_length=60"):
        predict("a " * 80 + mask)
    whole = Predictor(tmp_path / "out", max_length=60, truncate=False, session=predict._reader.graph.session)
    with pytest.raises(ValueError, match=r"row 0: it has 8\d tokens, and max_length=60: shorten it"):
        whole("a " * 80)


def test_masks_of_a_tokenizer_that_cleans_up(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForMaskedLM)
    words_of = hf.AutoTokenizer.from_pretrained(path, clean_up_tokenization_spaces=True)
    words_of.backend_tokenizer.decoder = tk.decoders.WordPiece(cleanup=False)
    words_of.save_pretrained(path)
    texts = ["[MASK] film , is n't it ' s good ?", "it 's [MASK] !", "a [MASK] .", "so ' m , [MASK]"]
    module = MaskedLM(path)
    data = LanguageModelingData(path, predict=Dataset.from_dict({"text": texts}), max_length=60)
    predict = check(module, data, texts, tmp_path / "out")
    assert predict.settings["clean_up"]


# ---- cloze

PAIR = ["{text} it was {mask} . {other}", "so {mask} : {other} {text}"]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "deberta-v2"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_cloze(family: str, calibrate: bool, tmp_path: Path) -> None:
    decoder = family == "gpt2"
    auto = hf.AutoModelForCausalLM if decoder else hf.AutoModelForMaskedLM
    path = model_folder(tmp_path / "model", family, auto)
    patterns = ["so {text} and {other} it was {mask}", "is {text} : {mask}"] if decoder else PAIR
    task: dict[str, Any] = {"patterns": patterns, "verbalizer": words(path), "calibrate": calibrate}
    rows = [{"text": text, "other": other} for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    module = Cloze(path, **task)
    data = ClozeData(path, predict=Dataset.from_list(rows), **task, max_length=30, eval_batch_size=3)
    predict = check(module, data, rows, tmp_path / "out", traced=family == "bert" and calibrate, max_length=30)
    session = predict._reader.graph.session
    assert predict(rows[0])["label"] in module.labels
    with pytest.raises(TypeError, match="row 1: expected a mapping with text, other, got"):
        predict([rows[0], {"text": "a"}])
    with pytest.raises(ValueError, match=r"row 0: in its pattern it has \d\d+ tokens, and max_length=30"):
        Predictor(tmp_path / "out", max_length=30, truncate=False, session=session)([{"text": LONG, "other": "a"}])
    with pytest.raises(ValueError, match=r"row 0: pattern .* and max_length leaves"):
        Predictor(tmp_path / "out", max_length=4, session=session)([rows[0]])


def test_cloze_with_words_of_two_tokens(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForMaskedLM)
    known = hf.AutoTokenizer.from_pretrained(path)
    double = [f"{word}s" for word in sorted(set(LONG.split())) if len(known.tokenize(f"{word}s")) == 2][:2]
    task: dict[str, Any] = {
        "patterns": ["{text} it was {mask}{mask} ."],
        "verbalizer": {"a": double[0], "b": [double[1], words(path)["pos"][0]]},
    }
    module = Cloze(path, **task)
    data = ClozeData(path, predict=Dataset.from_dict({"text": TEXTS}), **task, max_length=30)
    check(module, data, TEXTS, tmp_path / "out", max_length=30)


def test_gaps_move_with_padding_on_the_left(tmp_path: Path) -> None:
    """As decoders' tokenizers pad."""
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForMaskedLM)
    session = serve(Cloze(path, words(path), PAIR), tmp_path / "out")
    file = tmp_path / "out" / "head.json"
    head = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**head, "padding": {**head["padding"], "left": True}}))
    fed: list[dict[str, Any]] = []
    run = session.run
    session.run = lambda names, feed: (fed.append(dict(feed)), run(names, feed))[1]  # type: ignore[method-assign]
    rows = [{"text": text, "other": "a film"} for text in TEXTS]
    Predictor(tmp_path / "out", session=session)(rows)
    with pytest.raises(ValueError, match=r"its head\.json has no patterns or no words of labels: export it anew"):
        Predictor(tmp_path / "out", session=session, settings={"words": {}})
    mask = hf.AutoTokenizer.from_pretrained(path).mask_token_id
    for feed in fed:
        assert (feed["attention_mask"][:, -1] == 1).all()
        assert (feed["input_ids"][range(len(feed["gap"])), feed["gap"][:, 0]] == mask).all()
    assert any((feed["attention_mask"][:, 0] == 0).any() for feed in fed)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cloze_with_demonstrations(family: str, tmp_path: Path) -> None:
    """Those that the data module drew are shown beside each row, and calibrated for."""
    auto = hf.AutoModelForCausalLM if family == "gpt2" else hf.AutoModelForMaskedLM
    path = model_folder(tmp_path / "model", family, auto)
    patterns = ["so {text} : {mask}", "is {text} it was {mask}"]
    task: dict[str, Any] = {"patterns": patterns, "verbalizer": words(path), "calibrate": True}
    train = Dataset.from_dict({"text": TEXTS[:5] * 3, "label": ["pos", "neg", "neg", "pos", "pos"] * 3})
    shown = {"train": train, "demonstrations": 1, "demonstration_draws": 3, "max_length": 60}
    data = ClozeData(path, predict=Dataset.from_dict({"text": TEXTS}), **task, **shown)
    predict = check(Cloze(path, **task), data, TEXTS, tmp_path / "out", written=reading_settings(data))
    assert len(predict.encode(TEXTS)[0].parts) == 6


# ---- what all share


def test_settings_of_the_data(tmp_path: Path) -> None:
    """The folder reads rows as the data module of its training did, without being told so."""
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForQuestionAnswering)
    data = QuestionAnsweringData(
        path, predict=Dataset.from_list(QUESTIONS), max_length=30, stride=5, context_first=True, eval_batch_size=3
    )
    module = QuestionAnswering(path)
    predict = check(module, data, QUESTIONS, tmp_path / "out", traced=True, written=reading_settings(data))
    assert predict.max_length == 30
    assert {name: predict.settings[name] for name in ("stride", "context_first")} == {
        "stride": 5,
        "context_first": True,
    }
    tagged = TokenClassificationData(path, labels=LABELS, max_length=20)
    assert reading_settings(tagged) == {"max_length": 20, "stride": 5}
    assert reading_settings(ClassificationData(path, max_length=20)) == {"max_length": 20}
    with pytest.raises(TypeError, match="data: MultiTaskData is of no task whose rows"):
        reading_settings(MultiTaskData({"a": tagged, "b": tagged}))
    with pytest.raises(ValueError, match="settings: n_bets is none of 'question-answering': n_best"):
        export_onnx(module, tmp_path / "none", settings={"n_bets": 1})
    heads = MultiTask({"a": module, "b": QuestionAnswering(path)})
    with pytest.raises(ValueError, match="settings: the source has several heads"):
        export_onnx(heads, tmp_path / "none", settings={"n_best": 1})
    assert not (tmp_path / "none").exists()


def test_xlnet_pads_on_the_left(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "xlnet", hf.AutoModelForSequenceClassification)
    module = SequenceClassification(path, ["no", "yes"])
    data = ClassificationData(path, predict=Dataset.from_dict({"text": TEXTS}), labels=["no", "yes"], max_length=24)
    predict = check(module, data, TEXTS, tmp_path / "out", max_length=24)
    assert predict._reader.exported.padding["left"]


def test_texts_that_are_cut_on_the_left(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    hf.AutoTokenizer.from_pretrained(path, truncation_side="left").save_pretrained(path)
    module = SequenceClassification(path, ["no", "yes"])
    data = ClassificationData(path, predict=Dataset.from_dict({"text": TEXTS}), labels=["no", "yes"], max_length=24)
    predict = check(module, data, TEXTS, tmp_path / "out", max_length=24)
    [item] = predict.encode([LONG])
    assert predict.length(item) == 24
    right = hf.AutoTokenizer.from_pretrained(path, truncation_side="right")
    assert list(item.parts[0].ids[0]) != right(LONG, truncation=True, max_length=24)["input_ids"]


def test_a_folder_of_several_tasks_names_them(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification)
    heads = {"mood": SequenceClassification(path, ["no", "yes"]), "tone": SequenceClassification(path, ["a", "b"])}
    sessions = {name: serve(head, tmp_path / "out" / name) for name, head in heads.items()}
    with pytest.raises(FileNotFoundError, match=r"holds a model for each of mood, tone: give the folder of one"):
        Predictor(tmp_path / "out")
    assert Predictor(tmp_path / "out" / "tone", session=sessions["tone"])("a film")["label"] in ("a", "b")
