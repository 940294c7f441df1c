"""Hash spreads tokens evenly, and moves as few as can be when experts come and go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_routers import hash_score
from router_cases import within_3_sd

from growmoe import FFN, MoE, surgery
from growmoe.routers import ContextMissing, Hash
from growmoe.routers.hash import hashed

N = 6_000
IDS = torch.arange(N)


def layer_of(experts: int = 8, k: int = 1, seed: int = 0) -> MoE:
    return MoE(4, FFN(4), experts, Hash(k, seed=seed), seed=0).eval()


def chosen(layer: MoE, ids: torch.Tensor = IDS) -> list[set[int]]:
    """Per token, the ids of its experts."""
    names = list(layer.experts)
    dense = layer.route(torch.zeros(len(ids), 4), context=ids).assignment.dense() > 0
    return [{names[e] for e in row.nonzero()[:, 0].tolist()} for row in dense]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_the_hash_is_splitmix64_on_whole_numbers(value: int, id: int) -> None:
    got = hashed(torch.tensor([value]), torch.tensor([id + 1])).item()
    assert got == hash_score(value, id, 0)
    assert 0 < got < 1


@pytest.mark.parametrize("k", [1, 3])
def test_every_expert_has_its_even_part_of_many_tokens(k: int) -> None:
    sets = chosen(layer_of(k=k))
    assert all(len(s) == k for s in sets)
    for e in range(8):
        assert within_3_sd(sum(e in s for s in sets), N, k / 8)


@pytest.mark.parametrize("k", [1, 2])
def test_when_an_expert_goes_only_its_tokens_move(k: int) -> None:
    layer = layer_of(k=k)
    before = chosen(layer)
    surgery.prune(layer, [3])
    for old, new in zip(before, chosen(layer), strict=True):
        assert old - {3} <= new
        assert 3 in old or old == new


def test_the_tokens_of_one_that_goes_are_spread_over_all_others() -> None:
    layer = layer_of()
    before = chosen(layer)
    surgery.prune(layer, [3])
    after = chosen(layer)
    heirs = [new for old, new in zip(before, after, strict=True) if old == {3}]
    for e in (0, 1, 2, 4, 5, 6, 7):
        assert within_3_sd(heirs.count({e}), len(heirs), 1 / 7)


@pytest.mark.parametrize("k", [1, 2])
def test_a_newborn_takes_an_even_part_of_everyones_and_nobody_else_moves(k: int) -> None:
    layer = layer_of(k=k)
    before = chosen(layer)
    child = surgery.spawn(layer, 0, admitted=True).child
    after = chosen(layer)
    assert all(new <= old | {child} for old, new in zip(before, after, strict=True))
    for e in range(8):
        lost = sum(e in old and e not in new for old, new in zip(before, after, strict=True))
        had = sum(e in old for old in before)
        assert within_3_sd(lost, had, 1 / 9)


@pytest.mark.parametrize("admission", [0.0, 0.25, 0.5])
def test_an_admission_is_the_newborns_share_against_that_of_others(admission: float) -> None:
    layer = layer_of(4)
    child = surgery.spawn(layer, None).child
    layer.experts[child].admission = admission
    sets = chosen(layer)
    for e in range(5):
        share = (admission if e == child else 1) / (4 + admission)
        assert within_3_sd(sum(e in s for s in sets), N, share)


def test_a_token_goes_the_same_way_everywhere_and_another_seed_another() -> None:
    assert chosen(layer_of(seed=1)) == chosen(layer_of(seed=1))
    same = sum(
        a == b for a, b in zip(chosen(layer_of(seed=1)), chosen(layer_of(seed=2)), strict=True)
    )
    assert within_3_sd(same, N, 1 / 8)
    layer = layer_of()
    assert chosen(layer, IDS[:50].flip(0)) == chosen(layer)[:50][::-1]


def test_it_is_told_by_sequence_or_by_name_and_must_be_told() -> None:
    layer = layer_of()
    x = torch.randn(2, 3, 4)
    each = layer(x, torch.tensor([[5, 5, 5], [9, 9, 9]]))
    assert torch.equal(layer(x, torch.tensor([5, 9])), each)
    assert torch.equal(layer(x, {"token": torch.tensor([5, 9])}), each)
    with pytest.raises(ContextMissing, match="chooses by 'token'"):
        layer(x)
    other = MoE(4, FFN(4), 4, Hash(by="client"), seed=0)
    with pytest.raises(ContextMissing, match="chooses by 'client'"):
        other(x, {"token": 3})
    assert other(x, {"client": 3}).shape == x.shape


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(6), "must be integers, got torch.float32"),
        (torch.arange(4), "has 4 values for 6 tokens"),
        (torch.arange(7), "has 7 values for 6 tokens"),
        (torch.arange(0), "has 0 values for 6 tokens"),
    ],
)
def test_a_bad_context_is_refused_and_nothing_changes(value: torch.Tensor, message: str) -> None:
    layer = layer_of().train()
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 3, 4), value)


def test_k_must_be_positive() -> None:
    with pytest.raises(ValueError, match="k must be a positive integer, got 0"):
        Hash(0)
