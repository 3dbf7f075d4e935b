"""The text-to-text head: transformers' own loss, generation, labels as texts, and learning by heart."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lightning_ft.data.seq2seq import Seq2SeqData
from lightning_ft.functional.label_scoring import decoder_inputs, label_log_likelihoods, label_token_ids
from lightning_ft.modules import Architecture
from lightning_ft.modules.seq2seq import Seq2Seq
from tests import pretrained as tiny
from tests.pretrained import CORPUS, Kind, check_head, config, pretrained

SOURCES = ["a long text about many things", "Anna Smith lives in London .", "the film is dull", "what is it ?"]
TARGETS = ["many things", "Anna", "dull but well made", "it was great"]


# Once for all: a trained Unigram vocabulary differs from one training to the next.
tokenizer = cache(tiny.tokenizer)


def rows(count: int) -> Dataset:
    words = " ".join(CORPUS).split()
    texts = [" ".join(words[i % 40 : i % 40 + 3 + i % 9]) for i in range(count)]
    return Dataset.from_dict({"source": texts, "target": [text[: 4 + i % 7] for i, text in enumerate(texts)]})


def head(kind: Kind, **options: Any) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(Architecture(config(kind, vocab_size=len(tokenizer(kind))), tokenizer(kind)), **options).eval()


def batch(kind: Kind, sources: list[str] = SOURCES, targets: list[str] | None = TARGETS) -> dict[str, Any]:
    words = tokenizer(kind)
    result = dict(words(sources, padding=True, return_tensors="pt"))
    if targets is not None:
        given = words(text_target=targets, padding=True, return_tensors="pt")
        result["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    return result


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_contract(kind: Kind, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model", kind, hf.AutoModelForSeq2SeqLM)
    options = {"max_new_tokens": 4, "num_beams": 2} if kind == "bart" else {"max_new_tokens": 4}
    check_head(
        lambda: Seq2Seq(folder, learning_rate=1e-3, **options),
        lambda: Seq2SeqData(folder, rows(32), rows(5), predict=rows(5), batch_size=8, max_target_length=16),
        hf.AutoModelForSeq2SeqLM,
        tmp_path,
        inputs=("input_ids", "attention_mask", "labels"),
    )
    saved = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved").generation_config
    assert (saved.max_new_tokens, saved.num_beams) == (4, options.get("num_beams", 1))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_loss_is_transformers_own(kind: Kind) -> None:
    module, given = head(kind), batch(kind)
    loss, tokens = module.loss(module(given), given)
    assert loss.item() == pytest.approx(module.model(**given).loss.item(), abs=1e-6)
    assert tokens == sum(len(ids) for ids in tokenizer(kind)(text_target=TARGETS)["input_ids"])
    given["labels"] = torch.full_like(given["labels"], -100)
    assert module.loss(module(given), given)[0] == 0
    smooth = head(kind, label_smoothing=0.1)
    given = batch(kind)
    logits, labels = smooth(given), given["labels"]
    known = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[known], labels[known], label_smoothing=0.1)
    torch.testing.assert_close(smooth.loss(logits, given)[0], expected)


def test_decoder_inputs_of_models_without_a_method_of_their_own() -> None:
    sizes = {"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    model = hf.M2M100ForConditionalGeneration(hf.M2M100Config(**sizes, **heads, decoder_start_token_id=2)).eval()
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    ids, labels = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[8, 9, 2, -100]])
    assert decoder_inputs(model, labels).tolist() == [[2, 8, 9, 2]]
    theirs = model(input_ids=ids, labels=labels)
    ours = model(input_ids=ids, decoder_input_ids=decoder_inputs(model, labels)).logits
    torch.testing.assert_close(ours, theirs.logits)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="has no decoder_start_token_id"):
        decoder_inputs(model, labels)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_scores_of_texts_are_those_of_the_beam_search(kind: Kind) -> None:
    module = head(kind, num_beams=3, max_new_tokens=5)
    module.model.generation_config.forced_eos_token_id = None  # BART's own: counts as certain in the search
    given = batch(kind, targets=None)
    texts, scores = module.generate(given)
    theirs = module.model.generate(**given, return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(scores, theirs.sequences_scores, rtol=1e-4, atol=1e-5)
    assert texts == [t.strip() for t in tokenizer(kind).batch_decode(theirs.sequences, skip_special_tokens=True)]
    out = module.predict_step({**given, "row": torch.arange(4)}, 0)
    assert set(out) == {"row", "text", "score"}


def test_nothing_after_the_end_is_scored() -> None:
    """Also where the padding token is the end."""
    module = head("t5", max_new_tokens=6)
    given = batch("t5", SOURCES[:1], None)
    alone = module.generate(given)[1]
    ends = torch.tensor([[0, 30, 31, 1, 0, 0], [0, 30, 31, 1, 1, 1]])
    module.model.generate = lambda **_: ends  # type: ignore[method-assign, assignment]
    two = {name: value.repeat(2, 1) for name, value in given.items()}
    scores = module.generate(two)[1]
    labels = torch.tensor([[30, 31, 1]])
    logits = module.model(**given, labels=labels).logits.log_softmax(-1)
    expected = logits[0, range(3), labels[0]].mean()
    torch.testing.assert_close(scores, expected.expand(2))
    assert alone.shape == (1,)


def test_draws_and_settings_reach_the_generation() -> None:
    module = head("t5", temperature=2.0, top_p=0.9, max_new_tokens=7, no_repeat_ngram_size=2)
    settings = module.model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 2.0, 0.9, 0)
    assert (settings.max_new_tokens, settings.no_repeat_ngram_size) == (7, 2)
    given = batch("t5", targets=None)
    torch.manual_seed(1)
    first = module.generate(given)[0]
    assert first != module.generate(given)[0]
    torch.manual_seed(1)
    assert first == module.generate(given)[0]


def evaluated(module: Seq2Seq, given: dict[str, Any], stage: str = "validate") -> dict[str, Any]:
    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return given

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loader: Any = torch.utils.data.DataLoader(Data(), batch_size=None)
    return dict(getattr(trainer, stage)(module, loader, verbose=False)[0])


def test_validation_measures_generated_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = head("t5", metrics=["rouge", "bleu", "chrf", "meteor"], max_new_tokens=3)
    made = [f"text number {i} of them" for i in range(len(SOURCES))]
    monkeypatch.setattr(module, "generate", lambda given: (made, torch.zeros(len(made))))
    perfect = {**batch("t5"), "references": [["nothing of the kind", text] for text in made]}
    values = evaluated(module, perfect)
    assert set(values) == {"val_loss", *(f"val_{n}" for n in ["rouge1", "rouge2", "rougeL", "bleu", "chrf", "meteor"])}
    assert values["val_chrf"] == pytest.approx(1) == values["val_rougeL"]
    decoded = evaluated(module, batch("t5"))
    assert decoded["val_loss"] == pytest.approx(values["val_loss"])
    assert decoded["val_chrf"] < 1


def test_validation_without_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    module = head("t5", generate_in_validation=False, max_new_tokens=3)
    calls: list[int] = []
    generate = module.generate
    monkeypatch.setattr(module, "generate", lambda given: calls.append(1) or generate(given))
    assert set(evaluated(module, batch("t5"))) == {"val_loss"}
    assert not calls
    assert "test_rougeL" in evaluated(module, batch("t5"), "test")
    assert calls
    assert set(evaluated(head("t5", metrics=[]), batch("t5"))) == {"val_loss"}


LABELS = ["good", "bad", "it was great"]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_labels_are_scored_by_their_tokens(kind: Kind) -> None:
    """Against log-probabilities summed one text, one label and one token at a time."""
    module = head(kind, label_texts=LABELS)
    given, words = batch(kind, targets=None), tokenizer(kind)
    expected = torch.empty(len(SOURCES), len(LABELS))
    lengths = []
    for column, label in enumerate(LABELS):
        ids = words(text_target=[label], return_tensors="pt")["input_ids"]
        lengths.append(ids.shape[1])
        for row, source in enumerate(SOURCES):
            one = words([source], return_tensors="pt")
            with torch.no_grad():
                logs = module.model(**one, labels=ids).logits.log_softmax(-1)
            expected[row, column] = sum(logs[0, place, token] for place, token in enumerate(ids[0].tolist()))
    assert len(set(lengths)) > 1
    scores = module.label_log_likelihoods(given)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    out = module.predictions(given)
    assert out["label"] == [LABELS[i] for i in expected.argmax(1).tolist()]
    torch.testing.assert_close(torch.tensor(out["probabilities"]), expected.softmax(-1), rtol=1e-3, atol=1e-5)
    ids = label_token_ids(words, LABELS)
    means = label_log_likelihoods(module.model, given, ids, normalise="mean", max_rows=1)
    torch.testing.assert_close(means, expected / torch.tensor(lengths), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='normalise=\'max\' must be "sum" or "mean"'):
        label_log_likelihoods(module.model, given, ids, normalise="max")  # type: ignore[arg-type]


def test_labels_are_evaluated_as_classes() -> None:
    module = head("t5", label_texts=LABELS)
    best = module.predictions(batch("t5", targets=None))["label"]
    assert evaluated(module, batch("t5", targets=best))["val_accuracy"] == 1
    other = [LABELS[(LABELS.index(label) + 1) % 3] for label in best]
    values = evaluated(module, batch("t5", targets=[*best[:3], other[3]]))
    assert values["val_accuracy"] == 0.75
    assert set(values) == {"val_loss", "val_accuracy", "val_f1"}
    with pytest.raises(ValueError, match=r"the target 'many things' is none of label_texts=\['good', 'bad', "):
        evaluated(module, batch("t5"))


def test_label_classifier_survives_its_checkpoint(tmp_path: Path) -> None:
    data = Dataset.from_dict({"source": SOURCES * 2, "target": ["good", "bad"] * 4})
    folder = pretrained(tmp_path / "model", "t5", hf.AutoModelForSeq2SeqLM)
    module = Seq2Seq(folder, label_texts=["good", "bad"], length_normalised=True, learning_rate=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Seq2SeqData(folder, data, data, batch_size=4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Seq2Seq.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert again.predictions(batch("t5", targets=None)) == module.eval().predictions(batch("t5", targets=None))


def test_labels_whose_tokens_begin_another_are_refused() -> None:
    words = tokenizer("t5")
    assert label_token_ids(words, ["good", "good bad"]).shape[0] == 2  # they end in </s>
    bare = tiny.tokenizer("t5")
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(ValueError, match="of the label 'good' begin those of 'good bad'"):
        label_token_ids(bare, ["bad", "good bad", "good"])
    with pytest.raises(ValueError, match="of the label 'good' begin those of 'good bad'"):
        Seq2Seq(Architecture(config("t5", vocab_size=len(bare)), bare), label_texts=["bad", "good bad", "good"])
    with pytest.raises(ValueError, match="of the label 'good' begin those of 'good'"):
        label_token_ids(words, ["good", "good"])
    with pytest.raises(ValueError, match="of the label 'good' begin those of ' good'"):
        label_token_ids(words, ["good", " good"])  # the same tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["blue"]}, r"'blue' is not one of \('rouge', 'bleu', 'chrf', 'meteor', 'bertscore'\)"),
        ({"metrics": ["bertscore"]}, r"write metrics=\{\"bertscore\""),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is about beam search: set num_beams=4"),
        ({"length_normalised": True}, "length_normalised=True is about label_texts"),
        ({"metrics": ["rouge"], "label_texts": ["a", "b"]}, "with label_texts none are: leave them out"),
        ({"num_beams": 0}, "num_beams=0 must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 and"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1 must be 0 or more"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"top_p": 0.5}, "temperature=0 draws none"),
        ({"top_p": 0.0}, r"lie in \(0, 1\]"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 lie in \[0, 1\)"),
        ({"label_texts": ["good"]}, r"label_texts=\['good'\] must be two texts or more that differ"),
        ({"label_texts": ["good", "good"]}, "must be two texts or more that differ"),
        ({"target_language": "deu_Latn"}, "target_language='deu_Latn' is no token of"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head("t5", **options)


def test_an_architecture_without_a_tokenizer_cannot_write() -> None:
    module = Seq2Seq(Architecture(config("t5")), max_new_tokens=2)
    with pytest.raises(ValueError, match="the architecture came without one"):
        module.generate(batch("t5", targets=None))


def test_target_language_is_the_first_token() -> None:
    words = tiny.tokenizer("bart")
    words.add_special_tokens({"additional_special_tokens": ["deu_Latn", "__fr__"]})
    known = config("bart", vocab_size=len(words))
    for code, token in (("deu_Latn", "deu_Latn"), ("fr", "__fr__")):
        module = Seq2Seq(Architecture(known, words), target_language=code, max_new_tokens=3).eval()
        made = module.model.generate(**batch("bart", targets=None), max_new_tokens=3)
        assert made[:, 1].tolist() == [words.convert_tokens_to_ids(token)] * len(SOURCES)


def pairs(real_data: Path) -> Dataset:
    lines = (real_data / "scitldr" / "train.jsonl").read_text().splitlines()[:32]
    records = [json.loads(line) for line in lines]
    short = [
        {name: " ".join(r[name].split()[:size]) for name, size in (("source", 16), ("target", 8))} for r in records
    ]
    return Dataset.from_list(short)


def bpe(texts: list[str]) -> hf.PreTrainedTokenizerFast:
    raw = tk.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet)
    )
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_learns_summaries_by_heart(kind: Kind, real_data: Path, tmp_path: Path) -> None:
    data = pairs(real_data)
    words = bpe([*data["source"], *data["target"]])
    words.save_pretrained(tmp_path)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    wide = {
        "t5": {"num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "dropout_rate": 0.0},
        "bart": {
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            **{"dropout": 0.0, "max_position_embeddings": 80, "bos_token_id": 0, "forced_eos_token_id": None},
        },
    }[kind]
    known = hf.AutoConfig.for_model(kind, vocab_size=len(words), d_model=64, **special, **wide)
    hf.AutoModelForSeq2SeqLM.from_config(known).save_pretrained(tmp_path)
    module = Seq2Seq(str(tmp_path), metrics=["rouge", "chrf"], learning_rate=5e-3, weight_decay=0.0, max_new_tokens=40)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=60 if kind == "t5" else 150,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    source = Seq2SeqData(str(tmp_path), data, data, predict=data.remove_columns("target"), batch_size=8)
    trainer.fit(module, datamodule=source)
    trainer.limit_val_batches = 1.0
    [values] = trainer.validate(module, datamodule=source, verbose=False)
    assert values["val_rougeL"] > 0.95
    written = [text for out in trainer.predict(module, datamodule=source) or [] for text in out["text"]]
    same = [text == target for text, target in zip(written, data["target"], strict=True)]
    assert sum(same) > 0.9 * len(same)
