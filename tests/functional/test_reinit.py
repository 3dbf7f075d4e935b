from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.utils import parametrizations

from lightning_ft.core import LayerGroups, Layers
from lightning_ft.core.fresh import fresh_parameters
from lightning_ft.functional.reinit import reinit_layers, reinit_targets
from tests.strangers import Encoder, Filtered, weights
from tests.tiny import BART, BERT, GPT2, SEQ2SEQ, T5, TINY, tiny

MODELS = [name for name in TINY if name != "albert"]
HAS_POOLER = {"bert"}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()


def loaded(model: nn.Module, folder: Path) -> Any:
    """Saved with weights that no scheme draws, and loaded again: transformers marks them as initialised."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) + 0.1)
    model.save_pretrained(folder)
    found = type(model).from_pretrained(folder)
    assert all(p._is_hf_initialized for p in found.parameters())
    return found


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}


def names_below(model: nn.Module, paths: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() for path in paths if name.startswith(f"{path}.")}


@pytest.mark.parametrize("name", MODELS)
def test_redraws_the_top_blocks_of_a_loaded_model_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = loaded(tiny(name), tmp_path)
    before, random_state = weights(model), torch.get_rng_state()
    blocks = LayerGroups.of(model).select("top:2")
    report = reinit_layers(model, 2)

    assert torch.equal(torch.get_rng_state(), random_state)
    paths = [row["module"] for row in report.rows]
    assert [row["group"] for row in report.rows] == [*blocks, *(["tail"] if name in HAS_POOLER else [])]
    drawn = changed(model, before)
    assert drawn == names_below(model, paths)
    assert report.facts["tensors"] == len(drawn)
    for key in drawn:
        value = model.state_dict()[key]
        if key.endswith(".bias"):
            assert not value.any(), key
        elif value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), key
        elif "relative_attention_bias" not in key:
            assert abs(float(value.mean())) < 0.2 < float(before[key].mean()), key
    assert all(p._is_hf_initialized for p in model.parameters())
    assert fresh_parameters(model) == {p for n, p in model.named_parameters() if n in drawn}


def wide(name: str) -> Any:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 50}
    if name == "bert":
        return hf.BertModel(hf.BertConfig(**{**BERT, **size}))
    if name == "gpt2":
        return hf.GPT2Model(hf.GPT2Config(n_embd=128, n_layer=3, n_head=2, vocab_size=50))
    if name == "llama":
        return hf.LlamaModel(hf.LlamaConfig(**size, num_hidden_layers=3, num_key_value_heads=2))
    return hf.T5Model(hf.T5Config(**{**SEQ2SEQ, "d_model": 128}, d_kv=64, d_ff=256, num_layers=3, num_heads=2))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_scheme_is_the_one_that_draws_a_new_model(name: str, tmp_path: Path) -> None:
    model, new = loaded(wide(name), tmp_path), weights(wide(name))
    before = weights(model)
    reinit_layers(model, 2, seed=7)
    drawn = changed(model, before)
    for key in drawn:
        value = model.state_dict()[key]
        if value.ndim > 1:
            assert float(value.std()) == pytest.approx(float(new[key].std()), rel=0.05), key
        else:
            assert torch.equal(value, new[key]), key
    stds = {key.rsplit(".", 2)[-2]: float(model.state_dict()[key].std()) for key in drawn if key.endswith("weight")}
    if name == "bert":
        assert stds["query"] == pytest.approx(0.02, rel=0.05)
    if name == "gpt2":
        assert stds["c_proj"] == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
        assert stds["c_fc"] == pytest.approx(0.02, rel=0.05)
    if name == "t5":
        assert stds["q"] == pytest.approx((128 * 64) ** -0.5, rel=0.05)


def test_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    model = loaded(tiny("bert"), tmp_path)
    reinit_layers(model, 1, seed=1)
    first = weights(model)
    torch.randn(3)
    reinit_layers(model, 1, seed=1)
    assert not changed(model, first)
    reinit_layers(model, 1, seed=2)
    assert "bert.encoder.layer.2.output.dense.weight" in changed(model, first)


def test_torch_layers_draw_themselves() -> None:
    model = Filtered()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(3)
    before = weights(model)
    reinit_layers(model, 1)
    assert changed(model, before) == names_below(model, ["encoder.layers.2"])
    block = weights(model.encoder.layers[2])
    xavier, kaiming = math.sqrt(6 / (8 + 24)), 1 / math.sqrt(8)
    assert 0.9 * xavier < float(block["self_attn.in_proj_weight"].abs().max()) <= xavier
    assert 0.8 * kaiming < float(block["linear1.weight"].abs().max()) <= kaiming
    assert not block["self_attn.in_proj_bias"].any()
    assert not block["self_attn.out_proj.bias"].any()
    assert torch.equal(block["norm1.weight"], torch.ones(8))


def test_pooler_and_no_other_last_layer() -> None:
    bert = tiny("bert")
    assert reinit_targets(bert, 0) == {"bert.pooler": "tail"}
    assert reinit_targets(bert, 0, pooler=False) == {}
    assert reinit_layers(bert, 0, pooler=False).rows == []
    assert reinit_targets(bert, 0, pooler="classifier") == {"classifier": "tail"}
    size = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50}
    opt = hf.OPTModel(hf.OPTConfig(**size, word_embed_proj_dim=8, max_position_embeddings=32))
    assert opt.decoder.project_out is not None
    assert reinit_targets(opt, 1) == {"decoder.layers.1": "block.1"}


def test_groups_by_name_in_an_encoder_decoder_leave_the_final_norm(tmp_path: Path) -> None:
    model = loaded(tiny("t5"), tmp_path)
    before = weights(model)
    reinit_layers(model, groups="encoder.block.2")
    assert changed(model, before) == names_below(model, ["transformer.encoder.block.2"])
    assert reinit_targets(tiny("bart"), groups=["encoder.block.0", "decoder.block.0"]) == {
        "model.encoder.layers.0": "encoder.block.0",
        "model.decoder.layers.0": "decoder.block.0",
    }


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = Encoder(), Encoder()
        self.score = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.query(ids) * self.document(ids))


def test_parallel_encoders_and_regular_expressions() -> None:
    assert reinit_targets(Two()) == {"query.layers.2": "block.2", "document.layers.2": "block.2"}
    tower = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    layers = Layers(groups={"block.0": "^0", "block.1": r"^1\."})
    assert reinit_targets(tower, layers=layers) == {"1": "block.1"}
    reinit_layers(tower, layers=layers)


def test_init_draws_instead_of_the_scheme(tmp_path: Path) -> None:
    def eights(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 8)

    model = loaded(tiny("bert"), tmp_path)
    reinit_layers(model, 1, pooler=False, init=eights)
    assert all(bool((p == 8).all()) for p in model.bert.encoder.layer[2].parameters())


class Scaled(nn.Module):
    """A block with a parameter of its own, and no method that draws it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) * self.scale


def scaled() -> nn.Module:
    encoder = Encoder()
    encoder.layers = nn.ModuleList(Scaled() for _ in range(2))
    return encoder


class Forgetful(hf.BertModel):
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.LayerNorm):
            super()._init_weights(module)


def quantised(model: nn.Module) -> None:
    layer = model.bert.encoder.layer[2].output.dense
    layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)


def tied(model: nn.Module) -> None:
    layer = model.bert.encoder.layer
    layer[2].output.dense.weight = layer[1].output.dense.weight


def parametrised(model: nn.Module) -> None:
    parametrizations.weight_norm(model.bert.encoder.layer[2].output.dense)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (quantised, r"bert.encoder.layer.2.output.dense.weight is quantised \(torch.int8\): load it unquantised"),
        (tied, r"layer.1.output.dense.weight and .*layer.2.output.dense.weight are one tied tensor"),
        (parametrised, "layer.2.output.dense is a ParametrizedLinear and not a plain layer: re-initialise before"),
        (
            lambda m: m.bert.encoder.layer[2].requires_grad_(False),
            "is frozen, and a frozen random layer learns nothing",
        ),
        (lambda m: m.bert.encoder.layer[2].to("meta"), "is on the meta device: call reinit_layers where the module"),
    ],
)
def test_refuses_layers_that_cannot_be_drawn(damage: Any, message: str) -> None:
    model = tiny("bert")
    damage(model)
    with pytest.raises(ValueError, match=message):
        reinit_layers(model, 1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_refuses_adapters_and_says_when_to_add_them() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"query is a Linear and not a plain layer: re-initialise before adapters"):
        reinit_layers(model, 1)


def test_refuses_shards() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = Encoder()
        linear = layer.layers[2].linear1
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"layers.2.linear1.weight is sharded: call reinit_layers where"):
            reinit_layers(layer, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("model", [Forgetful(hf.BertConfig(**BERT)), scaled()])
def test_refuses_a_scheme_that_leaves_something_unset_and_undoes_it(model: nn.Module) -> None:
    before = weights(model)
    unset = "leaves encoder.layer.2.*LayerNorm.weight.* unset: pass init=|Scaled has parameters and no reset_parameters"
    with pytest.raises(ValueError, match=unset):
        reinit_layers(model, 1)
    assert not changed(model, before)
    assert not fresh_parameters(model)


def test_refuses_the_shared_block_of_albert() -> None:
    with pytest.raises(ValueError, match=r"albert_layer_groups.0 is the one block that all 3 layers share: .* top=0"):
        reinit_layers(tiny("albert"))
    assert [row["module"] for row in reinit_layers(tiny("albert"), 0).rows] == ["albert.pooler"]


def test_a_decoder_of_one_block_shares_nothing() -> None:
    model = hf.BartModel(hf.BartConfig(**SEQ2SEQ, **{**BART, "decoder_layers": 1}))
    assert [row["module"] for row in reinit_layers(model).rows] == ["decoder.layers.0"]


@pytest.mark.parametrize("model_class", [hf.GPT2LMHeadModel, hf.T5ForConditionalGeneration, hf.BertForMaskedLM])
def test_leaves_a_tied_head_alone(model_class: Any, tmp_path: Path) -> None:
    settings = {"GPT2LMHeadModel": GPT2, "T5ForConditionalGeneration": SEQ2SEQ | T5, "BertForMaskedLM": BERT}
    model = loaded(model_class(model_class.config_class(**settings[model_class.__name__])), tmp_path)
    before = weights(model)
    report = reinit_layers(model, 1)
    assert changed(model, before) == names_below(model, [row["module"] for row in report.rows])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 4}, "'top:4' must ask for 1 to 3 blocks"),
        ({"top": -1}, "top=-1 must be a number of blocks, 0 or more"),
        ({"groups": "nothing"}, "'nothing' matches none of the groups embeddings, block.0"),
        ({"pooler": "bert.poooler"}, "pooler='bert.poooler' must be the path of a module"),
    ],
)
def test_refuses_what_is_not_there(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reinit_layers(tiny("bert"), **options)


def test_refuses_a_bare_parameter_that_no_module_draws() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Parameter(torch.ones(2))
            self.rest = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"groups='stem': stem are no whole module"):
        reinit_layers(Bare(), groups="stem", layers=Layers(groups={"stem": "^stem", "block.0": "^rest"}))


def test_marks_survive_a_copy() -> None:
    encoder = Encoder()
    reinit_layers(encoder, 1)
    twin = copy.deepcopy(encoder)
    assert fresh_parameters(twin) == set(twin.layers[2].parameters())
    assert twin(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()
