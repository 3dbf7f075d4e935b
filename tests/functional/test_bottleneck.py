from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_ft.core import LayerGroups, Layers
from lightning_ft.core.base_weights import base_names
from lightning_ft.functional.adapter_files import load_adapter, read_adapter, save_adapter
from lightning_ft.functional.adapter_fusion import add_fusion
from lightning_ft.functional.adapter_layers import BottleneckConfig, all_adapters, check_hooked
from lightning_ft.functional.adapter_places import AdapterSpec
from lightning_ft.functional.alterations import alter, alterations
from lightning_ft.functional.bottleneck import active_adapters, adapter_parameters, add_adapters, use_adapters
from lightning_ft.functional.invertible_adapter import all_couplings
from tests.strangers import WIDTH, Encoder, Filtered, HeadFirst, dataset, identical, weights
from tests.tiny import BERT, GPT2, TINY, tiny

KINDS = ("pfeiffer", "houlsby", "parallel", "mad-x")
CONFIG = BottleneckConfig(2, init="bert")


def _ids(model: Any) -> Tensor:
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id
    return ids


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=_ids(model)).logits
    return logits


def _draw(model: nn.Module, seed: int = 1, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


# ---- what they compute


@pytest.mark.parametrize(
    ("name", "kind"),
    # Every kind where the table of methods is measured; the two that touch most elsewhere.
    [(n, k) for n in TINY for k in KINDS if n in ("bert", "gpt2", "llama", "t5") or k in ("houlsby", "mad-x")],
)
def test_the_adapted_model_is_at_first_the_model(name: str, kind: Any) -> None:
    model = tiny(name)
    before = _logits(model)
    if (name, kind) == ("xlnet", "houlsby"):
        with pytest.raises(ValueError, match=r"places= must say after which modules houlsby adapters go"):
            add_adapters(model, kind=kind)
        return
    torch.manual_seed(0)
    add_adapters(model, kind=kind)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn), "the global generator was used"
    assert torch.equal(_logits(model), before)
    _draw(model)
    after = _logits(model)
    assert (after - before).abs().max() > 1e-4
    assert torch.equal(_logits(copy.deepcopy(model)), after)
    assert torch.equal(_logits(pickle.loads(pickle.dumps(model))), after)
    model.train()(input_ids=_ids(model)).logits.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    groups = LayerGroups.of(model)
    for path, parameter in model.named_parameters():
        if ".adapters." in path:
            assert groups.name_of(parameter) == groups.name_of(_own(model, path)), path


def _own(model: nn.Module, path: str) -> nn.Parameter:
    return next(model.get_submodule(path.partition(".adapters.")[0]).parameters())


def _bottleneck(adapter: Any, hidden: Tensor) -> Tensor:
    return adapter.up(torch.relu(adapter.down(hidden)))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "parallel"])
def test_the_formulas_written_out(kind: Any, norm_first: bool) -> None:
    """In eval mode without gradients, too, where PyTorch would compute the whole layer in one fused call."""
    encoder = Encoder().eval()
    for i, layer in enumerate(encoder.layers):
        new = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True, norm_first=norm_first)
        new.load_state_dict(layer.state_dict())
        encoder.layers[i] = new.eval()
    plain = copy.deepcopy(encoder)
    scale = {"parallel": 4.0}.get(kind, 1.0)
    add_adapters(encoder, kind=kind, config=BottleneckConfig(2, nonlinearity="relu"), layers=Layers(head=[]))
    _draw(encoder, scale=0.3)
    with torch.no_grad():
        hidden = encoder.tokens(dataset().tensors[0])
        for layer, reference in zip(encoder.layers, plain.layers, strict=True):
            inner = reference.norm1(hidden) if norm_first else hidden
            attended = reference.self_attn(inner, inner, inner)[0]
            if kind == "houlsby":
                attended = attended + scale * _bottleneck(layer.self_attn.adapters.default, attended)
            stream = hidden + attended if norm_first else reference.norm1(hidden + attended)
            inner = reference.norm2(stream) if norm_first else stream
            given = reference.linear2(torch.relu(reference.linear1(inner)))
            would = given + stream if norm_first else reference.norm2(given + stream)
            read = {"houlsby": given, "parallel": inner, "pfeiffer": would}[kind]
            given = given + scale * _bottleneck(layer.linear2.adapters.default, read)
            hidden = stream + given if norm_first else reference.norm2(stream + given)
        torch.testing.assert_close(encoder(dataset().tensors[0]), plain.norm(hidden))


def test_counts_of_bert_base() -> None:
    each = 2 * 768 * 48 + 48 + 768
    assert each == 74_544
    cases: list[tuple[Any, int, int]] = [("pfeiffer", 12, 0), ("houlsby", 24, 0), ("houlsby", 24, 12 * 2 * 2 * 768)]
    for kind, count, norms in cases:
        with torch.device("meta"):
            model = hf.BertModel(hf.BertConfig())
        report = add_adapters(model, kind=kind, train_norms=norms > 0, layers=Layers(head=[]))
        assert [row["parameters"] for row in report.rows] == [each] * count
        assert report.facts["trainable"] == {12: 894_528, 24: 1_789_056}[count] + norms


def test_first_weights() -> None:
    found = {}
    for init in ("identity", "bert", "houlsby"):
        model = hf.BertModel(hf.BertConfig(vocab_size=9, hidden_size=256, num_hidden_layers=1, num_attention_heads=2))
        add_adapters(model, config={"reduction": 2, "init": init}, layers={"head": []})
        found[init] = model.encoder.layer[0].output.dense.adapters.default
        assert not found[init].down.bias.any()
        assert not found[init].up.bias.any()
    assert not found["identity"].up.weight.any()
    assert 0.9 < found["identity"].down.weight.abs().max() * 16 <= 1
    for part in ("down", "up"):
        assert getattr(found["bert"], part).weight.std().item() == pytest.approx(0.02, rel=0.05)
        # Cut off at two deviations, the deviation is 0.88 of what it was.
        assert getattr(found["houlsby"], part).weight.std().item() == pytest.approx(0.0088, rel=0.05)
        assert getattr(found["houlsby"], part).weight.abs().max() <= 0.02


def test_seeds_and_repetition() -> None:
    def first(seed: int) -> dict[str, Tensor]:
        model = Filtered()
        add_adapters(model, kind="mad-x", config={"seed": seed})
        return weights(model)

    assert identical(first(0), first(0))
    assert not identical(first(0), first(1))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny("llama").train()
        add_adapters(model, kind="parallel")
        add_adapters(model, kind="pfeiffer", name="second")
        _draw(model, scale=0.3)
        for p in adapter_parameters(model):
            p.requires_grad_(True)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        model(input_ids=_ids(model)).logits.sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model)])
    assert identical(*gradients)
    assert all(g is not None and g.any() for g in gradients[0])


def test_a_pass_that_broke_off_holds_nothing_in_copies() -> None:
    """A tensor with a graph behind it can neither be copied nor pickled."""
    model: Any = tiny("bert").train()
    add_adapters(model, kind="houlsby", train_norms=True)
    add_adapters(model, kind="parallel", name="second")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.bert.encoder.layer[2].output.dense.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=_ids(model))
    handle.remove()
    caught = model.bert.encoder.layer[2].output.dense.adapters.taps["input"]
    assert caught.value.grad_fn is not None
    assert torch.equal(_logits(copy.deepcopy(model)), _logits(model))
    pickle.dumps(model)


def test_over_a_base_in_16_bits_they_learn_in_32() -> None:
    model = tiny("bert").to(torch.bfloat16)
    add_adapters(model, kind="mad-x")
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert _logits(model).dtype == torch.bfloat16


def test_albert_shares_its_adapters() -> None:
    model = tiny("albert")
    report = add_adapters(model, kind="houlsby")
    assert len(report.rows) == 2
    calls = []
    model.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn_output.adapters.register_forward_hook(  # type: ignore[union-attr, index]
        lambda *_: calls.append(1)
    )
    _logits(model)
    assert len(calls) == 3


def test_given_places() -> None:
    model = tiny("bert")
    report = add_adapters(
        model, kind="pfeiffer", places=[r"attention\.output$", r"intermediate\.dense$"], config=CONFIG
    )
    assert [row["place"].split("layer.0.")[1] for row in report.rows[:2]] == [
        "intermediate.dense",
        "attention.output",
    ] or [row["place"].split("layer.0.")[1] for row in report.rows[:2]] == ["attention.output", "intermediate.dense"]
    layer = model.bert.encoder.layer[0]  # type: ignore[union-attr, index]
    given: Any = layer.intermediate.dense
    assert given.adapters.width == 32
    _draw(model)
    hidden = torch.randn(1, 2, 16)
    plain = nn.functional.linear(hidden, given.weight, given.bias)
    torch.testing.assert_close(given(hidden), plain + _bottleneck(given.adapters.default, plain))
    with pytest.raises(ValueError, match=r"places: 'mlp' matches no module that a block runs once; there are: "):
        add_adapters(tiny("bert"), places=["mlp"])


def test_two_inputs_for_one_place_are_refused() -> None:
    model = tiny("bert")
    add_adapters(model, kind="parallel")
    with pytest.raises(
        ValueError, match=r"output.dense read the input of .*intermediate.dense already, .*other places"
    ):
        add_adapters(model, kind="parallel", name="other", places=[r"\.\d\.output\.dense$"])


# ---- several


def test_a_stack_goes_through_one_after_the_other() -> None:
    model = tiny("gpt2")
    add_adapters(model, kind="houlsby", name="low", config=CONFIG)
    low = model.transformer.h[0].mlp.c_proj.adapters.low  # type: ignore[union-attr, index]
    _draw(model)
    before = _logits(model)
    add_adapters(model, kind="houlsby", name="high")
    assert torch.equal(_logits(model), before)
    _draw(model, 2)
    place: Any = model.transformer.h[0].mlp.c_proj  # type: ignore[union-attr, index]
    hidden = torch.randn(1, 3, 64)
    plain = hidden @ place.weight + place.bias

    def swish(adapter: Any, h: Tensor) -> Tensor:
        return h + adapter.up(nn.functional.silu(adapter.down(h)))

    one = swish(low, plain)
    torch.testing.assert_close(place(hidden), swish(place.adapters.high, one), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in low.parameters())
    assert all(p.requires_grad for p in place.adapters.high.parameters())
    assert model.score.weight.requires_grad
    assert not {n for n in base_names(model) if ".adapters." in n}, "frozen adapters are in the checkpoint"
    report = use_adapters(model, ["high"])
    assert report.facts == {"stack": ["high"], "before": ["low", "high"]}
    torch.testing.assert_close(place(hidden), swish(place.adapters.high, plain), rtol=1e-4, atol=1e-4)
    use_adapters(model, [])
    torch.testing.assert_close(place(hidden), plain)


def test_kinds_at_different_places_stack() -> None:
    model = tiny("bert")
    add_adapters(model, name="a")
    add_adapters(model, kind="houlsby", name="b")
    assert active_adapters(model) == ["a", "b"]
    places = {path: adapters.names() for path, adapters in all_adapters(model)}
    assert places["bert.encoder.layer.0.output.dense"] == ["a", "b"]
    assert places["bert.encoder.layer.0.attention.output.dense"] == ["b"]
    _draw(model)
    assert torch.isfinite(_logits(model)).all()


def test_trained_norms_train_on_under_a_second_adapter() -> None:
    model = tiny("bert")
    add_adapters(model, kind="houlsby", name="a", train_norms=True)
    norms = [n for n, p in model.named_parameters() if p.requires_grad and "LayerNorm" in n]
    assert len(norms) == 3 * 4
    add_adapters(model, name="b")
    assert [n for n, p in model.named_parameters() if p.requires_grad and "LayerNorm" in n] == norms
    assert not base_names(model) & set(norms)


# ---- MAD-X


def _language_model(name: str = "bert") -> Any:
    torch.manual_seed(0)
    config = {"bert": hf.BertConfig(**BERT), "gpt2": hf.GPT2Config(**GPT2)}[name]
    return (hf.BertForMaskedLM if name == "bert" else hf.GPT2LMHeadModel)(config).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_tied_output_layer_takes_the_inverse(name: str) -> None:
    model = _language_model(name)
    plain = copy.deepcopy(model)
    add_adapters(model, kind="mad-x", name="lang", layers=Layers(head=[]))
    (couplings,) = all_couplings(model)
    _draw(model, scale=0.3)
    x = torch.randn(4, 7, 16)
    torch.testing.assert_close(couplings.inverse(couplings(x)), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(couplings(couplings.inverse(x)), x, rtol=0, atol=1e-5)
    one, two = x.chunk(2, -1)
    coupling: Any = couplings.get_submodule("lang")
    out = one + _bottleneck(coupling.first, two)
    torch.testing.assert_close(couplings(x), torch.cat([out, two + _bottleneck(coupling.second, out)], -1))
    add_adapters(model, kind="mad-x", name="dialect", layers=Layers(head=[]))
    _draw(model, scale=0.3)
    assert couplings.active == ["lang", "dialect"]
    torch.testing.assert_close(couplings.inverse(couplings(x)), x, rtol=0, atol=1e-4)
    # By hand: the embeddings adapted on the way in, and what enters the output layer inverted on the way out.
    for place in (adapters for _, adapters in all_adapters(model)):
        place.active = []
    words = plain.get_input_embeddings()
    words.register_forward_hook(lambda module, args, output: couplings(output))
    plain.get_output_embeddings().register_forward_pre_hook(lambda module, args: (couplings.inverse(args[0]),))
    assert torch.equal(_logits(model), _logits(plain))
    assert (_logits(_language_model(name)) - _logits(plain)).abs().max() > 1e-2


def test_swapping_languages_changes_only_their_keys(tmp_path: Path) -> None:
    for seed, language in enumerate(("en", "de")):
        model = _language_model()
        add_adapters(model, kind="mad-x", name="lang")
        _draw(model, seed)
        save_adapter(model, tmp_path / language, name="lang")
    task = Filtered()  # under another name, with another head
    task.encoder = _language_model().bert
    task.forward = lambda ids: task.classifier(task.encoder(ids).last_hidden_state[:, 0, :8])  # type: ignore[method-assign]
    load_adapter(task, tmp_path / "en", name="lang")
    assert active_adapters(task) == []
    use_adapters(task, ["lang"])
    add_adapters(task, name="task")
    english = weights(task)
    assert {n for n, p in task.named_parameters() if p.requires_grad} == {
        n for n in english if ".adapters.task." in n or n.startswith("classifier")
    }
    load_adapter(task, tmp_path / "de", name="lang")
    german = weights(task)
    changed = {name for name in english if not torch.equal(english[name], german[name])}
    assert changed == {name for name in english if ".adapters.lang." in name}
    assert len(changed) == 3 * 4 + 8
    assert alterations(task)[0]["kind"] == "frozen_adapters"
    assert torch.equal(
        german["encoder.encoder.layer.2.output.dense.adapters.lang.up.bias"],
        read_adapter(tmp_path / "de").tensors["block.2.0.up.bias"],
    )


def test_an_adapter_is_a_small_folder(tmp_path: Path) -> None:
    model = tiny("t5")
    add_adapters(model, kind="houlsby", name="one")
    _draw(model)
    report = save_adapter(model, tmp_path / "one", name="one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"adapter_config.json", "adapter.safetensors"}
    assert report.facts["tensors"] == 15 * 4
    again = tiny("t5")
    again.load_state_dict({n: v for n, v in model.state_dict().items() if ".adapters." not in n})
    load_adapter(again, tmp_path / "one")
    plain = _logits(again)
    use_adapters(again, ["one"])
    assert torch.equal(_logits(again), _logits(model))
    assert not torch.equal(plain, _logits(model))
    assert read_adapter(tmp_path / "one").spec == AdapterSpec.of(AdapterSpec("one", "houlsby").plain())
    save_adapter(again, tmp_path / "one", name="one")  # replaces it


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = HeadFirst()
    add_adapters(model, config=CONFIG)
    save_adapter(model, tmp_path / "a")
    other = HeadFirst()
    with torch.no_grad():
        next(iter(other.thing_from_paris["inner"].layers.parameters())).add_(1)
    with pytest.raises(ValueError, match=r"'default' was trained in blocks with sha256 .*same pretrained weights"):
        load_adapter(other, tmp_path / "a")
    assert not alterations(other)
    load_adapter(other, tmp_path / "a", name="b", check=False)
    small = HeadFirst()
    add_adapters(small, config={"reduction": 4})
    with pytest.raises(ValueError, match=r"'default' in the model is another one than in the file: block.0.0"):
        load_adapter(small, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter \(adapter_config.json"):
        load_adapter(small, tmp_path)
    with pytest.raises(ValueError, match="name='c' must be one of the adapters default"):
        save_adapter(small, tmp_path / "c", name="c")
    with pytest.raises(FileExistsError):
        save_adapter(small, tmp_path)
    normed = HeadFirst()
    add_adapters(normed, config=CONFIG, train_norms=True)
    with pytest.raises(ValueError, match=r"norm1.weight trains beside the adapters.*save the checkpoint"):
        save_adapter(normed, tmp_path / "c")


# ---- fusion


def _fused(kind: Any = "pfeiffer") -> Any:
    model = tiny("bert")
    for name in ("a", "b"):
        add_adapters(model, kind=kind, name=name, config=CONFIG)
    _draw(model, scale=0.5)
    return model


def test_the_fusion_written_out() -> None:
    model = _fused("houlsby")
    add_fusion(model, names=["a", "b"])
    assert active_adapters(model) == [["a", "b"]]
    place = model.bert.encoder.layer[1].output.dense
    adapters, fusion = place.adapters, place.adapters.fusion
    with torch.no_grad():
        fusion.value_delta.normal_()
    hidden = torch.randn(2, 3, 32)
    y = nn.functional.linear(hidden, place.weight, place.bias)
    z = [adapters.adapter(n).up(nn.functional.silu(adapters.adapter(n).down(y))) for n in ("a", "b")]
    expected = torch.empty_like(y)
    for row in range(2):
        for token in range(3):
            scores = torch.stack([fusion.query(y[row, token]) @ fusion.key(part[row, token]) for part in z])
            share = scores.exp() / scores.exp().sum()
            value = torch.eye(16) + fusion.value_delta
            expected[row, token] = y[row, token] + sum(w * value @ p[row, token] for w, p in zip(share, z, strict=True))
    torch.testing.assert_close(place(hidden), expected)
    trained = {n.partition(".adapters.")[2] or n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        *("fusion.query.weight", "fusion.query.bias", "fusion.key.weight", "fusion.key.bias", "fusion.value_delta"),
        *("classifier.weight", "classifier.bias"),
    }
    model.train()(input_ids=_ids(model)).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_fusion_of_one_is_that_one() -> None:
    model = _fused()
    use_adapters(model, ["b"])
    alone = _logits(model)
    add_fusion(model, names=["b"])
    torch.testing.assert_close(_logits(model), alone, rtol=0, atol=1e-6)


def test_a_fusion_above_a_language() -> None:
    model = _fused()
    add_adapters(model, kind="mad-x", name="lang", config=CONFIG)
    with pytest.raises(ValueError, match=r"lang changes the token embeddings, of which there can be no mixture"):
        add_fusion(model, names=["a", "lang"])
    add_fusion(model, names=["a", "b"], below=["lang"])
    assert active_adapters(model) == ["lang", ["a", "b"]]
    assert all_couplings(model)[0].active == ["lang"]
    with pytest.raises(ValueError, match="there is a fusion already, of a, b"):
        add_fusion(model, names=["a", "b"])
    use_adapters(model, ["lang", ["a", "b"]])
    with pytest.raises(ValueError, match=r"a fusion of \['b', 'a'\] was not added"):
        use_adapters(model, [["b", "a"]])


def test_a_fusion_needs_adapters_at_the_same_places() -> None:
    model = tiny("bert")
    add_adapters(model, name="a")
    add_adapters(model, kind="houlsby", name="b")
    with pytest.raises(ValueError, match=r"must be at the same places, and at .* are b alone"):
        add_fusion(model, names=["a", "b"])


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lora"}, "kind='lora' must be one of pfeiffer, houlsby, parallel, mad-x"),
        ({"name": "a.b"}, r"name='a.b' must be of letters"),
        ({"name": "forward"}, r"name='forward' must be of letters"),
        ({"name": "fusion"}, r"name='fusion' must be of letters"),
        ({"config": {"reduction": 0}}, "reduction=0 must be above 0"),
        ({"config": {"reduction": 17}}, "reduction=17 must leave 1 or more of a width of 16"),
        ({"config": {"nonlinearity": "sin"}}, "nonlinearity='sin' must be one of relu, gelu, swish, tanh"),
        ({"config": {"init": "zero"}}, "init='zero' must be one of identity, bert, houlsby"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny("bert"), **arguments)


def test_names_are_looked_up() -> None:
    model = tiny("bert")
    add_adapters(model)
    with pytest.raises(ValueError, match=r"name='default' is taken by adapters that BertFor.* has already"):
        add_adapters(model)
    with pytest.raises(ValueError, match="there are no adapters other; there are: default"):
        use_adapters(model, ["other"])
    with pytest.raises(ValueError, match="must hold each adapter once"):
        use_adapters(model, ["default", "default"])
    alter(model, "adapter_stack", {"names": []})
    assert active_adapters(model) == []


def test_a_layer_that_was_replaced_is_noticed() -> None:
    model = tiny("bert")
    add_adapters(model)
    check_hooked(model)
    old: Any = model.bert.encoder.layer[0].output.dense  # type: ignore[union-attr, index]
    new = nn.Linear(32, 16)
    new.adapters = old.adapters
    model.bert.encoder.layer[0].output.dense = new  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match=r"layer.0.output.dense has adapters and does not call them: .*quantisation"):
        check_hooked(model)
    taken = tiny("bert")
    taken.bert.encoder.layer[0].output.dense.adapters = nn.Identity()  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match="Linear has an attribute 'adapters' of its own, a Identity"):
        add_adapters(taken)


def test_an_odd_width_cannot_be_halved() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 5)
            self.project = nn.Linear(5, WIDTH)
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)])

        def forward(self, ids: Tensor) -> Tensor:
            return self.layers[0](self.project(self.words(ids)))

    with pytest.raises(ValueError, match="width must be even and is 5"):
        add_adapters(Odd(), kind="mad-x", layers=Layers(head=[]))
