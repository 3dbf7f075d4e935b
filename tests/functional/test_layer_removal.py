from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_ft.core import Layers
from lightning_ft.functional.layer_removal import layers_removed, layers_to_drop, remove_layers
from tests.strangers import VOCABULARY, Encoder, Filtered, weights
from tests.tiny import BART, BERT, GPT2, LLAMA, SEQ2SEQ, T5, TINY, tiny

IDS = torch.tensor([[5, 9, 7, 11, 30, 2], [8, 6, 41, 13, 12, 2]])
MODELS = [name for name in TINY if name != "albert"]
FOUR = {**BERT, "num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()


def reload(model: Any, folder: Path) -> Any:
    """The model from its saved folder, where every weight must be found and none may be left over."""
    model.save_pretrained(folder)
    found, facts = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(facts[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval()


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def config_numbers(config: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if isinstance(value, (int, list))}


@pytest.mark.parametrize("name", MODELS)
def test_saved_folder_holds_the_shorter_model(name: str, tmp_path: Path) -> None:
    model = reload(tiny(name), tmp_path / "full")
    full, before, start = copy.deepcopy(model), config_numbers(model.config), weights(model)
    report = remove_layers(model, [1], stack="all")
    lists = [row["list"] for row in report.rows]
    assert len(lists) == (2 if name in ("t5", "bart") else 1)
    for path in lists:
        blocks = model.get_submodule(path)
        assert len(blocks) == 2
        # The oracle: the other blocks where they were, without a cache.
        kept = nn.ModuleList(full.get_submodule(path)[i] for i in (0, 2))
        full.get_submodule(path.rpartition(".")[0])._modules[path.rpartition(".")[2]] = kept
        for ours, theirs in zip(blocks, kept, strict=True):
            assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    if name == "xlnet":  # loops over a number that only the surgery knows to lower
        full.transformer.n_layer = 2
    assert torch.equal(logits(model), logits(full, **({} if name == "xlnet" else {"use_cache": False})))
    outside = {key for key in start if not any(key.startswith(f"{path}.") for path in lists)}
    assert all(torch.equal(model.state_dict()[key], start[key]) for key in outside)

    again = reload(model, tmp_path / "short")
    assert torch.equal(logits(again), logits(model))
    after = config_numbers(model.config)
    moved = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert all((old == 3 and new == 2) or (len(old), len(new)) == (3, 2) for old, new in moved.values()), moved
    assert config_numbers(again.config) == after
    assert layers_removed(again, [1], stack="all")


def test_drops_two_of_four(tmp_path: Path) -> None:
    model = reload(hf.BertForSequenceClassification(hf.BertConfig(**FOUR)), tmp_path / "full")
    names = set(model.state_dict())
    report = remove_layers(model, "top:2")
    assert report.rows == [
        {"stack": "block", "list": "bert.encoder.layer", "blocks": 4, "dropped": "[2, 3]", "kept": "[0, 1]"}
    ]
    assert len(names - set(model.state_dict())) == 32
    assert model.config.num_hidden_layers == 2
    again = reload(model, tmp_path / "short")
    assert torch.equal(logits(again), logits(model))
    # Opened by another head, too.
    assert len(hf.AutoModelForTokenClassification.from_pretrained(tmp_path / "short").bert.encoder.layer) == 2


def generators() -> dict[str, Any]:
    seq2seq = {**SEQ2SEQ, "decoder_start_token_id": 2}
    return {
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
        "t5": hf.T5ForConditionalGeneration(hf.T5Config(**{**SEQ2SEQ, **T5})),
        "bart": hf.BartForConditionalGeneration(hf.BartConfig(**{**seq2seq, **BART}, forced_eos_token_id=None)),
    }


def decoded(model: Any, *, use_cache: bool) -> Tensor:
    """Logits of eight steps of greedy decoding, however many of them are a full stop."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return torch.stack(
        model.generate(IDS, use_cache=use_cache, output_logits=True, return_dict_in_generate=True, **settings).logits
    )


@pytest.mark.parametrize("drop", [[1], [0], "top:1"], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_generates_with_the_cache_as_without(name: str, drop: Any, tmp_path: Path) -> None:
    model = generators()[name].eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # or all logits are the same
    stack = "decoder" if name in ("t5", "bart") else None
    if (name, drop) == ("t5", [0]):
        with pytest.raises(ValueError, match=r"SelfAttention.relative_attention_bias.*keep block 0"):
            remove_layers(model, drop, stack=stack)
        return
    full = copy.deepcopy(model)
    remove_layers(model, drop, stack=stack)
    cached = decoded(model, use_cache=True)
    torch.testing.assert_close(cached, decoded(model, use_cache=False), rtol=0, atol=1e-4)
    assert torch.equal(cached, decoded(reload(model, tmp_path), use_cache=True))
    assert not torch.allclose(cached, decoded(full, use_cache=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "bert", "bart"])
def test_positions_in_the_cache_are_those_in_the_list(name: str) -> None:
    model = tiny(name)
    (row, *_) = remove_layers(model, [0], stack="all").rows
    found = [
        {child.layer_idx for child in block.modules() if hasattr(child, "layer_idx")}
        for block in model.get_submodule(row["list"])
    ]
    assert found == [{0}, {1}]


def test_each_stack_has_its_own_setting(tmp_path: Path) -> None:
    model = reload(generators()["t5"], tmp_path / "t5")
    remove_layers(model, "top:2", stack="decoder")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 1)
    assert model.decoder.config.num_layers == 1
    assert model.encoder.config.num_layers == 3
    remove_layers(model, "top:1", stack="encoder.block")
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 1)
    assert model.encoder.config.num_layers == 2
    inputs = {"decoder_input_ids": IDS}
    assert torch.equal(logits(reload(model, tmp_path / "short"), **inputs), logits(model.eval(), **inputs))
    bart = generators()["bart"]
    remove_layers(bart, "bottom:1", stack="model.encoder.layers")
    assert (bart.config.encoder_layers, bart.config.decoder_layers, bart.config.num_hidden_layers) == (2, 3, 2)


def test_numbers_that_happen_to_equal_the_depth_stay(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**{**LLAMA, "num_hidden_layers": 2, "eos_token_id": [2, 3]})
    model = reload(hf.LlamaForSequenceClassification(config), tmp_path / "full")
    assert (model.config.num_attention_heads, model.config.num_labels) == (2, 2)
    remove_layers(model, "top:1")
    assert model.config.num_hidden_layers == 1
    assert (model.config.num_attention_heads, model.config.num_labels) == (2, 2)
    assert model.config.eos_token_id == [2, 3]
    assert torch.equal(logits(reload(model, tmp_path / "short")), logits(model))


class TowerConfig(hf.PreTrainedConfig):
    model_type = "tower"

    def __init__(self, storeys: int = 3, widths: Any = (4, 5, 6), tokens: Any = (1, 2, 3), **kwargs: Any) -> None:
        self.storeys, self.widths, self.tokens = storeys, list(widths), list(tokens)
        super().__init__(**kwargs)


class Storey(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(self.up(hidden).relu())


class Tower(hf.PreTrainedModel):
    config_class = TowerConfig
    base_model_prefix = "tower"

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(50, 8)
        self.storeys = nn.Sequential(*(Storey(config.widths[i]) for i in range(config.storeys)))
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.storeys(self.words(input_ids))


def test_settings_are_found_by_what_they_build_and_not_by_name(tmp_path: Path) -> None:
    model = reload(Tower(TowerConfig()), tmp_path / "full")
    remove_layers(model, [1])
    assert (model.config.storeys, model.config.widths, model.config.tokens) == (2, [4, 6], [1, 2, 3])
    assert torch.equal(reload(model, tmp_path / "short")(IDS), model(IDS))


def test_refuses_what_the_configuration_cannot_say() -> None:
    class Fixed(Tower):
        def __init__(self, config: TowerConfig) -> None:
            super().__init__(config)
            self.storeys = nn.Sequential(*(Storey(4) for _ in range(3)))

    model = Fixed(TowerConfig())
    before = weights(model)
    with pytest.raises(ValueError, match=r"a Fixed cannot be saved without .*\(with storeys=2 it has 3 blocks\)"):
        remove_layers(model, [1])
    assert (weights(model).keys(), model.config.storeys) == (before.keys(), 3)


@pytest.mark.parametrize(("name", "part"), [("t5", "relative_attention_bias"), ("modernbert", "attn_norm")])
def test_refuses_to_drop_a_first_block_unlike_the_others(name: str, part: str) -> None:
    model = tiny(name)
    start, config = weights(model), copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=f"block 1 in place 0 differs in .*{part}"):
        remove_layers(model, "bottom:1", stack="all")
    assert weights(model).keys() == start.keys()
    assert model.config.to_dict() == config.to_dict()


def test_all_stacks_or_none() -> None:
    model = hf.T5Model(hf.T5Config(**{**SEQ2SEQ, **T5, "num_layers": 4, "num_decoder_layers": 2}))
    with pytest.raises(ValueError, match=r"drop=\[3\] must hold distinct indices from 0 to 1"):
        remove_layers(model, [3], stack="all")
    assert (len(model.encoder.block), len(model.decoder.block), model.config.num_layers) == (4, 2, 4)


class Indexed(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.index, self.even = nn.Linear(8, 8), index + 1, index % 2 == 0

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class Plain(nn.Module):
    def __init__(self, *, counts: bool = False, named: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8)
        blocks = {f"floor{i}" if named else str(i): Indexed(i) for i in range(4)}
        self.blocks = nn.Sequential()
        for name, block in blocks.items():
            self.blocks.add_module(name, block)
        self.counts = counts

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        for i in range(4 if self.counts else len(self.blocks)):
            hidden = self.blocks[i](hidden)
        return hidden


def test_plain_torch_blocks_are_renumbered() -> None:
    model = Plain()
    first, last = model.blocks[0], model.blocks[3]
    report = remove_layers(model, "symmetric")
    assert list(model.blocks._modules.items()) == [("0", first), ("1", last)]
    assert ([first.index, last.index], [first.even, last.even]) == ([1, 2], [True, False])
    assert report.facts == {"parameters before": 160 + 4 * 72, "parameters after": 160 + 2 * 72}
    assert layers_removed(model, "symmetric")
    assert not layers_removed(model, "top:1")
    named = Plain(named=True)
    remove_layers(named, [0])
    assert list(named.blocks._modules) == ["floor1", "floor2", "floor3"]


def test_refuses_a_forward_pass_that_counts() -> None:
    model = Plain(counts=True)
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"Plain.forward does not run without the blocks \[3\] of blocks: .*IndexError"
    ):
        remove_layers(model, "top:1")
    assert weights(model).keys() == before.keys()
    assert model.blocks[3].index == 4


def test_twice_and_further() -> None:
    model = Filtered()
    remove_layers(model, "top:1")
    assert layers_removed(model, "top:1")
    assert layers_removed(model, [2])
    assert not layers_removed(model, [9])
    remove_layers(model, "top:1")
    assert len(model.encoder.layers) == 1
    with pytest.raises(ValueError, match=r"encoder.layers holds one block alone"):
        remove_layers(model, "top:1")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = Encoder(), Encoder()
        self.score = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.query(ids) * self.document(ids))


def test_parallel_encoders() -> None:
    model = Two()
    with pytest.raises(ValueError, match=r"stack=None must name one of .*\(query.layers\), .*\(document.layers\), or"):
        remove_layers(model, "top:1")
    remove_layers(model, "top:1", stack="query.layers")
    assert (len(model.query.layers), len(model.document.layers)) == (2, 3)
    model = Two()
    remove_layers(model, "top:1", stack="all")
    assert (len(model.query.layers), len(model.document.layers)) == (2, 2)


@pytest.mark.parametrize(
    ("drop", "count", "expected"),
    [
        ("top:2", 12, [10, 11]),
        ("bottom:3", 12, [0, 1, 2]),
        ("alternate", 12, [1, 3, 5, 7, 9, 11]),
        ("alternate:2", 12, [9, 11]),
        ("alternate", 5, [2, 4]),
        ("symmetric", 12, [3, 4, 5, 6, 7, 8]),
        ("symmetric:1", 4, [2]),
        ("symmetric:2", 5, [2, 3]),
        ([3, 0], 4, [0, 3]),
    ],
)
def test_which_blocks_go(drop: Any, count: int, expected: list[int]) -> None:
    assert layers_to_drop(drop, count) == expected


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("topmost", r"drop='topmost' must be \"top:2\", \"bottom:1\""),
        ("top", r"drop='top' must be \"top:2\""),
        ("top:3", "drop='top:3' must take 1 to 2 of the 3 blocks away"),
        ("top:0", "drop='top:0' must take 1 to 2"),
        ("alternate:2", "drop='alternate:2' must take 1 to 1 of the 3 blocks away"),
        ([0, 1, 2], r"drop=\[0, 1, 2\] would take all 3 blocks away: keep one or more"),
        ([3], r"drop=\[3\] must hold distinct indices from 0 to 2"),
        ([-1], "must hold distinct indices from 0 to 2"),
        ([1, 1], "must hold distinct indices"),
        ([], "must hold distinct indices"),
        ([True], "must hold distinct indices"),
    ],
)
def test_refuses_a_wrong_drop(drop: Any, message: str) -> None:
    model = Filtered()
    with pytest.raises(ValueError, match=message):
        remove_layers(model, drop)
    assert len(model.encoder.layers) == 3


def test_refuses_a_wrong_stack_one_block_and_bare_patterns() -> None:
    with pytest.raises(ValueError, match=r"stack=None must name one of the stacks of blocks: 'encoder' \(transformer"):
        remove_layers(tiny("t5"), "top:1")
    with pytest.raises(ValueError, match=r"stack='middle' must name .*'block' \(bert.encoder.layer\), or 'all'"):
        remove_layers(tiny("bert"), "top:1", stack="middle")
    with pytest.raises(ValueError, match="albert_layer_groups holds one block alone, so none can go"):
        remove_layers(tiny("albert"), "top:1")
    with pytest.raises(ValueError, match=r"Layers\(groups=...\) names parameters and no list of blocks"):
        remove_layers(Filtered(), "top:1", layers=Layers(groups={"all": ""}))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_refuses_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="query is an adapter of peft: remove layers before get_peft_model"):
        remove_layers(model, "top:1")
