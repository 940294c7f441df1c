"""Experts that compute next to nothing are experts like any other."""

from __future__ import annotations

import pytest
import torch

import growmoe
from growmoe import FFN, MoE, TopK, surgery
from growmoe.experts import Constant, Copy, Zero

KINDS = [Zero, Copy, Constant]


def mixed(seed: int = 0) -> MoE:
    return MoE(8, [FFN(16), FFN(16), Zero(), Copy(), Constant()], 5, TopK(2), seed=seed)


def test_each_computes_its_formula() -> None:
    x = torch.randn(6, 4)
    torch.testing.assert_close(Zero(3)(x), torch.zeros(6, 3))
    assert Copy()(x) is x
    constant = Constant(4)
    with torch.no_grad():
        constant.value.copy_(torch.arange(4.0))
        constant.mix.copy_(torch.randn(2, 4))
    for row, got in zip(x, constant(x), strict=True):
        a = [torch.exp(row.dot(w)) for w in constant.mix]
        want = (a[0] * row + a[1] * constant.value) / (a[0] + a[1])
        torch.testing.assert_close(got, want)


def test_a_token_that_chose_zero_and_copy_gets_its_share_of_itself() -> None:
    layer = MoE(8, [Zero(), Copy()], 2, TopK(2), seed=0)
    x = torch.randn(7, 8)
    share = layer.route(x).assignment.dense()[:, 1:]
    torch.testing.assert_close(layer(x), share * x)


@pytest.mark.parametrize("position", [2, 3, 4])
def test_they_are_spawned_merged_frozen_and_pruned(position: int) -> None:
    layer = mixed()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    x = torch.randn(40, 8)
    clone = surgery.spawn(layer, position, optimizer, admitted=True).child
    assert clone is not None
    for _ in range(3):
        (layer(x).square().mean() + growmoe.aux_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    child = surgery.merge(layer, [position, clone], optimizer).child
    assert child is not None
    assert type(layer.experts[child].body) is KINDS[position - 2]
    surgery.freeze(layer, [child])
    surgery.prune(layer, [child], optimizer)
    assert layer(x).isfinite().all()


def test_a_layer_without_them_can_load_one_with_them(tmp_path) -> None:
    layer, x = mixed(), torch.randn(9, 8)
    growmoe.save(tmp_path / "layer", layer)
    other = MoE(8, FFN(16), 3, TopK(2), seed=5)
    growmoe.load(tmp_path / "layer", other)
    torch.testing.assert_close(other.eval()(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Copy, Constant])
def test_a_copy_of_another_width_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="maps 8 to 4"):
        MoE(8, kind(), 2, d_out=4)
