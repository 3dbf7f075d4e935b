from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_ft.core.layer_groups import LayerGroups
from tests.strangers import FILTERED
from tests.tiny import BERT, SEQ2SEQ, T5, TINY, tiny

# The oracle's own knowledge, by hand: where each architecture keeps its blocks.
BLOCKS = {
    "bert": ["bert.encoder.layer"],
    "distilbert": ["distilbert.transformer.layer"],
    "roberta": ["roberta.encoder.layer"],
    "deberta": ["deberta.encoder.layer"],
    "deberta-full": ["deberta.encoder.layer"],
    "electra": ["electra.encoder.layer"],
    "albert": ["albert.encoder.albert_layer_groups"],
    "xlnet": ["transformer.layer"],
    "gpt2": ["transformer.h"],
    "llama": ["model.layers"],
    "qwen3": ["model.layers"],
    "modernbert": ["model.layers"],
    "t5": ["transformer.encoder.block", "transformer.decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
}
UNUSED = {"transformer.mask_emb"}  # XLNet's, met only in pretraining


def ids() -> Tensor:
    # Sequences end in 2: BART pools its classification token there.
    tokens = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 2
    return tokens


def flatten(values: object) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    values = list(values.values()) if isinstance(values, dict) else values
    return [tensor for value in values for tensor in flatten(value)] if isinstance(values, (list, tuple)) else []


def blocks_of(model: nn.Module, name: str) -> list[nn.Module]:
    return [block for path in BLOCKS[name] for block in model.get_submodule(path)]


def block_inputs(model: nn.Module, blocks: list[nn.Module]) -> list[list[Tensor]]:
    """What each block receives when it first runs in a real forward pass."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def record(block: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.setdefault(block, [tensor.clone() for tensor in flatten((args, kwargs))])

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(input_ids=ids())
    for handle in handles:
        handle.remove()
    return [seen[block] for block in blocks]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_names_and_partition(name: str) -> None:
    model = tiny(name)
    groups = LayerGroups.of(model)
    prefixes = ["encoder.", "decoder."] if len(BLOCKS[name]) == 2 else [""]
    count = 1 if name == "albert" else 3
    middle = [f"{prefix}block.{i}" for prefix in prefixes for i in range(count)]
    assert [group for group in groups if group != "tail"] == ["embeddings", *middle, "head"]
    assert tuple(groups) == groups.names
    assert len(groups) == len(groups.names)
    pairs = [pair for group in groups for pair in groups.named_parameters(group)]
    assert sorted(pair[0] for pair in pairs) == sorted(key for key, _ in model.named_parameters())
    assert {id(p) for _, p in pairs} == {id(p) for p in model.parameters()}
    assert len(pairs) == len({id(p) for _, p in pairs})
    assert all(groups.names[groups.depth_of(p)] == groups.name_of(p) == g for g in groups for p in groups.parameters(g))
    for group, block in zip(middle, blocks_of(model, name), strict=True):
        assert {id(p) for p in block.parameters()} <= {id(p) for p in groups.parameters(group)}


@pytest.mark.parametrize("name", TINY)
def test_order_is_the_order_in_which_modules_run(name: str) -> None:
    model = tiny(name)
    groups = LayerGroups.of(model)
    fired: dict[nn.Module, None] = {}
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: fired.setdefault(module))
    model(input_ids=ids())
    inside = {module for block in blocks_of(model, name) for module in block.modules()}
    depths = []
    for module in fired:
        own = [p for _, p in module.named_parameters(recurse=False)]
        # A decoder's embeddings rightly run after the encoder's blocks: the only exception.
        late = len(BLOCKS[name]) == 2 and module not in inside and depths and max(depths) > 0
        if own and not (late and {groups.name_of(p) for p in own} == {"embeddings"}):
            depths += [groups.depth_of(p) for p in own]
    assert depths == sorted(depths)
    assert len(set(depths)) == len(groups)


@pytest.mark.parametrize("name", TINY)
def test_a_group_reaches_only_the_blocks_above_it(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    groups = LayerGroups.of(model)
    blocks = blocks_of(model, name)
    floors = [groups.depth_of(next(block.parameters())) for block in blocks]
    before = block_inputs(model, blocks)
    own = {id(p) for block in blocks for p in block.parameters()}
    for key, parameter in model.named_parameters():
        if id(parameter) in own:
            continue
        kept, depth = parameter.data.clone(), groups.depth_of(parameter)
        parameter.data.add_(torch.randn_like(kept))
        after = block_inputs(model, blocks)
        parameter.data.copy_(kept)
        reached = [floor for floor, old, new in zip(floors, before, after, strict=True) if not same(old, new)]
        assert all(floor > depth for floor in reached), key
        # Once around: what feeds a block sits right below the first block it feeds (embeddings may feed any).
        assert key in UNUSED or bool(reached) == (depth < max(floors)), key
        assert depth == 0 or not reached or min(reached) == depth + 1, key


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("deberta-full", "embeddings", {"encoder.rel_embeddings.weight", "encoder.LayerNorm.weight"}),
        ("deberta-full", "block.0", {"encoder.conv.conv.weight", "encoder.conv.LayerNorm.bias"}),
        ("t5", "encoder.block.0", {"layer.0.SelfAttention.relative_attention_bias.weight"}),
        ("t5", "encoder.block.2", {"encoder.final_layer_norm.weight"}),
        ("t5", "tail", {"decoder.final_layer_norm.weight"}),
        ("bart", "embeddings", {"encoder.layernorm_embedding.weight", "decoder.layernorm_embedding.weight"}),
        ("xlnet", "embeddings", {"transformer.mask_emb"}),
        ("albert", "embeddings", {"embedding_hidden_mapping_in.weight"}),
        ("bert", "tail", {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
        ("gpt2", "tail", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("llama", "tail", {"model.norm.weight"}),
    ],
)
def test_known_traps(name: str, group: str, expected: set[str]) -> None:
    found = [key for key, _ in LayerGroups.of(tiny(name)).named_parameters(group)]
    assert all(any(key.endswith(suffix) for key in found) for suffix in expected)


@pytest.mark.parametrize("name", TINY)
def test_only_albert_runs_a_block_several_times(name: str) -> None:
    assert LayerGroups.of(tiny(name)).shared == (("block.0",) if name == "albert" else ())


def test_bert_base_has_fifteen_groups_and_takes_under_a_second() -> None:
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
    start = time.perf_counter()
    groups = LayerGroups.of(model)
    assert time.perf_counter() - start < 1
    assert groups.names == ("embeddings", *(f"block.{i}" for i in range(12)), "tail", "head")
    sizes = [sum(p.numel() for p in groups.parameters(name)) for name in groups]
    assert sizes == [23_837_184, *[7_087_872] * 12, 590_592, 1_538]
    assert [len(groups.parameters(name)) for name in groups] == [5, *[16] * 12, 2, 2]
    assert repr(groups).splitlines()[:2] == [
        "group       tensors  parameters   share",
        "embeddings        5    23837184   21.8%",
    ]


class Hooked(nn.Module):
    """Whatever could be disturbed by a look at the model."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = tiny("bart")
        self.calls: list[object] = []
        self.deep.model.encoder.register_forward_hook(lambda *_: self.calls.append("hook"))
        self.deep.model.encoder.layers[1].requires_grad_(False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_module_and_the_world_are_left_as_they_were(mode: type) -> None:
    model = Hooked().train()
    model.deep.model.decoder.eval()

    def state() -> list[object]:
        modules = [(m, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [modules, [(id(p), p.requires_grad, p.device, p.grad, p._version) for p in model.parameters()]]

    before, values = state(), [p.clone() for p in model.parameters()]
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    with mode():
        LayerGroups.of(model)
    assert state() == before
    assert same(values, list(model.parameters()))
    assert attributes == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert model.calls == []
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad


class Odd(pl.LightningModule):
    """A stranger's: the classifier first, the encoder under any name, lists that are no blocks."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.final = nn.Linear(16, 2)
        self.task_heads = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)) for _ in range(4))
        self.quux = encoder
        self.users = nn.Embedding(1000, 16)
        self.metrics = nn.ModuleList([nn.Identity(), nn.Identity()])


@pytest.mark.parametrize("name", TINY)
def test_stranger_lightning_module(name: str) -> None:
    model = tiny(name)
    inner = model.base_model if name != "t5" else model.transformer
    odd = Odd(inner)
    groups, plain = LayerGroups.of(odd), LayerGroups.of(model)
    for group in plain.names[:-1]:
        assert [id(p) for p in groups.parameters(group)] == [id(p) for p in plain.parameters(group)]
    heads = [odd.final, odd.task_heads, odd.users]
    assert {id(p) for p in groups.parameters("head")} == {id(p) for part in heads for p in part.parameters()}


def test_odd_around_a_whole_classifier() -> None:
    model = tiny("bert")
    groups = LayerGroups.of(Odd(model))
    assert {id(p) for p in model.classifier.parameters()} <= {id(p) for p in groups.parameters("head")}
    assert {id(p) for p in groups.parameters("tail")} == {id(p) for p in model.bert.pooler.parameters()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on import of dynamo
@pytest.mark.parametrize("compiled", ["whole", "backbone", "block", "in place"])
def test_compiled(compiled: str) -> None:
    model = tiny("bert")
    plain = LayerGroups.of(model)
    if compiled == "whole":
        model = torch.compile(model)
    elif compiled == "backbone":
        model.bert = torch.compile(model.bert)
    elif compiled == "block":
        for i, block in enumerate(model.bert.encoder.layer):
            model.bert.encoder.layer[i] = torch.compile(block)
    else:
        model.bert.compile()
    groups = LayerGroups.of(model)
    assert groups.names == plain.names
    assert [[id(p) for p in groups.parameters(n)] for n in groups] == [
        [id(p) for p in plain.parameters(n)] for n in plain
    ]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # between peft and transformers
def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"])
    groups = LayerGroups.of(peft.get_peft_model(tiny("bert"), config))
    assert groups.names == ("embeddings", "block.0", "block.1", "block.2", "tail", "head")
    for i in range(3):
        lora = [key for key, _ in groups.named_parameters(f"block.{i}") if "lora_" in key]
        assert len(lora) == 2
        assert all(f"layer.{i}." in key for key in lora)
    assert {key.split("classifier.")[1] for key, _ in groups.named_parameters("head")} == {
        f"{copy}.{kind}" for copy in ("original_module", "modules_to_save.default") for kind in ("weight", "bias")
    }


class Towers(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.score = left, right, nn.Linear(32, 1)


def bert(layers: int = 3) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**{**BERT, "num_hidden_layers": layers}))


def test_siamese_is_one_encoder() -> None:
    shared = bert()
    groups = LayerGroups.of(Towers(shared, shared))
    assert groups.names == ("embeddings", "block.0", "block.1", "block.2", "tail", "head")
    assert [id(p) for p in groups.parameters("block.1")] == [id(p) for p in shared.encoder.layer[1].parameters()]


def test_two_encoders_are_merged_by_depth() -> None:
    left, right = bert(), bert()
    groups = LayerGroups.of(Towers(left, right))
    assert groups.names == ("embeddings", "block.0", "block.1", "block.2", "tail", "head")
    both = [*left.encoder.layer[1].parameters(), *right.encoder.layer[1].parameters()]
    assert [id(p) for p in groups.parameters("block.1")] == [id(p) for p in both]
    tail = [*left.pooler.parameters(), *right.pooler.parameters()]
    assert [id(p) for p in groups.parameters("tail")] == [id(p) for p in tail]


def test_unequal_encoders_raise_and_blocks_settles() -> None:
    model = Towers(bert(3), bert(2))
    with pytest.raises(ValueError, match=r"blocks= must name one .*left\.encoder\.layer \(3\), right\.encoder\.layer"):
        LayerGroups.of(model)
    one = LayerGroups.of(model, blocks="left.encoder.layer")
    assert {id(p) for p in model.right.parameters()} <= {id(p) for p in one.parameters("head")}
    stacked = LayerGroups.of(model, blocks=["right.encoder.layer", "left.encoder.layer"])
    middle = ["right.block.0", "right.block.1", "left.block.0", "left.block.1", "left.block.2"]
    assert stacked.names == ("embeddings", *middle, "tail", "head")


def test_untied_encoder_decoder_is_stacked_since_one_feeds_the_other() -> None:
    encoder, decoder = hf.BertConfig(**BERT), hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = hf.EncoderDecoderModel(config=config)
    groups = LayerGroups.of(model)
    middle = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)]
    assert groups.names == ("embeddings", *middle, "head")


def test_seq2seq_lm_head_is_tied_or_head() -> None:
    model = hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, **T5))
    groups = LayerGroups.of(model)
    assert "head" not in groups
    assert groups.name_of(model.lm_head.weight) == "embeddings"
    model.lm_head = nn.Linear(16, 50, bias=False)
    assert LayerGroups.of(model).name_of(model.lm_head.weight) == "head"


def test_tied_weight_belongs_to_the_earliest_group_once() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
    groups = LayerGroups.of(model)
    assert groups.names == ("embeddings", "block.0", "tail")
    assert groups.name_of(model.lm_head.weight) == "embeddings"
    assert sum(p is model.lm_head.weight for g in groups for p in groups.parameters(g)) == 1


def test_equal_values_are_kept_apart() -> None:
    model = tiny("bert")
    for parameter in model.parameters():
        parameter.data.zero_()
    groups = LayerGroups.of(model)
    assert sum(len(groups.parameters(group)) for group in groups) == len(list(model.parameters()))
    norms = [layer.output.LayerNorm.weight for layer in model.bert.encoder.layer]
    assert [groups.name_of(norm) for norm in norms] == ["block.0", "block.1", "block.2"]


class Plain(nn.Module):
    """A torch-only transformer that is its own backbone; `forward` may be one that no dummy can run."""

    def __init__(self, *, runs: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc = nn.Linear(16, 2)
        self.norm = nn.LayerNorm(16)
        self.encoder = nn.TransformerEncoder(layer, 3)
        self.tokens = nn.Embedding(50, 16)
        self.runs = runs

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.runs:
            raise RuntimeError("only batches of dictionaries")
        return self.fc(self.encoder(self.norm(self.tokens(tokens))).mean(1))


def test_self_backbone() -> None:
    model = Plain()
    groups = LayerGroups.of(model)
    assert groups.names == ("embeddings", "block.0", "block.1", "block.2", "tail")
    assert [key for key, _ in groups.named_parameters("embeddings")] == ["norm.weight", "norm.bias", "tokens.weight"]
    assert LayerGroups.of(model, head="fc").names == ("embeddings", "block.0", "block.1", "block.2", "head")
    assert LayerGroups.of(model, blocks="encoder.layers", head=["fc"]).names[-1] == "head"


def test_autocast_of_the_models_own_is_no_obstacle() -> None:
    class Rotary(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            if not torch.is_autocast_enabled(tokens.device.type):
                with torch.autocast(device_type=tokens.device.type, enabled=False):
                    return super().forward(tokens)
            return super().forward(tokens)

    before = torch.autocast, torch.is_autocast_enabled
    assert LayerGroups.of(Rotary(), head="fc").names == ("embeddings", "block.0", "block.1", "block.2", "head")
    assert (torch.autocast, torch.is_autocast_enabled) == before


@pytest.mark.parametrize("ending", ["raises", "hides its output"])
def test_a_run_that_breaks_off_above_the_blocks_still_tells_what_feeds_them(ending: str) -> None:
    class Broken(Plain):
        def forward(self, tokens: Tensor, labels: Tensor) -> object:
            logits = super().forward(tokens)
            return nn.functional.cross_entropy(logits, labels) if ending == "raises" else iter([logits])

    groups = LayerGroups.of(Broken())
    assert [key for key, _ in groups.named_parameters("embeddings")] == ["norm.weight", "norm.bias", "tokens.weight"]
    assert [key for key, _ in groups.named_parameters("tail")] == ["fc.weight", "fc.bias"]


def test_a_backbone_that_does_not_run_is_placed_by_registration_order_aloud() -> None:
    model = Plain(runs=False)
    with pytest.warns(UserWarning, match=r"4 tensors .*registration order.*only batches of dictionaries.*groups="):
        groups = LayerGroups.of(model)
    assert groups.name_of(model.fc.weight) == "embeddings"
    with pytest.warns(UserWarning, match="2 tensors"):
        groups = LayerGroups.of(model, head="fc")
    assert groups.name_of(model.norm.weight) == "embeddings"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LayerGroups.of(model, head=["fc", "norm"]).names[-1] == "head"


def test_head_settles_an_open_backbone() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(8, 16)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))

    model = nn.ModuleDict({"encoder": Positions(), "tokens": nn.Embedding(50, 16), "score": nn.Linear(16, 2)})
    with pytest.raises(ValueError, match=r"head= must name the head here: .* 'encoder\.layers'"):
        LayerGroups.of(model)
    groups = LayerGroups.of(model, head="score")
    assert groups.names == ("embeddings", "block.0", "block.1", "head")
    assert groups.name_of(model["tokens"].weight) == "embeddings"


def test_one_block_and_experts_inside_blocks() -> None:
    assert LayerGroups.of(bert(1)).names == ("embeddings", "block.0", "tail")

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(4))

        def forward(self, hidden: Tensor) -> Tensor:
            return sum(expert(hidden) for expert in self.experts)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.layers = nn.Embedding(50, 16), nn.Sequential(Expert(), Expert())

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layers(self.tokens(tokens))

    assert LayerGroups.of(Mixture()).names == ("embeddings", "block.0", "block.1")


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))


def test_explicit_groups() -> None:
    groups = LayerGroups.of(cnn(), groups={"stem": r"^[01]\.", "stage": r"^2\.", "head": r"^4\."})
    assert groups.names == ("stem", "stage", "head")
    assert [key for key, _ in groups.named_parameters("stem")] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"stem": "^0", "rest": "^[0124]"}, r"exactly one .* 0\.weight \(stem and rest\)"),
        ({"stem": "^0"}, r"exactly one .*1\.weight \(none\)"),
        ({"stem": "^[0124]", "top": "fc"}, r"groups\['top'\] = 'fc' matches no parameter; there are: 0\.weight"),
    ],
)
def test_explicit_groups_raise(groups: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerGroups.of(cnn(), groups=groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": "bert.layers"}, r"blocks= must name a ModuleList .*'bert\.layers'.*bert\.encoder\.layer"),
        ({"head": "clasifier"}, r"head= must name a submodule; got 'clasifier'.*classifier"),
        ({"head": "bert"}, r"head= must lie outside the blocks.*bert\.encoder\.layer"),
        ({"head": "classifier", "groups": {"all": "."}}, "groups= says all by itself"),
        ({"blocks": ["bert.encoder.layer", "bert.encoder.layer"]}, "blocks= must name distinct lists"),
    ],
)
def test_arguments_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerGroups.of(tiny("bert"), **arguments)


def test_ambiguity_and_absence_raise() -> None:
    with pytest.raises(ValueError, match="blocks= must name the list of blocks here: no ModuleList"):
        LayerGroups.of(cnn())
    with pytest.raises(ValueError, match="module must have parameters, and Identity has none"):
        LayerGroups.of(nn.Identity())
    layers = nn.TransformerEncoderLayer(16, 2, 32)
    double = nn.ModuleDict({"tokens": nn.Embedding(9, 16), **{k: nn.ModuleList([layers]) for k in ("first", "second")}})
    with pytest.raises(ValueError, match=r"blocks= .* or several bottom to top: found first, second in one backbone"):
        LayerGroups.of(double)


def test_lookups_raise() -> None:
    groups = LayerGroups.of(tiny("bert"))
    assert "head" in groups
    assert "neck" not in groups
    with pytest.raises(ValueError, match=r"name must be one of embeddings, .* got 'neck'"):
        groups.parameters("neck")
    stranger = nn.Parameter(groups.parameters("head")[0].detach().clone())
    with pytest.raises(ValueError, match="in no group: the module was changed"):
        groups.depth_of(stranger)


def test_constructor_checks_the_partition() -> None:
    model = nn.Linear(2, 2)
    weight, bias = model.named_parameters()
    with pytest.raises(ValueError, match="'weight' is in 'a' and again in 'b'"):
        LayerGroups(model, {"a": [weight, bias], "b": [weight]})
    with pytest.raises(ValueError, match="in no group: bias"):
        LayerGroups(model, {"a": [weight]})
    with pytest.raises(ValueError, match="strangers: other"):
        LayerGroups(model, {"a": [weight, bias, ("other", nn.Parameter(bias[1].detach().clone()))]})
    assert LayerGroups(model, {"a": [weight, bias], "empty": []}).names == ("a",)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("head", ["head"]),
        ("all", ["embeddings", "block.0", "block.1", "block.2", "tail", "head"]),
        ("blocks", ["block.0", "block.1", "block.2"]),
        ("top:2", ["block.1", "block.2"]),
        ("bottom:1", ["block.0"]),
        ("block.1..tail", ["block.1", "block.2", "tail"]),
        (r"block\.[02]", ["block.0", "block.2"]),
        (["head", "top:1", "embeddings", "block.2"], ["embeddings", "block.2", "head"]),
    ],
)
def test_groups_are_selected_by_what_a_person_writes(what: Any, expected: list[str]) -> None:
    assert list(LayerGroups.of(FILTERED.module()).select(what)) == expected


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("block.3", r"'block.3' matches none of the groups embeddings, block.0, block.1, block.2, tail, head"),
        ("block", "'block' matches none"),  # whole names only
        ("top:4", "'top:4' must ask for 1 to 3 blocks"),
        ("bottom:0", "'bottom:0' must ask for 1 to 3 blocks"),
        ("tail..block.0", "'tail..block.0' must go from bottom to top: write block.0..tail"),
        ([], r"must name one group or more of embeddings, .*; got \[\]"),
    ],
)
def test_selections_of_nothing_are_refused(what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerGroups.of(FILTERED.module()).select(what)


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """The mesh of a process group whose second process is pretended: enough to shard, not to gather."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def fsdp2(model: nn.Module, blocks: list[nn.Module], mesh: Any) -> nn.Module:
    for part in (*blocks[1:], model):
        fully_shard(part, mesh=mesh)
    return model


def fsdp1(model: nn.Module, blocks: list[nn.Module], mesh: Any) -> nn.Module:
    policy = partial(lambda_auto_wrap_policy, lambda_fn=blocks.__contains__)
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def checkpointed(model: nn.Module, blocks: list[nn.Module], mesh: Any) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=blocks[1:].__contains__)
    return model


def both(model: nn.Module, blocks: list[nn.Module], mesh: Any) -> nn.Module:
    model = fsdp1(model, blocks, mesh)
    apply_activation_checkpointing(model, check_fn=blocks.__contains__)
    return model


@pytest.mark.parametrize("shard", [fsdp2, fsdp1, checkpointed, both])
@pytest.mark.parametrize("name", ["bert", "deberta-full", "albert", "gpt2", "llama", "t5", "bart"])
def test_a_sharded_model_has_the_groups_and_names_of_the_whole_one(name: str, shard: Any, two_processes: Any) -> None:
    model = tiny(name)
    plain = LayerGroups.of(model)
    whole = {group: [(key, p.shape) for key, p in plain.named_parameters(group)] for group in plain}
    sharded = shard(model, blocks_of(model, name), two_processes)
    groups = LayerGroups.of(sharded)
    assert {g: [(key, groups.shape_of(p)) for key, p in groups.named_parameters(g)] for g in groups} == whole
    assert groups.names == plain.names
    assert repr(groups) == repr(plain)
    # And by the paths and names that it had before.
    if len(BLOCKS[name]) == 1:
        assert LayerGroups.of(sharded, blocks=BLOCKS[name]).names == plain.names
    first = next(key for key, _ in plain.named_parameters("embeddings"))
    by_regex = LayerGroups.of(sharded, groups={"a": f"^{re.escape(first)}$", "b": f"^(?!{re.escape(first)}$)"})
    assert [key for key, _ in by_regex.named_parameters("a")] == [first]


def test_a_sharded_block_list_of_bare_layers_still_gives_way(two_processes: Any) -> None:
    model = Odd(Plain())
    model.task_heads = nn.ModuleList(nn.Linear(16, 2) for _ in range(3))
    plain = LayerGroups.of(model)
    blocks = [*model.quux.encoder.layers, *model.task_heads]
    assert LayerGroups.of(fsdp2(model, blocks, two_processes)).names == plain.names


def test_a_forward_method_of_fsdp2_does_not_run_the_original(two_processes: Any) -> None:
    class Split(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.fc(self.encode(tokens))

        def encode(self, tokens: Tensor) -> Tensor:
            return self.encoder(self.norm(self.tokens(tokens))).mean(1)

    model = Split()
    plain = LayerGroups.of(model)
    fsdp2(model, list(model.encoder.layers), two_processes)
    register_fsdp_forward_method(model, "encode")
    assert repr(LayerGroups.of(model)) == repr(plain)


def test_a_flat_parameter_of_many_layers_is_refused_with_the_remedy(two_processes: Any) -> None:
    model = FSDP(tiny("bert"), use_orig_params=False, device_id=torch.device("cpu"))
    pieces = FSDP(tiny("bert"), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"use_orig_params=False.*melts.*use_orig_params=True"):
        LayerGroups.of(model)
    with pytest.raises(ValueError, match="pieces of unknown shape; pass the module that FullyShardedDataParallel"):
        LayerGroups.of(pieces.module)
