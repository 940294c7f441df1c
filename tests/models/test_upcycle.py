"""Upcycled models compute what they did, then train, grow, shrink and come back from disk."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow_parameters import but_slow
from torch import Tensor, nn

import growmoe
from growmoe.models.upcycle import upcycle
from growmoe.routers import Router

transformers = pytest.importorskip("transformers")
vision = pytest.importorskip("torchvision.models")

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 1}
QUIET: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


class Encoder(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, **settings)
        self.embed = nn.Embedding(40, 16)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        y: Tensor = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        return y


class Blocks(nn.Module):
    """Residual blocks around any feed-forward module."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def mlp(activation: nn.Module | None = None, dropout: float = 0.0) -> nn.Sequential:
    act = nn.GELU() if activation is None else activation
    return nn.Sequential(nn.Linear(16, 32), act, nn.Dropout(dropout), nn.Linear(32, 16))


def gpt2(**more: Any) -> nn.Module:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **more}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **QUIET, **off))


def bert(kind: str) -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, **off))


def causal(kind: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**GROUPED, **QUIET, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


# a builder, the layers to expect, and whether each expert is an FFN
FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str], bool]] = {
    "llama": (lambda: causal("Llama"), ["model.layers.{}.mlp"], True),
    "llama with bias": (lambda: causal("Llama", mlp_bias=True), ["model.layers.{}.mlp"], True),
    "qwen2": (lambda: causal("Qwen2"), ["model.layers.{}.mlp"], True),
    "qwen3": (lambda: causal("Qwen3", head_dim=8), ["model.layers.{}.mlp"], True),
    "mistral": (lambda: causal("Mistral"), ["model.layers.{}.mlp"], True),
    "gemma": (lambda: causal("Gemma", head_dim=8), ["model.layers.{}.mlp"], False),
    "bert": (lambda: bert("BertModel"), ["encoder.layer.{}.intermediate"], True),
    "bert lm": (lambda: bert("BertForMaskedLM"), ["bert.encoder.layer.{}.intermediate"], True),
    "gpt2": (gpt2, ["transformer.h.{}.mlp"], False),
    "vit": (
        lambda: vision.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5),
        ["encoder.layers.encoder_layer_{}.mlp"],
        True,
    ),
    "encoder": (Encoder, ["encoder.layers.{}.linear1"], True),
    "pre-norm encoder": (
        lambda: Encoder(norm_first=True, activation="gelu"),
        ["encoder.layers.{}.linear1"],
        True,
    ),
}
FIVE = ["llama", "qwen3", "bert", "vit", "encoder", "gpt2"]


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for p in model.parameters():  # biases begin at zero, which would hide them
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def inputs(family: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 3, 16, 16) if family == "vit" else torch.randint(2, 40, (3, 7))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    y: Any = model(x)
    if isinstance(y, Tensor):
        return y
    return y.logits if hasattr(y, "logits") else y.last_hidden_state


def layers(model: nn.Module) -> list[growmoe.MoE]:
    return list(growmoe.moe_layers(model).values())


@pytest.mark.parametrize("family", but_slow(FAMILIES, *FIVE))
def test_the_first_output_is_the_dense_one(family: str) -> None:
    model, x = build(family), inputs(family)
    dense = copy.deepcopy(model)
    assert upcycle(model, num_experts=4) is model
    _, (pattern,), is_ffn = FAMILIES[family]
    assert list(growmoe.moe_layers(model)) == [pattern.format(i) for i in range(2)]
    for layer in layers(model):
        assert len(layer.experts) == 4
        assert all((type(e.body) is growmoe.FFN) == is_ffn for e in layer.experts.values())
    for mode in (False, True):
        theirs, ours = (outputs(m.train(mode), x) for m in (dense, model))
        assert (theirs - ours).abs().max() <= 1e-5
        assert all(layer.training is mode for layer in layers(model))


@pytest.mark.parametrize("family", but_slow(FIVE, "llama", "encoder"))
def test_an_upcycled_model_trains_grows_shrinks_and_comes_back(family: str, tmp_path: Path) -> None:
    model, x = upcycle(build(family), num_experts=3, warmup=2), inputs(family)
    model.train()
    target = torch.randn_like(outputs(model, x))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    organizer = growmoe.Organizer(model, optimizer, every=2)
    growmoe.aux_loss(model)

    def steps(n: int) -> list[float]:
        losses = []
        for _ in range(n):
            loss = F.mse_loss(outputs(model, x), target)
            (loss + growmoe.aux_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            organizer.step(loss.detach())
            losses.append(float(loss.detach()))
        return losses

    losses = steps(6)
    first, last = layers(model)[0], layers(model)[-1]
    newborns = [growmoe.surgery.spawn(first, parent, optimizer).child for parent in (1, None)]
    growmoe.surgery.prune(last, [0], optimizer)
    before = {n: p.detach().clone() for n, p in first.experts.named_parameters()}
    losses += steps(8)
    assert losses[-1] < losses[0]
    for child in newborns:
        assert any(
            not torch.equal(p, before[f"{child}.{n}"])
            for n, p in first.experts[child].named_parameters()  # type: ignore[index]
        )
    growmoe.surgery.merge(first, [0, 1], optimizer)
    growmoe.save(tmp_path / "grown.safetensors", model, optimizer, organizer)
    again = upcycle(build(family), num_experts=2)
    growmoe.load(tmp_path / "grown.safetensors", again)
    with torch.no_grad():
        theirs, ours = (outputs(m.eval(), x) for m in (model, again))
    assert torch.equal(theirs, ours)


def test_cached_generation_equals_the_dense_models() -> None:
    model, ids = build("llama"), inputs("llama")
    dense = copy.deepcopy(model).eval()
    upcycle(model.eval(), num_experts=4)
    settings = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    theirs, ours = (m.generate(ids, use_cache=True, **settings) for m in (dense, model))
    assert torch.equal(theirs, ours)
    assert torch.equal(ours, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("training", [True, False])
def test_the_encoders_fast_path_does_not_go_around_the_mixture(training: bool) -> None:
    model, ids = build("encoder").train(training), inputs("encoder")
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        dense = model(ids, padding)
        upcycle(model, num_experts=4)
        same = model(ids, padding)
        real = ~padding
        assert (same - dense)[real].abs().max() <= 1e-5
        for layer in layers(model):
            for expert in layer.experts.values():
                expert.body.w_out.zero_()
        assert (model(ids, padding) - same)[real].abs().max() > 0.1


def test_a_shared_module_stays_one_mixture() -> None:
    shared = mlp()
    model = upcycle(Blocks(shared, mlp(), shared), num_experts=2)
    assert len(layers(model)) == 2
    assert model.blocks[0] is model.blocks[2]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": 8}
    albert = transformers.AlbertModel(transformers.AlbertConfig(**SIZES, **off)).eval()
    x, dense = inputs("albert"), copy.deepcopy(albert)
    upcycle(albert, num_experts=3)
    assert len(layers(albert)) == 1
    assert (outputs(dense, x) - outputs(albert, x)).abs().max() <= 1e-5


def test_dropout_in_a_block_is_kept() -> None:
    for model in (Blocks(mlp(dropout=0.5)), gpt2(resid_pdrop=0.5), Encoder()):
        if isinstance(model, Encoder):
            for layer in model.encoder.layers:
                layer.dropout.p = 0.5
        upcycle(model, num_experts=2)
        for layer in layers(model):
            x = torch.randn(64, 16)
            assert torch.equal(layer.eval()(x), layer(x))
            assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("activation", "is_ffn"),
    [(nn.GELU(), True), (nn.ReLU(), True), (nn.GELU("tanh"), False), (nn.SiLU(), False)],
)
def test_only_what_is_exactly_an_ffn_becomes_one(activation: nn.Module, is_ffn: bool) -> None:
    model = upcycle(Blocks(mlp(activation)), num_experts=2)
    assert (type(layers(model)[0].experts[0].body) is growmoe.FFN) == is_ffn


@pytest.mark.parametrize(
    "where",
    [
        ["blocks.1"],
        "*s.1",
        re.compile(r"blocks\.1"),
        lambda name, module: name == "blocks.1",
    ],
    ids=["list", "glob", "regex", "predicate"],
)
def test_where_chooses_exactly(where: Any) -> None:
    model = Blocks(mlp(), nn.Linear(16, 16), mlp())
    model.blocks[1] = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    x, dense = torch.randn(9, 16), copy.deepcopy(model)
    upcycle(model, where, num_experts=2)
    assert list(growmoe.moe_layers(model)) == ["blocks.1"]
    assert (dense(x) - model(x)).abs().max() <= 1e-5


def test_a_layer_whose_block_lies_inside_is_named_by_either() -> None:
    for where in (["encoder.layer.1"], "*.1.intermediate"):
        model = upcycle(build("bert"), where, num_experts=2)
        assert list(growmoe.moe_layers(model)) == ["encoder.layer.1.intermediate"]
    model = upcycle(build("encoder"), lambda _, m: isinstance(m, nn.TransformerEncoderLayer))
    assert len(layers(model)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_what_is_trainable_are_kept(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" in name)
    x, dense = inputs("llama"), copy.deepcopy(model)
    upcycle(model, num_experts=2)
    assert not any(layer.training for layer in layers(model))
    for layer in layers(model):
        for expert in layer.experts.values():
            assert {p.dtype for p in expert.parameters()} == {dtype}
            assert (expert.body.w_in.requires_grad, expert.body.w_out.requires_grad) == (
                False,
                True,
            )
            assert expert.entries.key.requires_grad
    theirs, ours = outputs(dense, x).double(), outputs(model, x).double()
    allowed = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    assert (theirs - ours).abs().max() <= allowed * theirs.abs().max()


def test_a_block_with_mixed_trainability_is_copied_as_it_is() -> None:
    model = build("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("gate_proj" not in name)
    upcycle(model, num_experts=2)
    for layer in layers(model):
        for name, p in layer.experts[1].body.named_parameters():
            assert p.requires_grad == ("gate_proj" not in name)


def test_each_layer_has_a_router_of_its_own_and_the_template_stays() -> None:
    router = growmoe.TopK(2)
    model = upcycle(build("llama"), num_experts=3, router=router, seed=7)
    first, second = layers(model)
    assert len({id(router), id(first.router), id(second.router)}) == 3
    assert not torch.equal(first.experts[0].entries.key, second.experts[0].entries.key)
    again = upcycle(build("llama"), num_experts=3, seed=7)
    assert torch.equal(layers(again)[1].experts[2].entries.key, second.experts[2].entries.key)


def test_noise_makes_the_experts_differ() -> None:
    model = Blocks(mlp())
    dense = copy.deepcopy(model.blocks[0])
    (layer,) = layers(upcycle(model, num_experts=3, noise=0.1))
    first = dense[0].weight.T
    for expert in layer.experts.values():
        off = (expert.body.w_in - first).norm() / first.norm()
        assert 0.05 < off < 0.15
    assert not torch.equal(layer.experts[0].body.w_in, layer.experts[1].body.w_in)


def test_causal_models_refuse_routers_that_see_the_future() -> None:
    class Oracle(growmoe.TopK):
        sees_future = True

    for family in ("llama", "gpt2"):
        with pytest.raises(ValueError, match="later tokens"):
            upcycle(build(family), router=Oracle(2))
        upcycle(build(family), router=Oracle(2), causal=False)
    for family in ("bert", "encoder", "vit"):
        upcycle(build(family), router=Oracle(2))
    with pytest.raises(ValueError, match="later tokens"):
        upcycle(build("encoder"), router=Oracle(2), causal=True)


def test_an_upcycled_model_can_be_copied_and_pickled() -> None:
    model, x = upcycle(build("gpt2"), num_experts=2).eval(), inputs("gpt2")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(model, x), outputs(other, x))
        growmoe.surgery.spawn(layers(other)[0])


def _optimizer_alive() -> tuple[nn.Module, Any]:
    model = Blocks(mlp())
    return model, torch.optim.AdamW(model.parameters())


def _tied() -> tuple[nn.Module, Any]:
    model = Blocks(mlp(), mlp())
    model.blocks[1][0].weight = model.blocks[0][0].weight
    return model, None


def _hooked() -> tuple[nn.Module, Any]:
    model = Blocks(mlp())
    model.blocks[0][1].register_forward_hook(lambda *_: None)
    return model, None


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (_optimizer_alive, {}, "upcycle first, then build the optimizer"),
        (_tied, {}, "Share the module itself"),
        (_hooked, {}, "hooks"),
        (lambda: (Blocks(mlp()).to("meta"), None), {}, "meta"),
        (lambda: (mlp(), None), {}, "the model itself"),
        (lambda: (nn.Linear(3, 3), None), {}, "no feed-forward block"),
        (lambda: (Blocks(mlp()), None), {"where": "*.7"}, "matches no module"),
        (lambda: (Blocks(mlp()), None), {"where": ["blocks.7"]}, "no module 'blocks.7'"),
        (lambda: (Blocks(mlp()), None), {"where": 3}, "where must be"),
        (lambda: (Blocks(mlp()), None), {"where": ["blocks", "blocks.0"]}, "which holds it"),
        (lambda: (Blocks(mlp()), None), {"where": ["blocks"]}, "does not map"),
        (lambda: (Blocks(nn.GELU()), None), {"where": ["blocks.0"]}, "has no weights"),
        (lambda: (Blocks(mlp()), None), {"router": growmoe.TopK(1)}, "do not sum to 1"),
        (
            lambda: (Blocks(mlp()), None),
            {"router": growmoe.TopK(2, "sigmoid", renormalize=False)},
            "do not sum to 1",
        ),
        (lambda: (Blocks(mlp()), None), {"num_experts": 1}, "at least 2 experts"),
        (lambda: (Blocks(mlp()), None), {"noise": -1.0}, "noise"),
        (lambda: (Blocks(mlp()), None), {"shared": 1}, "no option"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(
    make: Callable[[], tuple[nn.Module, Any]], settings: dict[str, Any], message: str
) -> None:
    model, _keep = make()
    before = {name: id(module) for name, module in model.named_modules()}
    state = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        upcycle(model, **settings)
    assert {name: id(module) for name, module in model.named_modules()} == before
    for name, p in model.named_parameters():
        assert p.is_meta or torch.equal(p, state[name])


def test_routers_that_drop_tokens_in_training_are_refused() -> None:
    class Forgetful(growmoe.TopK):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.renormalize = not self.training
            return super().forward(*args, **kwargs)

    assert issubclass(Forgetful, Router)
    with pytest.raises(ValueError, match=r"off by \d+%"):
        upcycle(Blocks(mlp()), router=Forgetful(2))


def test_a_last_block_that_fails_leaves_all_as_they_were() -> None:
    model = Blocks(mlp(), nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), mlp())
    model.blocks.append(nn.Bilinear(16, 16, 16))
    before = [id(block) for block in model.blocks]
    with pytest.raises(ValueError, match=r"'blocks\.3' does not map"):
        upcycle(model, "blocks.?")
    assert [id(block) for block in model.blocks] == before
