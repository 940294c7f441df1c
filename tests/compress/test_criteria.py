"""Each criterion against a value worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from growmoe import FFN, Assignment, MoE, TopK, moe_layers
from growmoe.compress import collect, criteria, layers_of, losses, next_token_loss
from growmoe.compress.layer import CompressError, MoELayer, Observed
from growmoe.compress.statistics import LayerStatistics
from growmoe.models import TransformerLM

# Three tokens, three experts, two values. Expert 0 sees tokens 0 and 1, expert 1 token 2,
# expert 2 none. Outputs and weights:
#   row    token  expert  g     f          ‖f‖
#   0      0      0       0.5   (3, 4)     5
#   1      1      0       1.0   (0, -2)    2
#   2      2      1       0.25  (-8, 6)    10
OUT = torch.tensor([[3.0, 4.0], [0.0, -2.0], [-8.0, 6.0]])
WEIGHT = torch.tensor([0.5, 1.0, 0.25])
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 1.0]])


def observed(out: Tensor = OUT, mixture: Tensor | None = None) -> Observed:
    assignment = Assignment.from_pairs(
        torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), WEIGHT, num_experts=3, num_tokens=3
    )
    return Observed(torch.eye(3), assignment, out, LOGITS, mixture)


@pytest.fixture
def statistics() -> LayerStatistics:
    result = LayerStatistics(3)
    result.add(observed())
    return result


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("frequency", [2, 1, 0]),
        ("gate-mass", [1.5, 0.25, 0]),
        ("ean", [7, 10, 0]),
        ("man", [3.5, 10, 0]),
        ("msan", [14.5, 100, 0]),
        ("reap", [(0.5 * 5 + 1 * 2) / 2, 2.5, 0]),
        # expert 0: mean output (1.5, 1), E‖f‖² = 14.5, so a variance of 14.5 − 3.25 = 11.25,
        # and two of three tokens; expert 1 always gives the same
        ("mone", [2 / 3 * 11.25, 0, 0]),
    ],
)
def test_a_criterion_is_the_formula(
    statistics: LayerStatistics, name: str, expected: list[float]
) -> None:
    value = criteria.FROM_STATISTICS[name](statistics)
    assert value.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_two_calls_sum_up_to_one_over_all_tokens(statistics: LayerStatistics) -> None:
    statistics.add(observed())
    assert statistics.tokens == 6
    assert criteria.frequency(statistics).tolist() == [4, 2, 0]
    assert criteria.reap(statistics).tolist() == pytest.approx([2.25, 2.5, 0])
    assert statistics.peak.tolist() == [4, 8, 0]


def test_taylor_is_the_inner_product_of_gradient_and_weighted_output() -> None:
    # L = mixture · c with c = (1, 2), so expert 0 gives 0.5 · 11 + 1 · (−4) = 1.5, expert 1 1.0
    for through_mixture in (False, True):
        statistics = LayerStatistics(3)
        out = OUT.clone().requires_grad_()
        seen = observed(out)
        mixture = seen.assignment.combine(out)
        statistics.add(observed(out, mixture if through_mixture else None))
        (mixture @ torch.tensor([1.0, 2.0])).sum().backward()
        assert criteria.taylor(statistics).tolist() == pytest.approx([1.5, 1.0, 0])


def test_aimer_is_one_for_weights_of_one_size_and_those_go_first() -> None:
    even, sparse = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        even.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        sparse.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    # mean|W| / RMS: 1 / 1 and 0.5 / 1
    assert criteria.aimer([even, sparse]).tolist() == pytest.approx([-1.0, -0.5])


def test_router_norm_change_is_the_growth_of_the_rows() -> None:
    before = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    after = torch.tensor([[6.0, 8.0], [0.0, 0.5]])
    assert criteria.router_norm_change(after, before).tolist() == pytest.approx([5.0, -0.5])
    with pytest.raises(CompressError, match="reference"):
        criteria.router_norm_change(after, before[:1])


def test_leave_one_out_is_the_loss_of_the_pruned_model(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    layer = layers_of(model)[0]
    found = criteria.leave_one_out(model, layer, batches, next_token_loss)
    before = losses(model, batches).mean()
    layer.prune([3])
    assert float(losses(model, batches).mean() - before) == pytest.approx(float(found[3]), abs=1e-6)


def test_random_follows_its_generator() -> None:
    def draw(seed: int) -> list[float]:
        return criteria.random(5, torch.Generator().manual_seed(seed)).tolist()

    assert draw(1) == draw(1) != draw(2)


def test_a_super_expert_is_one_behind_a_massive_activation_in_the_first_layers() -> None:
    def layer(*peaks: float) -> LayerStatistics:
        statistics = LayerStatistics(len(peaks))
        statistics.peak = torch.tensor(peaks, dtype=torch.float64)
        return statistics

    found = criteria.super_experts(
        {
            "a": layer(1, 1, 1, 100),
            "b": layer(1, 5, 1, 1),
            "c": layer(1, 1, 1, 1),
            "d": layer(1, 1, 200, 1),  # the last quarter is not guarded
        }
    )
    assert found == {"a": [], "b": [], "c": [], "d": []}  # 100 is below the 99.5th percentile
    found = criteria.super_experts({"a": layer(*[1.0] * 299, 100.0), "b": layer(1, 2, 3)})
    assert found == {"a": [299], "b": []}


def test_what_a_layer_tells_is_what_it_computes() -> None:
    moe = MoE(6, FFN(8), num_experts=4, router=TopK(2), seed=0).eval()
    seen: list[Observed] = []
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    with MoELayer("moe", moe).observe(seen.append):
        y = moe(x)
    moe(x)
    assert len(seen) == 1, "the hook is gone after the block"
    torch.testing.assert_close(seen[0].assignment.combine(seen[0].out_RO), y)
    dense = MoELayer("moe", moe).weights(x)
    torch.testing.assert_close(seen[0].assignment.dense(), dense)


def test_masking_an_expert_computes_as_pruning_it_and_leaves_no_trace(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    layers = layers_of(model)
    before = losses(model, batches)
    with layers[0].masked([1, 4]), layers[1].masked([0]):
        masked = losses(model, batches)
    assert torch.equal(losses(model, batches), before)
    layers[0].prune([1, 4])
    layers[1].prune([0])
    torch.testing.assert_close(losses(model, batches), masked, rtol=1e-5, atol=1e-6)


def test_weights_without_experts_are_those_of_the_pruned_layer() -> None:
    moe = MoE(6, FFN(8), num_experts=4, router=TopK(2), seed=0).eval()
    layer = MoELayer("moe", moe)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    weights = layer.weights(x, [1])
    assert not weights[:, 1].any()
    layer.prune([1])
    torch.testing.assert_close(weights[:, [0, 2, 3]], layer.weights(x))
    with pytest.raises(CompressError, match="1 experts would be left"):
        layer.weights(x, [0, 2])


def test_one_pass_collects_all_layers_and_leaves_gradients_alone(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    model.train()
    kept = next(model.parameters())
    kept.grad = torch.ones_like(kept)
    statistics, loss_N = collect(model, layers_of(model), batches, gradients=True)
    assert model.training and torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert list(statistics) == list(moe_layers(model))
    for seen in statistics.values():
        assert seen.tokens == 4 * 4 * 16 and float(seen.count.sum()) == 2 * seen.tokens
        assert bool(seen.taylor.any())
    torch.testing.assert_close(loss_N, losses(model, batches))


def test_taylor_agrees_with_a_small_change_of_the_expert(
    model: TransformerLM, batches: list[Tensor]
) -> None:
    # d/ds of the loss when expert 2's output is scaled by s, at s = 1
    model.double()
    layer = layers_of(model)[1]
    statistics, _ = collect(model, [layer], batches, gradients=True)
    body = layer.ffn(2)
    step, found = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            body.w_out.mul_(1 + sign * step)
        found.append(float(losses(model, batches).sum()))
        with torch.no_grad():
            body.w_out.div_(1 + sign * step)
    slope = (found[0] - found[1]) / (2 * step)
    assert float(statistics[layer.name].taylor[2]) == pytest.approx(slope, rel=1e-4)


def test_statistics_go_on_from_their_state(statistics: LayerStatistics) -> None:
    again = LayerStatistics.from_state(statistics.state())
    for one in (statistics, again):
        one.add(observed())
    for name, value in statistics.state().items():
        assert torch.equal(value, again.state()[name]), name


def test_the_kept_inputs_are_a_uniform_sample() -> None:
    kept = torch.zeros(40)
    for seed in range(120):
        statistics = LayerStatistics(3, samples=8, seed=seed)
        for start in range(0, 40, 10):
            x = torch.arange(start, start + 10.0)[:, None]
            n = len(x)
            assignment = Assignment.from_pairs(
                torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.ones(n), 3, n
            )
            statistics.add(Observed(x, assignment, torch.ones(n, 2), torch.zeros(n, 3)))
        assert len(statistics.sample_ND) == 8
        kept[statistics.sample_ND[:, 0].long()] += 1
    # each of 40 is kept with probability 1/5: 24 of 120, standard deviation 4.4
    assert float((kept - 24).abs().max()) < 4 * math.sqrt(120 * 0.2 * 0.8)
