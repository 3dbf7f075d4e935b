"""Patterns, their tokens, and the words in their gaps."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lightning_ft.core.pattern import Pattern, encode_pattern, encode_prompt, parse_patterns
from lightning_ft.core.verbaliser import is_decoder, parse_verbalizer, word_tokens
from tests.pretrained import CORPUS, Kind, tokenizer

WORDS = [*" ".join(CORPUS).split(), "[MASK]", "<mask>", "unheard-of", "\u200b", "naïve東京", "a" * 50]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} It was", r"has no \{mask\}: put one where"),
        ("It was {mask}", "names no column"),
        ("{text} was {mask} and {mask}", "masks apart from each other"),
        ("{mask} {text} {mask}", "masks apart from each other"),
        ("{text {mask}", "Braces of the text are written {{ and }}"),
        ("{text} } {mask}", "Braces of the text"),
        ("{} {mask}", "a column's name and nothing else"),
        ("{text!r} {mask}", "a column's name and nothing else"),
        ("{text:>9} {mask}", "a column's name and nothing else"),
    ],
)
def test_faulty_patterns(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(template)


def test_patterns_go_together() -> None:
    with pytest.raises(ValueError, match=r"one text or several different ones, got \[\]"):
        parse_patterns([])
    with pytest.raises(ValueError, match="several different ones"):
        parse_patterns(["{text} {mask}"] * 2)
    with pytest.raises(ValueError, match=r"same number of masks, got \[1, 2\]"):
        parse_patterns(["{text} {mask}", "{text} {mask}{mask}"])


def test_pieces() -> None:
    pattern = Pattern("{{{a}}} : {mask} {mask}! {b} {a}")
    assert pattern.columns == ["a", "b"]
    texts = {"a": "x", "b": "y {a}"}
    assert "".join(pattern.pieces(texts, mask="<m>")) == "{x} :<m><m>! y {a} x"
    assert "".join(pattern.pieces(texts, word="very good")) == "{x} : very good! y {a} x"


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_tokens_are_those_of_the_whole_text(kind: Kind) -> None:
    words = tokenizer(kind)
    mask = words.mask_token or ""
    texts = {"a": ["the film", "café Straße", ""], "b": ["is dull", "", "who?"]}
    for template in ("{a}? {mask}, {b}", "{mask}: {b} ({a})", "it is {mask} that {a}{b}"):
        pattern = Pattern(template)
        for row, body in enumerate(encode_pattern(pattern, words, texts, 99, mask=mask)):
            values = {name: column[row] for name, column in texts.items()}
            whole = template.replace(" {mask}", "{mask}").format(**values, mask=mask)
            assert body.ids == words(whole, add_special_tokens=False)["input_ids"]
            assert not body.cut
            assert [i for i, inside in zip(body.ids, body.gap, strict=True) if inside] == (
                [words.mask_token_id] if mask else []
            )


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "t5"])
def test_what_is_cut_is_always_text(kind: Kind) -> None:
    words, chance = tokenizer(kind), random.Random(0)
    mask = words.mask_token or ""
    for template, gap in (("so {a} ? {mask} . {b} . ", 1), ("question : {b} , {a} it was {mask} {mask}", 2)):
        pattern = Pattern(template)
        texts = {name: [" ".join(chance.choices(WORDS, k=chance.randint(0, 60))) for _ in range(40)] for name in "ab"}
        marked = {name: ["\x01"] * 40 for name in "ab"}
        fixed = len(encode_pattern(pattern, words, marked, 999, mask=mask)[0].ids) - 2 * len(words("\x01")["input_ids"])
        whole = encode_pattern(pattern, words, texts, 9999, mask=mask)
        for room in (fixed + 12, 40, 100):
            for row, body in enumerate(encode_pattern(pattern, words, texts, room, mask=mask)):
                assert len(body.ids) <= room
                assert body.cut == (len(whole[row].ids) > room) == (len(body.ids) == room < len(whole[row].ids))
                assert sum(body.gap) == (gap if mask else 0)
                # Without its text's tokens, the pattern is what it was.
                rest, full = list(body.ids), iter(whole[row].ids)
                assert all(any(token == other for other in full) for token in rest), "not a subsequence"
                shown = words.decode(body.ids).replace(" ", "")
                for piece in template.replace("{mask}", mask).replace("{a}", "{b}").split("{b}"):
                    assert piece.replace(" ", "") in shown


def test_the_longest_text_is_cut_first_as_transformers_does() -> None:
    words, pattern = tokenizer("bert"), Pattern("{a} {mask} {b}")
    for first, second, room in ((30, 4, 13), (3, 20, 13), (20, 17, 12), (9, 2, 8), (5, 5, 20)):
        a, b = " ".join(["film"] * first), " ".join(["story"] * second)
        [body] = encode_pattern(pattern, words, {"a": [a], "b": [b]}, room + 1, mask="[MASK]")
        pair = words(a, b, truncation="longest_first", max_length=room, add_special_tokens=False)["input_ids"]
        ours = [token for token, inside in zip(body.ids, body.gap, strict=True) if not inside]
        assert ours == pair


def test_a_mask_in_the_text_is_no_gap() -> None:
    words = tokenizer("bert")
    texts = {"text": ["[MASK] film [MASK]"]}
    [body] = encode_pattern(Pattern("{text} was {mask} ."), words, texts, 20, mask="[MASK]")
    assert body.ids.count(words.mask_token_id) == 3
    assert body.gap == [False, False, False, False, True, False]


def test_a_pattern_needs_room() -> None:
    words = tokenizer("bert")
    pattern = Pattern("{text} it was {mask} .")
    with pytest.raises(ValueError, match=r"makes 4 tokens beside the texts, and max_length leaves 4: raise max_length"):
        encode_pattern(pattern, words, {"text": ["film"]}, 4, mask="[MASK]")
    [body] = encode_pattern(pattern, words, {"text": ["film story"]}, 5, mask="[MASK]")
    assert words.decode(body.ids) == "film it was [MASK]."


def test_words_are_seen_as_they_stand_in_the_gap() -> None:
    words = tokenizer("roberta")
    first, second = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if f"Ġ{letter}" in words.get_vocab()][:2]
    spaced, bare = ([[[words.convert_tokens_to_ids(s + x)]] for x in (first, second)] for s in ("Ġ", ""))
    assert spaced != bare
    for template, expected in (
        ("{text} is {mask} .", spaced),
        ("{text} {mask}", spaced),
        ("{mask} {text}", bare),
        ("{text}{mask}", bare),
        ("({mask}) {text}", bare),
    ):
        assert word_tokens({"a": [first], "b": [second]}, Pattern(template), words, decoder=False) == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("template", ["{text}\n{mask}", "{text} :\n{mask}", "{text}  {mask}", "{text} is {mask}"])
def test_a_prompt_and_a_word_are_the_tokens_of_the_text_that_they_make(kind: Kind, template: str) -> None:
    words, pattern = tokenizer(kind), Pattern(template)
    vocabulary = words.get_vocab()
    plain = [x for x in "abcdefghijklmnopqrstuvwxyz" if x in vocabulary and {f"Ġ{x}", f"▁{x}"} & vocabulary.keys()][:2]
    given = {"a": [plain[0]], "b": [plain[1]]}
    tokens = word_tokens(given, pattern, words, decoder=True)
    texts = {"text": ["the film", "a story"]}
    prompts = encode_prompt(pattern, words, texts, 99, word=plain[0])
    for text, prompt in zip(texts["text"], prompts, strict=True):
        for label, word in enumerate(plain):
            whole = words(template.replace("{text}", text).replace("{mask}", word), add_special_tokens=False)
            assert [*prompt.ids, *tokens[label][0]] == whole["input_ids"]
        assert not any(prompt.gap)


def test_words_of_several_tokens_need_several_masks() -> None:
    words = tokenizer("bert")
    long = words("unlikelyness", add_special_tokens=False)["input_ids"]
    assert len(long) > 1
    masks = "{mask}" * len(long)
    given = {"a": ["unlikelyness", "bad"], "b": ["great"]}
    assert word_tokens(given, Pattern("{text} " + masks), words, decoder=False)[0][0] == long
    with pytest.raises(ValueError, match=r"'unlikelyness' is \d+ tokens, \['un.*has a gap for 1.*write \{mask\}"):
        word_tokens(given, Pattern("{text} {mask}"), words, decoder=False)
    with pytest.raises(ValueError, match="has 2 masks, and no word of the verbalizer takes more than 1"):
        word_tokens({"a": ["bad"], "b": ["great"]}, Pattern("{text} {mask} {mask}"), words, decoder=False)


@pytest.mark.parametrize(
    ("verbalizer", "template", "message"),
    [
        ({"a": "ж", "b": "great"}, "{text} {mask}", r"no token for 'ж' \(it makes \['\[UNK\]'\]\)"),
        ({"a": "great", "b": "badland"}, "{text} {mask}", r"'badland' is \d tokens, \['b"),
    ],
)
def test_words_that_are_no_tokens(verbalizer: Any, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_tokens(parse_verbalizer(verbalizer), Pattern(template), tokenizer("bert"), decoder=False)


def test_words_that_grow_together_with_the_pattern() -> None:
    words = tokenizer("roberta")
    token = next(
        token
        for token in words.get_vocab()
        if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha() and len(token) > 2
    )
    start, end = token[1:-1], token[-1]
    assert words.tokenize(f"so {start}{end}")[-1] == token
    with pytest.raises(
        ValueError, match=rf"joins '{end}' to what stands before it \(\['{token}'\]\): put a space before"
    ):
        word_tokens({"a": [end], "b": ["7"]}, Pattern("{text} so " + start + "{mask}"), words, decoder=False)


def test_words_that_the_tokenizer_does_not_tell_apart() -> None:
    from tokenizers import normalizers

    words = tokenizer("bert")
    words.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="'great' and 'Great' are the same to this tokenizer"):
        word_tokens({"a": ["great"], "b": ["Great"]}, Pattern("{text} {mask}"), words, decoder=False)


@pytest.mark.parametrize(
    ("verbalizer", "message"),
    [
        ({"a": "great"}, "words for two labels or more"),
        ({"a": "great", "b": []}, "label 'b' the words \\[\\]: give one or more"),
        ({"a": "great", "b": " bad"}, "without white space around"),
        ({"a": "great", "b": ""}, "label 'b'"),
        ({"a": "great", "b": ["bad", "great"]}, "gives 'great' twice, to 'a' and 'b'"),
        ({"a": ["great", "great"], "b": "bad"}, "gives 'great' twice, to 'a' and 'a'"),
    ],
)
def test_faulty_verbalizers(verbalizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_verbalizer(verbalizer)


def test_decoders_see_what_stands_before_the_gap() -> None:
    ends, inside = Pattern("{text} It was {mask}"), Pattern("{text} It was {mask} .")
    assert is_decoder(tokenizer("gpt2"), [ends], None)
    assert not is_decoder(tokenizer("bert"), [inside], None)
    assert is_decoder(tokenizer("bert"), [ends], True)
    for pattern in (inside, Pattern("{mask} {text}"), Pattern("{text} {mask}{mask}")):
        with pytest.raises(ValueError, match=r"end the pattern with one \{mask\}"):
            is_decoder(tokenizer("gpt2"), [ends, pattern], None)
    with pytest.raises(ValueError, match="decoder=False needs a mask token"):
        is_decoder(tokenizer("gpt2"), [ends], False)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "here"

    with pytest.raises(ValueError, match=r"'here' does not tell where its tokens lie.*fast version"):
        encode_pattern(Pattern("{text} {mask}"), Slow(), {"text": ["a"]}, 9)
