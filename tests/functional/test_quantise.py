"""Packed weights against closed forms, layers against the float layers that they stand for, and what is left alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_ft.core import Layers
from lightning_ft.core.fresh import mark_fresh
from lightning_ft.functional.quantise import dequantise, quantise, quantised_layers
from lightning_ft.functional.quantised_layers import QuantisedLinear
from lightning_ft.functional.quantised_tensor import Format, QuantisedTensor
from tests.strangers import Encoder
from tests.tiny import BERT, GPT2, TINY, tiny

NF4, FP4, INT8 = Format("nf4"), Format("fp4"), Format("int8")
PLAIN_NF4 = Format("nf4", double=False)
FORMATS = {"nf4": NF4, "nf4-plain": PLAIN_NF4, "nf4-32": Format("nf4", 32), "fp4": FP4, "int8": INT8}
# Table 6 of the QLoRA paper.
CODES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
CODES += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
CODES += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]

each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def linear(columns: int = 256, rows: int = 128, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias)


def same_bits(left: Any, right: Any) -> bool:
    assert left.parts.keys() == right.parts.keys()
    return all(torch.equal(left.parts[name], right.parts[name]) for name in left.parts)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("form", "low", "high"), [(NF4, 0.08, 0.1), (PLAIN_NF4, 0.08, 0.1), (FP4, 0.1, 0.13), (INT8, 0.006, 0.008)]
)
def test_relative_error_of_normal_weights(form: Format, low: float, high: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (form.unpack(form.pack(weight), torch.float32) - weight).norm() / weight.norm()
    assert low < error < high


def test_relative_error_of_uniform_weights_in_int8() -> None:
    """Steps of 1/127 are off by 1/127/√12 in the root mean square, of values of 1/√3."""
    weight = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    error = (INT8.unpack(INT8.pack(weight), torch.float32) - weight).norm() / weight.norm()
    assert error == pytest.approx(1 / 254, rel=0.02)


def test_nf4_is_the_nearest_code_of_the_paper_times_the_largest_weight_of_its_block() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / absmax)[..., None].sub(torch.tensor(CODES)).abs().argmin(-1)
    expected = (torch.tensor(CODES)[nearest] * absmax).view_as(weight)
    torch.testing.assert_close(PLAIN_NF4.unpack(PLAIN_NF4.pack(weight), torch.float32), expected)


def test_int8_is_the_nearest_of_255_steps_of_a_row() -> None:
    weight = torch.tensor([[1.27, -0.634, 0.0], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.0]])
    parts = INT8.pack(weight)
    assert parts["codes"].tolist() == [[127, -63, 0], [0, 0, 0], [-127, 2, 0]]
    expected = torch.tensor([[1.27, -0.63, 0.0], [0.0, 0.0, 0.0], [-254.0, 4.0, 0.0]])
    torch.testing.assert_close(INT8.unpack(parts, torch.float32), expected)


@pytest.mark.parametrize(
    ("form", "bits"), [(NF4, 4.127), (PLAIN_NF4, 4.5), (FP4, 4.127), (Format("nf4", 128, False), 4.25), (INT8, 8.03125)]
)
def test_bits_a_weight(form: Format, bits: float) -> None:
    assert form.bits_per_weight(1024, 1024) == pytest.approx(bits, abs=1e-4)
    parts = QuantisedLinear(linear(1024, 256), form).parts()
    stored = 8 * sum(part.numel() * part.element_size() for part in parts.values()) / (1024 * 256)
    assert stored == pytest.approx(form.bits_per_weight(256, 1024), abs=1e-4)
    assert {part.dtype for name, part in parts.items() if name == "codes"} == {
        torch.int8 if form is INT8 else torch.uint8
    }


@each_format
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 5, 256), (2, 3, 5, 256)])
def test_value_and_gradients_are_those_of_the_dequantised_weight(form: Format, shape: tuple[int, ...]) -> None:
    layer = QuantisedLinear(linear(), form)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    expected = F.linear(x, layer.dequantised(), layer.bias)
    # In 8 bits x is rounded, too: by 1/254 of its largest value.
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-2 if form is INT8 else 1e-5)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.bias), upstream)
    theirs = torch.autograd.grad(expected, (x, layer.bias), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@each_format
def test_under_autocast_it_gives_the_dtype_that_linear_gives(form: Format) -> None:
    plain, x = linear(), torch.randn(4, 256, requires_grad=True)
    layer = QuantisedLinear(plain, form)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=3e-2)
    y.sum().backward()
    assert x.grad is not None
    assert layer.bias.dtype == x.grad.dtype == torch.float32


def test_the_integer_product_is_out_of_the_reach_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no integer kernel it is made in fp32, and integers up to 127² · 256 have no room in bf16."""
    layer, seen = QuantisedLinear(linear(bias=False), INT8), []
    product = layer._product
    monkeypatch.setattr(layer, "_product", lambda x: seen.append(torch.is_autocast_enabled("cpu")) or product(x))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(2, 256))
    assert seen == [False]


def test_inputs_above_the_threshold_are_not_rounded() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    x[:, 7] = torch.tensor([300.0, -200.0, 100.0])
    error = {}
    for threshold in (0.0, 6.0):
        layer = QuantisedLinear(linear(), INT8, threshold=threshold)
        expected = F.linear(x, layer.dequantised(), layer.bias)
        error[threshold] = (layer(x) - expected).abs().max().item()
    assert error[6.0] < 0.02 < 0.3 < error[0.0]


@each_format
def test_conv1d_is_the_same_map(form: Format) -> None:
    conv = Conv1D(6, 64)
    nn.init.normal_(conv.bias)
    layer = QuantisedLinear(conv, form)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=0.2)
    assert layer.packed().shape == conv.weight.shape
    assert torch.equal(layer.packed().contiguous().view(-1), layer.packed().dequantised().reshape(-1))
    expected = F.linear(x, layer.packed().dequantised().t(), conv.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-2)


def test_layer_moves_copies_and_keeps_the_precision_of_its_scales() -> None:
    layer = QuantisedLinear(linear(), NF4)
    halved = copy.deepcopy(layer).half()
    assert halved.bias.dtype == torch.float16
    assert same_bits(halved.packed(), layer.packed())
    x = torch.randn(2, 256, dtype=torch.float16)
    assert halved(x).dtype == torch.float16
    torch.testing.assert_close(halved(x).float(), layer(x.float()), rtol=0, atol=1e-2)
    assert next(iter(layer.to("meta").scales.values())).is_meta


# ---- state dicts


@each_format
def test_a_file_gives_the_same_bits(form: Format) -> None:
    layer, other = QuantisedLinear(linear(), form), QuantisedLinear(linear(), form)
    with torch.no_grad():
        other.take(torch.zeros(128, 256))
    state = through_a_file(layer.state_dict())
    assert state.keys() == linear().state_dict().keys()
    assert other.load_state_dict(state) == ([], [])
    assert same_bits(other.packed(), layer.packed())
    state["weight"].parts["codes"].zero_()
    assert not same_bits(other.packed(), state["weight"])  # no memory is shared with the file


@each_format
def test_float_weights_are_quantised_on_load(form: Format) -> None:
    layer, other = QuantisedLinear(linear(), form), linear()
    with torch.no_grad():
        other.weight.mul_(-2)
    layer.load_state_dict(other.state_dict())
    assert same_bits(layer.packed(), QuantisedLinear(other, form).packed())


def test_another_format_is_converted_on_load() -> None:
    layer = QuantisedLinear(linear(), NF4)
    layer.load_state_dict(QuantisedLinear(linear(), INT8).state_dict())
    torch.testing.assert_close(layer.dequantised(), linear().weight.data, rtol=0, atol=0.02)


@each_format
def test_a_float_layer_takes_the_dequantised_weight(form: Format) -> None:
    layer, plain = QuantisedLinear(linear(), form), linear()
    plain.load_state_dict(through_a_file(layer.state_dict()))
    assert torch.equal(plain.weight, layer.dequantised())
    assert type(plain.weight) is nn.Parameter


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: \(128, 64\) in the file, \(128, 256\) in"):
        QuantisedLinear(linear(), NF4).load_state_dict(linear(64).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        linear(64).load_state_dict(QuantisedLinear(linear(), NF4).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        QuantisedLinear(linear(), NF4).load_state_dict({})


def test_the_tensor_of_a_state_dict_acts_as_its_dequantised_self() -> None:
    layer = QuantisedLinear(linear(), NF4)
    packed = layer.state_dict()["weight"]
    assert isinstance(packed, QuantisedTensor)
    assert torch.equal(packed + 1, layer.dequantised() + 1)
    copied = packed.detach().clone()
    assert isinstance(copied, QuantisedTensor)
    assert same_bits(copied, packed)
    assert copied.parts["codes"].data_ptr() != packed.parts["codes"].data_ptr()
    assert repr(packed) == "QuantisedTensor((128, 256), torch.float32, nf4)"
    assert isinstance(packed.to("cpu", copy=True), QuantisedTensor)
    assert type(packed.double()) is Tensor


# ---- models


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", [NF4, INT8], ids=["nf4", "int8"])
def test_a_model_computes_with_the_dequantised_weights(name: str, form: Format) -> None:
    model = tiny(name)
    float_keys = model.state_dict().keys()
    report = quantise(model, form)
    assert report.facts["layers"] == len(quantised_layers(model)) > 0
    assert not report.facts["left"]
    assert model.state_dict().keys() == float_keys
    plain = copy.deepcopy(model)
    dequantise(plain)
    assert {type(child) for child in plain.modules()} == {type(child) for child in tiny(name).modules()}
    ids = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=3e-2 if form is INT8 else 1e-5)
    heads = [child for child in model.modules() if isinstance(child, nn.Linear) and child.out_features == 2]
    assert not any(isinstance(child, QuantisedLinear) for child in heads if child.weight.shape[0] == 2)


def test_report_counts() -> None:
    config = hf.BertConfig(**{**BERT, "hidden_size": 64, "intermediate_size": 128})
    model = hf.AutoModelForSequenceClassification.from_config(config)
    model.bert.encoder.layer[0].requires_grad_(False)
    model.bert.encoder.layer[1].requires_grad_(False)
    report = quantise(model, PLAIN_NF4)
    assert [(row["group"], row["layers"], row["weights"]) for row in report.rows] == [
        ("block.0", 6, 4 * 64 * 64 + 2 * 64 * 128),
        ("block.1", 6, 4 * 64 * 64 + 2 * 64 * 128),
    ]
    assert report.facts["bits a weight"] == 4.5
    assert report.facts["bytes before"] / report.facts["bytes after"] == pytest.approx(32 / 4.5)
    assert report.facts["frozen"] == 0
    assert report.facts["left"]["bert.encoder.layer.2.attention.self.query"] == "it trains, and others do not"
    assert "classifier" not in report.facts["left"]
    assert "bits a weight: 4.5" in str(report)
    full = quantise(tiny("bert"), NF4)
    assert full.facts["frozen"] == full.facts["layers"] == 19


def test_a_tied_output_layer_is_left_alone() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))
    report = quantise(model, NF4, layers=Layers(head=[]))
    assert report.facts["left"] == {"lm_head": "an embedding shares its weight"}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantisedLinear)


def test_what_reads_weights_itself_is_left_alone_and_runs() -> None:
    model = nn.ModuleDict({"encoder": Encoder().eval(), "head": nn.Linear(8, 2)})
    reason = "nn.MultiheadAttention reads its weight without calling it"
    report = quantise(model, NF4)
    assert report.facts["layers"] == 6
    assert set(report.facts["left"].values()) == {reason}
    tokens = torch.arange(10).view(2, 5)
    plain = copy.deepcopy(model)
    dequantise(plain)
    with torch.no_grad():  # the fast path of nn.TransformerEncoderLayer
        torch.testing.assert_close(model["encoder"](tokens), plain["encoder"](tokens), rtol=0, atol=1e-5)


def test_reasons_for_leaving_a_layer() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    body = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("plain", "fresh", "named", "broken")})
    body["odd"], body["own"] = nn.Linear(7, 8), Own(8, 8)
    body["broken"].weight.data[0, 0] = float("inf")
    mark_fresh([body["fresh"]])
    model = nn.ModuleDict({"body": body, "head": nn.Linear(8, 2)})
    layers = Layers(groups={"body": "^body", "head": "^head"})
    report = quantise(model, NF4, skip="named$", layers=layers)
    assert report.facts["left"] == {
        "body.fresh": "it was drawn anew",
        "body.named": "skip=",
        "body.broken": "its weight is not finite",
        "body.odd": "an odd number of inputs (7)",
        "body.own": "Own is a class of its own",
    }
    assert list(quantised_layers(model)) == ["body.plain"]


def test_hooks_and_every_name_of_a_layer_are_kept() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again = self.first

    model, seen = Twice().eval(), []
    model.first.register_forward_hook(lambda *args: seen.append(1))
    quantise(model, NF4, layers=Layers(groups={"body": "."}))
    assert model.first is model.again
    assert not model.first.training
    model.first(torch.zeros(1, 8))
    assert seen == [1]


# ---- peft

old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(model: nn.Module) -> Any:
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "dense"], modules_to_save=["classifier"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def bert() -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**BERT)).eval()


@old_name
@pytest.mark.parametrize("form", [NF4, INT8], ids=["nf4", "int8"])
def test_adapters_of_peft_come_before_or_after(form: Format) -> None:
    first = bert()
    quantise(first, form)
    first = lora(first)
    second = lora(bert())
    report = quantise(second, form)
    for model in (first, second):
        assert len(quantised_layers(model)) == 19
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names
        assert all("lora_" in name or "modules_to_save" in name for name in names)
        assert all(p.is_floating_point() for p in model.parameters() if p.requires_grad)
        wrong = ("lora_", "modules_to_save", "original_module")
        assert not any(part in path for path in quantised_layers(model) for part in wrong)
    assert report.facts["frozen"] == 0
    ids = torch.randint(3, 50, (2, 8))
    torch.testing.assert_close(first(ids).logits, second(ids).logits)

    logits = second(ids).logits
    dequantise(second)
    merged = second.merge_and_unload()
    assert not any(type(child).__module__.startswith("peft") for child in merged.modules())
    torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-2 if form is INT8 else 1e-5)


@old_name
def test_adapters_that_are_switched_off_are_no_base() -> None:
    model = lora(bert())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    model.set_adapter("default")
    quantise(model, NF4)
    assert not any("lora_" in path for path in quantised_layers(model))


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int4",), r"kind='int4' must be one of nf4, fp4, int8"),
        (("nf4", 60), r"block_size=60 must be one of \[32, 64, .* 4096\]: 64 in the paper"),
        (("nf4", 16), r"block_size=16 must be one of"),
    ],
)
def test_bad_formats(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Format(*arguments)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip='lm_hed' matches no linear layer; there are: bert\.encoder"):
        quantise(tiny("bert"), NF4, skip=["dense", "lm_hed"])
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match=r"nothing to quantise in ModuleDict: body: skip="):
        quantise(model, NF4, skip="body", layers=Layers(groups={"body": "^body", "head": "^head"}))
    with pytest.raises(ValueError, match="nothing to quantise in Embedding: it has no linear layer"):
        quantise(nn.Embedding(4, 4), NF4, layers=Layers(groups={"body": "."}))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ft.functional.quantised_tensor import import_bitsandbytes

    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-ft\[quant\]"'):
        import_bitsandbytes.__wrapped__()
