"""What is asked, what is learned, where answers end, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from lightning.pytorch import Trainer

from lightning_ft.data.instructions import InstructionData
from lightning_ft.data.packing import PackSampler
from tests.pretrained import tokenizer as tiny_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The end of a turn is no end-of-sequence token, as in base models that come with a chat template.
TURNS = CHAT.replace("{{ eos_token if m['role'] == 'assistant' }}", "<end>")
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "is it good ?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "who sing ?"},
    {"role": "assistant", "content": "people in London"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """GPT-2's kind: its one special token is begin, end and padding."""
    path = tmp_path_factory.mktemp("gpt2")
    tiny_tokenizer("gpt2").save_pretrained(path)
    return str(path)


def save(path: Path, **changes: Any) -> str:
    words = tiny_tokenizer("gpt2")
    for name, value in changes.items():
        setattr(words, name, value)
    words.save_pretrained(path)
    return str(path)


def rows(count: int, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict(
        {
            "instruction": [f"say what is it {i}" for i in range(count)],
            "input": ["a film" * (i % 3) for i in range(count)],
            "output": ["good " * (1 + i % 5) + "." for i in range(count)],
            **columns,
        }
    )


def only_batch(data: InstructionData, split: str = "val") -> dict[str, Any]:
    data.setup({"val": "validate"}.get(split, split))
    (batch,) = getattr(data, f"{split}_dataloader")()
    return batch


def learned(words: Any, batch: dict[str, Any], row: int = 0) -> str:
    labels = batch["labels"][row]
    return words.decode(labels[labels != -100])


def test_answers_and_their_end_are_learned_and_prompts_are_not(folder: str) -> None:
    words = hf.AutoTokenizer.from_pretrained(folder)
    given = Dataset.from_dict(
        {"instruction": ["sing", "say {input}"], "input": ["a film", ""], "output": ["yes", "no"]}
    )
    batch = only_batch(InstructionData(folder, val=given, template="Do: {instruction}\n\nOn: {input}\n\nAnswer:\n"))
    order = batch["row"].tolist()
    texts = ["Do: sing\n\nOn: a film\n\nAnswer:\n|yes", "Do: say {input}\n\nAnswer:\n|no"]
    for place, row in enumerate(order):
        prompt, answer = texts[row].split("|")
        ids = batch["input_ids"][place][batch["attention_mask"][place] == 1].tolist()
        alone = words(prompt)["input_ids"]
        assert ids[: len(alone)] == alone
        assert words.decode(ids) == prompt + answer + words.eos_token
        assert learned(words, batch, place) == answer + words.eos_token
    # The end is learned although it is also the padding, which is not.
    assert words.eos_token_id == batch["input_ids"][order.index(1), -1]
    ends = (batch["labels"] == words.eos_token_id).sum(1).tolist()
    assert ends == [1, 1]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_default_template_is_alpacas(folder: str) -> None:
    words = hf.AutoTokenizer.from_pretrained(folder)
    batch = only_batch(InstructionData(folder, predict=rows(2).remove_columns("output")), "predict")
    assert set(batch) == {"input_ids", "attention_mask", "row"}
    texts = [words.decode(ids[mask == 1]) for ids, mask in zip(*map(batch.get, ("input_ids", "attention_mask")))]  # noqa: B905
    begin = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert texts == [
        f"{begin}\n\n### Instruction:\nsay what is it 0\n\n### Response:\n",
        f"{begin}\n\n### Instruction:\nsay what is it 1\n\n### Input:\na film\n\n### Response:\n",
    ]


def test_a_token_over_the_border_does_not_change_the_prompt(folder: str) -> None:
    words = hf.AutoTokenizer.from_pretrained(folder)
    # " g" is one token of the tokenizer's: asked alone, the prompt would end in " ".
    template = "{instruction} "
    prompt, whole = words("is it ")["input_ids"], words("is it great")["input_ids"]
    assert whole[: len(prompt)] != prompt
    given = Dataset.from_dict({"instruction": ["is it"], "output": ["great"]})
    batch = only_batch(InstructionData(folder, val=given, input=None, template=template))
    assert batch["input_ids"][0].tolist() == [*prompt, *words("great")["input_ids"], words.eos_token_id]
    assert learned(words, batch) == "great" + words.eos_token


def test_special_tokens_of_the_tokenizer_open_the_prompt_and_only_the_answer_is_ended(tmp_path: Path) -> None:
    words = tiny_tokenizer("roberta")  # <s> ... </s> around every text
    words.save_pretrained(tmp_path)
    data = InstructionData(str(tmp_path), val=rows(1), predict=rows(1), template="{instruction} {input}\n")
    ids = only_batch(data)["input_ids"][0].tolist()
    special = [token for token in ids if token in words.all_special_ids]
    assert special == [words.bos_token_id, words.eos_token_id]
    assert (ids[0], ids[-1]) == (words.bos_token_id, words.eos_token_id)
    asked = only_batch(data, "predict")["input_ids"][0].tolist()
    assert ids[: len(asked)] == asked


@pytest.mark.parametrize("template", [CHAT, TURNS])
def test_every_assistant_turn_is_learned(folder: str, template: str) -> None:
    words = hf.AutoTokenizer.from_pretrained(folder)
    given = Dataset.from_dict({"messages": [TALK]})
    data = InstructionData(folder, val=given, predict=given, messages="messages", template=template)
    batch = only_batch(data)
    end = words.eos_token
    turns = f"yes{end}\npeople in London{end}\n" if template is CHAT else f"yes<end>\npeople in London<end>\n{end}"
    assert learned(words, batch) == turns
    whole = words.apply_chat_template(TALK, chat_template=template, tokenize=False)
    assert words.decode(batch["input_ids"][0]) == whole + ("" if template is CHAT else end)
    # The last answer is left out where it is to be given.
    asked = only_batch(data, "predict")["input_ids"][0]
    assert words.decode(asked) == words.apply_chat_template(
        TALK[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert batch["input_ids"][0, : len(asked)].tolist() == asked.tolist()


def test_the_tokenizers_chat_template_is_used(tmp_path: Path) -> None:
    path = save(tmp_path, chat_template=CHAT)
    words = hf.AutoTokenizer.from_pretrained(path)
    for template in ("auto", "chat"):
        data = InstructionData(path, val=rows(2).select([1]), template=template)
        batch = only_batch(data)
        assert words.decode(batch["input_ids"][0]) == (
            f"<|user|>\nsay what is it 1\n\na film<|assistant|>\ngood good .{words.eos_token}\n".replace(
                "film<", "film\n<"
            )
        )
        assert data.facts()["template"] == "chat"


def test_prompts_are_learned_on_demand(folder: str) -> None:
    batch = only_batch(InstructionData(folder, val=rows(3), mask_prompt=False))
    expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(batch["labels"], expected)


def test_padding_is_on_the_right_whatever_the_tokenizer_says(folder: str) -> None:
    data = InstructionData(folder, val=rows(4))
    data.tokenizer.padding_side = "left"
    batch = only_batch(data)
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert (batch["attention_mask"] == 0).any()


def test_over_long_rows(folder: str) -> None:
    words = hf.AutoTokenizer.from_pretrained(folder)
    template, long = (
        "{instruction}\n",
        Dataset.from_dict({"instruction": ["is"] * 3, "output": ["yes", "no " * 50, "a"]}),
    )
    options: dict[str, Any] = {"input": None, "template": template, "max_length": 12}
    batch = only_batch(InstructionData(folder, val=long, **options))
    cut = batch["row"].tolist().index(1)
    assert batch["input_ids"].shape == (3, 12)
    assert words.eos_token_id not in batch["labels"][cut]
    data = InstructionData(folder, val=long, over_long="drop", **options)
    assert sorted(only_batch(data)["row"].tolist()) == [0, 2]
    assert data.facts()["dropped, over max_length"] == {"val": 1}
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): the prompt has 3 tokens.*max_length=12 is less: raise it"):
        InstructionData(folder, val=long, over_long="error", **options).setup("validate")
    with pytest.raises(ValueError, match=r"row 0 .*max_length=2 leaves nothing of the answer: raise it"):
        InstructionData(folder, val=long, **{**options, "max_length": 2}).setup("validate")
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): the prompt has 3 tokens, and max_length=1: raise it"):
        InstructionData(folder, predict=long, **{**options, "max_length": 1}).setup("predict")
    with pytest.raises(ValueError, match="every row of val is longer than max_length=2"):
        InstructionData(folder, val=long, over_long="drop", **{**options, "max_length": 2}).setup("validate")


def test_rows_without_an_answer_are_dropped_on_demand(folder: str) -> None:
    given = Dataset.from_dict({"instruction": ["is", "say", "sing", "a"], "output": ["yes", " ", None, "no"]})
    options: dict[str, Any] = {"input": None, "template": "{instruction}\n"}
    data = InstructionData(folder, val=given, predict=given, empty_answers="drop", **options)
    batch = only_batch(data)
    assert sorted(batch["row"].tolist()) == [0, 3]
    assert data.facts()["dropped, empty answer"] == {"val": 2}
    assert "dropped, over max_length" not in data.facts()
    assert only_batch(data, "predict")["row"].tolist() == [0, 1, 2, 3]
    plain = only_batch(InstructionData(folder, val=given.select([0, 3]), **options))
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["labels"], plain["labels"])
    talks = [TALK, [*TALK[:2], {"role": "assistant", "content": ""}, *TALK[3:]], TALK]
    chats = InstructionData(
        folder, Dataset.from_dict({"messages": talks}), messages="messages", template=CHAT, empty_answers="drop"
    )
    chats.setup("fit")
    assert chats.need("train").rows.tolist() == [0, 2]
    assert chats.describe().facts["dropped, empty answer"] == {"train": 1}
    with pytest.raises(ValueError, match="every row of val is left out: 1 have an empty answer, and 0 are longer than"):
        InstructionData(folder, val=given.select([1]), empty_answers="drop", **options).setup("validate")
    # A row that is wrong otherwise is not left out.
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): column 'messages': must be a list"):
        InstructionData(
            folder,
            Dataset.from_dict({"messages": [None, TALK]}),
            messages="messages",
            template=CHAT,
            empty_answers="drop",
        ).setup("fit")


@pytest.mark.parametrize("split", ["val", "predict"])
@pytest.mark.parametrize("begins", [False, True])
def test_prompts_without_a_token_are_named(folder: str, split: str, begins: bool, tmp_path: Path) -> None:
    if begins:  # with a token before each text the prompt is empty all the same
        tiny_tokenizer("roberta").save_pretrained(tmp_path)
        folder = str(tmp_path)
    given = Dataset.from_dict({"instruction": ["is", "", "sing"], "output": ["yes", "no", "a"]})
    data = InstructionData(folder, **{split: given}, input=None, template="{instruction}")
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): the tokenizer makes no token of the prompt"):
        data.setup({"val": "validate"}.get(split, split))


def test_the_turn_that_changes_earlier_ones_is_named(folder: str) -> None:
    """The template forgets an answer as soon as the next turn, the user's, follows."""
    thinking = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'assistant' or loop.last else '' }}")
    # It writes the system's turn otherwise when there is an answer.
    late = "{{ '!' if messages[-1].role == 'assistant' }}" + CHAT
    for turns, template, number in ((TALK, thinking, 3), (TALK[1:], thinking, 2), (TALK, late, 2), (TALK[1:], late, 1)):
        given = Dataset.from_dict({"messages": [turns]})
        with pytest.raises(ValueError, match=f"otherwise once turn {number} follows"):
            InstructionData(folder, given, messages="messages", template=template).setup("fit")


def test_dropped_rows_and_a_validation_share(folder: str) -> None:
    train = Dataset.from_dict(
        {"instruction": ["is"] * 20, "output": ["no " * (1 + 20 * (i % 4 == 0)) for i in range(20)]}
    )
    data = InstructionData(
        folder, train, val_fraction=0.25, input=None, template="{instruction}\n", max_length=12, over_long="drop"
    )
    data.setup("fit")
    kept = sorted([*data.need("train").rows.tolist(), *data.need("val").rows.tolist()])
    assert kept == [row for row in range(20) if row % 4]
    assert sum(data.facts()["dropped, over max_length"].values()) == 5


def test_packing_holds_every_token_once(folder: str, real_data: Path) -> None:
    path = str(real_data / "self_instruct" / "dev.jsonl")
    packed, plain = (
        InstructionData(folder, path, packing=flag, bucket=False, max_length=2048, batch_size=2)
        for flag in (True, False)
    )
    for data in (packed, plain):
        data.setup("fit")
    seen: dict[int, list[int]] = {}
    for batch in packed.train_dataloader():
        assert "attention_mask" not in batch
        starts = (batch["position_ids"] == 0).nonzero().tolist()
        ends = [*starts[1:], [len(batch["input_ids"]), 0]]
        documents = []
        for (row, start), (next_row, end) in zip(starts, ends, strict=True):
            span = slice(start, end if next_row == row else None)
            if (batch["labels"][row, span] != -100).any():
                documents.append((batch["input_ids"][row, span].tolist(), batch["labels"][row, span].tolist()))
        for number, document in zip(batch["row"].tolist(), documents, strict=True):
            seen[number] = document
    for batch in plain.train_dataloader():
        for place, number in enumerate(batch["row"].tolist()):
            length = int(batch["attention_mask"][place].sum())
            assert seen.pop(number) == (
                batch["input_ids"][place, :length].tolist(),
                batch["labels"][place, :length].tolist(),
            )
    assert not seen
    packs, alone = packed.describe(), plain.describe()
    assert packs.rows[0]["padding"] < alone.rows[0]["padding"]
    assert packs.facts["share of tokens learned"] == alone.facts["share of tokens learned"]
    assert packs.rows[0]["rows"] == 50 > packs.rows[0]["packs"]


def test_packing_is_for_training_and_ranks_come_from_the_trainer(folder: str) -> None:
    class Two:
        world_size, global_rank, overfit_batches, predicting = 2, 1, 0.0, False
        strategy, state = (lambda t: (t.strategy, t.state))(Trainer(accelerator="cpu", logger=False))

    data = InstructionData(folder, rows(40), rows(8), packing=True, max_length=256, batch_size=2)
    data.setup("fit")
    data.trainer = Two()  # type: ignore[assignment]
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, PackSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.capacity) == (2, 1, 256)
    assert {"attention_mask", "labels"} < set(next(iter(data.val_dataloader())))


def test_settings_decide_what_is_found_on_the_disk(folder: str, tmp_path: Path) -> None:
    # Prompts of 105 tokens with answers of 4 and 9, and a second column of inputs.
    given = rows(4).add_column("other", ["people"] * 4).select([0, 3])
    texts = []
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"template": "{instruction} {input}\n"}, {}),
        ({"mask_prompt": False}, {}),
        ({}, {"chat_template": CHAT}),
        ({}, {"eos_token": "a", "pad_token": "b"}),
        ({"input": "other"}, {}),
        ({"input": None, "template": "{instruction}\n"}, {}),
        ({"output": "other"}, {}),
        ({"max_length": 110}, {}),
        ({"max_length": 110, "over_long": "drop"}, {}),
        ({"max_length": 111}, {}),
    ]
    for number, (options, changes) in enumerate(settings):
        path = save(tmp_path / str(number), **{"chat_template": None, **changes})
        batch = only_batch(InstructionData(path, val=given, **options))
        texts.append((batch["row"].tolist(), batch["input_ids"].tolist(), batch["labels"].tolist()))
    for i in range(len(texts)):
        assert texts[i] not in texts[:i], settings[i]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{input}\n"}, r"template has no placeholder \{instruction\}"),
        (
            {"template": "{instruction}\n"},
            r"no placeholder \{input\}, whose text would be lost: add it, or set input=None",
        ),
        (
            {"template": "{instruction} {input} {output}"},
            r"the placeholder \{output\}; it may have \{instruction\} and",
        ),
        ({"messages": "talk", "template": "{instruction}"}, "must be a chat template in Jinja"),
        ({"over_long": "cut"}, r"over_long must be one of \('truncate', 'drop', 'error'\), got 'cut'"),
        ({"empty_answers": "keep"}, r"empty_answers must be one of \('error', 'drop'\), got 'keep'"),
        ({"input": "output"}, "must be different columns, got 'instruction', 'output', 'output'"),
        ({"packing": True, "curriculum": object()}, "curriculum orders rows, and packing their packs"),
    ],
)
def test_contradicting_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InstructionData("-", **changes)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"output": ["yes", "  "]}, r"row 1 \(from 0\): column 'output' is empty, and there is no answer to learn"),
        ({"output": ["yes", None]}, r"row 1 \(from 0\): column 'output' is null"),
        ({"instruction": [None, "a"]}, r"row 0 \(from 0\): column 'instruction' is null"),
        ({"output": [1, 2]}, r"column 'output' must hold text, got 1"),
        ({"input": [1, 2]}, r"column 'input' must hold text, got 1"),
        (
            {"messages": [TALK, None]},
            r"row 1 \(from 0\): column 'messages': must be a list of one turn or more, got None",
        ),
        ({"messages": [[], TALK]}, r"row 0 .*column 'messages': must be a list of one turn or more"),
        ({"messages": ["a", "b"]}, "must be a list of one turn or more, got 'a'"),
        ({"messages": [[{"from": "human", "value": "a"}]] * 2}, "turn 0 must have a role and a content, got"),
        ({"messages": [[{"role": "tool", "content": "a"}]] * 2}, "turn 0 has the unknown role 'tool'; known: 'system'"),
        ({"messages": [TALK[1:2] * 2] * 2}, "turn 1 is the user's, and 'assistant' must speak"),
        ({"messages": [TALK[2:]] * 2}, "turn 0 is the assistant's, and 'user' must speak"),
        ({"messages": [[*TALK[1:3], TALK[0]]] * 2}, "turn 2 is the system's, and 'user' must speak"),
        (
            {"messages": [TALK[:2]] * 2},
            "the last turn must be the assistant's, got 'user': there is no answer to learn",
        ),
        ({"messages": [[{"role": "user", "content": " "}]] * 2}, r"turn 0 \(user\) must have some text, got ' '"),
    ],
)
def test_faulty_rows_are_named(folder: str, columns: dict[str, list[Any]], message: str) -> None:
    given = rows(2).remove_columns([name for name in columns if name != "messages"])
    for name, values in columns.items():
        given = given.add_column(name, values)
    options = {"messages": "messages", "template": CHAT} if "messages" in columns else {}
    with pytest.raises((ValueError, TypeError), match=message):
        InstructionData(folder, given, **options).setup("fit")


def test_a_missing_input_is_no_input(folder: str) -> None:
    first, second = (
        only_batch(InstructionData(folder, val=rows(1).remove_columns("input").add_column("input", [value])))
        for value in ("", None)
    )
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_faulty_files_are_named(folder: str, tmp_path: Path) -> None:
    good = json.dumps({"instruction": "a", "input": "", "output": "b"}).encode() + b"\n"
    packed = gzip.compress(good * 1000)
    for name, content, message in (
        ("empty.jsonl", b"", "has no rows"),
        ("column.jsonl", b'{"instruction": "a", "output": "b"}\n', "line 1 has no column 'input'"),
        ("latin.jsonl", good + good.replace(b'"b"', b'"\xe9"'), "line 2: not UTF-8"),
        ("half.jsonl.gz", packed[: len(packed) // 2], "damaged after line"),
        ("bad.jsonl", good + good.replace(b'"b"', b'""'), r"bad.jsonl, line 2: column 'output' is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            InstructionData(folder, str(tmp_path / name)).setup("fit")


def test_unfit_tokenizers_and_templates_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'no chat template: give it one, or template="auto" or a text'):
        InstructionData(folder, rows(2), template="chat").setup("fit")
    with pytest.raises(ValueError, match=r"no chat template: give it one, or template=\(one in Jinja\)"):
        InstructionData(folder, Dataset.from_dict({"messages": [TALK]}), messages="messages").setup("fit")
    with pytest.raises(ValueError, match="has no end-of-sequence token, which answers end with"):
        InstructionData(save(tmp_path / "a", eos_token=None, pad_token="a"), rows(2)).setup("fit")
    refusing = CHAT + "{{ raise_exception('no system turn') if messages[0].role == 'system' }}"
    thinking = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}")
    for template, message in (
        (refusing, r"refuses the conversation \(no system turn\)"),
        (thinking, "otherwise once turn"),
    ):
        with pytest.raises(ValueError, match=r"row 0 \(from 0\): column 'messages': the chat template .*" + message):
            InstructionData(
                folder, Dataset.from_dict({"messages": [TALK]}), messages="messages", template=template
            ).setup("fit")
