"""Conditioned adds a bias for what the caller knows, and nothing for what it does not."""

from __future__ import annotations

import pytest
import torch
from router_cases import layer_with, one

from growmoe import FFN, MoE, TopK
from growmoe.routers import Conditioned, ContextMissing, Cosine, Hash


def layer_of(**options: object) -> MoE:
    layer = layer_with([1.0, 0.0, -1.0], TopK(1, gate=Conditioned(2, **options)))
    with torch.no_grad():
        for e, bias in zip(
            layer.experts.values(), ([0.0, 0.0], [0.0, 3.0], [0.5, 0.0]), strict=True
        ):
            getattr(e.entries, f"{options.get('by', 'task')}_bias").copy_(torch.tensor(bias))
    return layer


def test_each_value_has_its_own_bias() -> None:
    routing = layer_of().route(one(2), context={"task": torch.tensor([0, 1])})
    want = torch.tensor([[1.0, 0.0, -0.5], [1.0, 3.0, -1.0]])
    torch.testing.assert_close(routing.logits_TE, want)
    assert routing.assignment.dense().argmax(1).tolist() == [0, 1]


def test_without_context_it_is_the_plain_gate() -> None:
    layer = layer_of()
    plain = layer_with([1.0, 0.0, -1.0], TopK(1))
    assert torch.equal(layer.route(one(3)).logits_TE, plain.route(one(3)).logits_TE)
    other = layer.route(one(3), context={"client": 1})
    assert torch.equal(other.logits_TE, plain.route(one(3)).logits_TE)


def test_a_fresh_bias_is_zero_and_is_learned_for_the_values_seen() -> None:
    layer = MoE(4, FFN(4), 3, TopK(2, gate=Conditioned(3)), seed=0)
    assert not any(e.entries.task_bias.any() for e in layer.experts.values())
    layer(torch.randn(8, 4), {"task": 1}).square().sum().backward()
    gradient = torch.stack([e.entries.task_bias.grad for e in layer.experts.values()])
    assert gradient[:, 1].all() and not gradient[:, [0, 2]].any()


def test_one_value_is_of_all_and_one_per_sequence_of_its_tokens() -> None:
    layer = layer_of()
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x, {"task": 1}), layer(x, {"task": torch.ones(2, 3).long()}))
    tasks = torch.tensor([0, 1])
    each = tasks[:, None].expand(2, 3)
    assert torch.equal(layer(x, {"task": tasks}), layer(x, {"task": each}))
    assert torch.equal(layer(x, {"task": [0, 1]}), layer(x, {"task": each}))


def test_alone_the_token_does_not_matter_and_the_value_must_be_told() -> None:
    layer = MoE(4, FFN(4), 3, TopK(1, gate=Conditioned(2, "client", alone=True)), seed=0)
    routing = layer.route(torch.randn(5, 4), context={"client": 1})
    assert (routing.logits_TE == routing.logits_TE[:1]).all()
    assert set(dict(layer.experts[0].entries.named_parameters())) == {"client_bias"}
    with pytest.raises(ContextMissing, match="chooses by 'client'"):
        layer(torch.randn(5, 4))


def test_it_conditions_any_gate_even_another_of_its_kind() -> None:
    gate = Conditioned(2, "modality", gate=Conditioned(3, gate=Cosine()))
    layer = MoE(4, FFN(4), 3, TopK(1, gate=gate), seed=0)
    assert set(dict(layer.experts[0].entries.named_parameters())) == {
        "key",
        "task_bias",
        "modality_bias",
    }
    layer(torch.randn(4, 4), {"modality": 1, "task": torch.tensor([2, 0])}).sum().backward()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "context 'task' must be integers, got torch.float32"),
        (0.0, "must be integers"),
        (torch.zeros(3, dtype=torch.long), "has 3 values for 4 tokens"),
        (torch.zeros(0, dtype=torch.long), "has 0 values for 4 tokens"),
        (torch.zeros(8, dtype=torch.long), "has 8 values for 4 tokens"),
        (2, r"'task' must be in 0..1"),
        (-1, r"'task' must be in 0..1"),
    ],
)
def test_a_bad_context_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of()(one(4), {"task": value})


def test_a_router_that_takes_no_value_alone_says_so() -> None:
    with pytest.raises(ValueError, match="uses no context of its own; pass a mapping"):
        layer_of()(one(4), 1)
    assert Hash().wants == "token"


@pytest.mark.parametrize("num", [0, -1, 2.0])
def test_a_bad_number_of_values_is_refused(num: float) -> None:
    with pytest.raises(ValueError, match="num must be a positive integer"):
        Conditioned(num)  # type: ignore[arg-type]
