"""Experts take what they have room for; the rest is dropped, or asks elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_capacity import placed, room_for
from reference_routers import Choice

from growmoe import FFN, Assignment, Capacity, MoE, Routing, TopK

ONE = torch.ones(())


def routing_of(logits: torch.Tensor, taken: torch.Tensor) -> Routing:
    """Softmax probabilities, and the experts taken with these as weights."""
    probs = logits.softmax(-1)
    token, expert = taken.nonzero(as_tuple=True)
    a = Assignment.from_pairs(token, expert, probs[token, expert], logits.shape[1], len(logits))
    return Routing(a, probs, logits)


def dense(capacity: Capacity, routing: Routing) -> torch.Tensor:
    return capacity(routing, True, ONE).assignment.dense()


# By hand: three tokens want expert 0, which has room for two; expert 1 has room for two.
LOGITS = torch.tensor([[3.0, 1.0], [9.0, 2.0], [5.0, 4.0]])
FIRST = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.bool)
TWO = 4 / 3  # of 3 rows on 2 experts


def test_by_position_the_first_in_the_batch_are_kept() -> None:
    kept = dense(Capacity(TWO), routing_of(LOGITS, FIRST)) > 0
    assert kept.tolist() == [[True, False], [True, False], [False, False]]


def test_by_gate_those_of_largest_weight_are_kept() -> None:
    # weights are 0.881, 0.999, 0.731
    kept = dense(Capacity(TWO, "gate"), routing_of(LOGITS, FIRST)) > 0
    assert kept.tolist() == [[True, False], [True, False], [False, False]]
    kept = dense(Capacity(0.5, "gate"), routing_of(LOGITS, FIRST)) > 0
    assert kept.tolist() == [[False, False], [True, False], [False, False]]


def test_a_rerouted_row_has_the_probability_of_where_it_went() -> None:
    routing = routing_of(LOGITS, FIRST)
    got = dense(Capacity(TWO, reroute=True), routing)
    p = math.exp(4) / (math.exp(4) + math.exp(5))
    assert float(got[2, 1]) == pytest.approx(p)
    assert torch.equal(got[:2], routing.assignment.dense()[:2])


def test_a_rerouted_row_of_a_router_that_divides_by_the_sum_is_divided_alike() -> None:
    # two of three experts, weights p/(p1 + p2): the second row moves from expert 1 to expert 2
    probs = torch.tensor([[0.5, 0.3, 0.2]] * 2)
    weights = torch.tensor([[0.5, 0.3]] * 2) / 0.8
    a = Assignment.from_choice(torch.tensor([[0, 1]] * 2), weights, 3)
    got = dense(Capacity(0.75, reroute=True), Routing(a, probs, probs.log()))  # room for one
    want = torch.tensor([[0.5, 0.3, 0], [0, 0, 0.2]]) / 0.8
    torch.testing.assert_close(got, want, msg=str(got))


def test_an_expert_that_is_not_admitted_is_not_asked() -> None:
    logits = torch.tensor([[3.0, -math.inf], [9.0, -math.inf], [5.0, -math.inf]])
    kept = dense(Capacity(TWO, reroute=True), routing_of(logits, FIRST))
    assert (kept > 0).sum().item() == 2


def test_who_is_refused_asks_its_next_best() -> None:
    # all four tokens take expert 0, room for one each; 1 and 2 both ask expert 1 first
    logits = torch.tensor([[9.0, 1, 0, 0], [9, 5, 3, 1], [9, 6, 4, 1], [9, 1, 2, 7.0]])
    taken = torch.zeros(4, 4, dtype=torch.bool)
    taken[:, 0] = True
    got = dense(Capacity(1.0, reroute=True), routing_of(logits, taken))
    assert got.nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    # by gate, the one whose weight would be larger is served first
    by_gate = dense(Capacity(1.0, "gate", reroute=True), routing_of(logits, taken))
    assert (by_gate > 0).sum(0).tolist() == [1, 1, 1, 1] and (by_gate > 0).sum(1).tolist() == [
        1
    ] * 4
    assert by_gate[2, 1] > 0  # 0.047 against the 0.018 of token 1


@st.composite
def crowds(draw: st.DrawFn) -> tuple[Routing, Choice, Capacity, int]:
    """Any tokens, any experts taken, any policy; as a Routing and for the reference."""
    tokens, experts = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g, dtype=torch.float64)
    crowded = torch.linspace(3, 0, experts, dtype=torch.float64)
    logits = logits + draw(st.sampled_from([0.0, 1.0])) * crowded
    if draw(st.booleans()):
        logits[:, -1] = -math.inf if experts > 1 else 0.0
    taken = torch.rand(tokens, experts, generator=g) < draw(st.sampled_from([0.3, 0.6]))
    taken &= logits.isfinite()
    factor = draw(st.sampled_from([0.3, 0.7, 1.0, 1.25, 2.0]))
    capacity = Capacity(factor, draw(st.sampled_from(["position", "gate"])), draw(st.booleans()))
    routing = routing_of(logits, taken)
    weights = [
        {e: routing.probs_TE[t, e] for e in range(experts) if taken[t, e]} for t in range(tokens)
    ]
    choice = Choice(weights, [[*row] for row in routing.probs_TE], [[*row] for row in logits])
    return routing, choice, capacity, room_for(factor, int(taken.sum()), experts)


@given(crowds())
def test_who_is_placed_where_is_as_the_plain_queues_have_it(
    case: tuple[Routing, Choice, Capacity, int],
) -> None:
    routing, choice, capacity, room = case
    got = capacity(routing, True, ONE).assignment
    want = placed(choice, room, capacity, got.num_experts, [])
    matrix = torch.zeros(got.num_tokens, got.num_experts, dtype=torch.float64)
    for t, row in enumerate(want):
        for e, w in row.items():
            matrix[t, e] = w
    torch.testing.assert_close(got.dense(), matrix, rtol=1e-12, atol=0)
    assert len(got.token_R) == sum(map(len, want))


@given(crowds())
def test_nobody_is_above_its_room_and_no_hope_is_left_untried(
    case: tuple[Routing, Choice, Capacity, int],
) -> None:
    routing, _, capacity, room = case
    before, after = routing.assignment, capacity(routing, True, ONE).assignment
    assert after.counts_E.sum() == len(after.token_R) <= len(before.token_R)
    assert (after.counts_E <= room).all()
    assert (after.expert_R.diff() >= 0).all()
    pairs = list(zip(after.token_R.tolist(), after.expert_R.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    had = torch.bincount(before.token_R, minlength=before.num_tokens)
    has = torch.bincount(after.token_R, minlength=before.num_tokens)
    assert (has <= had).all()
    if not capacity.reroute:
        assert set(pairs) <= set(
            zip(before.token_R.tolist(), before.expert_R.tolist(), strict=True)
        )
        full = torch.minimum(before.counts_E, torch.tensor(room))
        assert torch.equal(after.counts_E, full)
    else:
        first = set(zip(before.token_R.tolist(), before.expert_R.tolist(), strict=True))
        for t in (has < had).nonzero()[:, 0].tolist():
            for e in range(before.num_experts):
                untried = (t, e) not in first and (t, e) not in pairs
                if untried and routing.logits_TE[t, e].isfinite():
                    assert after.counts_E[e] == room, f"{t} lost a row, {e} has room"


@given(crowds())
def test_room_for_everyone_drops_nobody(case: tuple[Routing, Choice, Capacity, int]) -> None:
    routing, _, capacity, _ = case
    a = routing.assignment
    roomy = Capacity(a.num_experts + 1.0, capacity.drop, capacity.reroute)
    assert torch.equal(roomy(routing, True, ONE).assignment.dense(), a.dense())
    most = Capacity(1.0, capacity.drop, capacity.reroute)
    even = routing_of(torch.zeros(6, 3), torch.eye(3, dtype=torch.bool).repeat(2, 1))
    assert torch.equal(dense(most, even), even.assignment.dense())


def test_gradients_flow_through_the_weights_kept_and_rerouted() -> None:
    taken = torch.zeros(4, 3, dtype=torch.bool)
    taken[:, 0] = True
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for capacity in (Capacity(0.75, "gate"), Capacity(0.75, reroute=True)):
        assert torch.autograd.gradcheck(lambda v: dense(capacity, routing_of(v, taken)), (logits,))  # noqa: B023


def test_several_mixtures_of_a_row_are_kept_or_dropped_together() -> None:
    weights = torch.rand(3, 1, 2)
    a = Assignment.from_choice(torch.zeros(3, 1, dtype=torch.long), weights, 2)
    probs = torch.tensor([[0.7, 0.3]] * 3)
    for reroute in (False, True):
        got = dense(Capacity(TWO, reroute=reroute), Routing(a, probs, probs.log()))
        assert torch.equal(got[:2, 0], weights[:2, 0])
        torch.testing.assert_close(got[2, 1], weights[2, 0] * reroute * 3 / 7)


def test_adaptive_room_follows_the_running_imbalance() -> None:
    routing = routing_of(torch.tensor([[1.0, 0.0]] * 10), torch.tensor([[True, False]] * 10))
    for imbalance, kept in ((1.0, 6), (1.5, 9), (2.0, 10)):  # ceil(1.1 * imbalance * 5)
        a = Capacity("adaptive")(routing, True, torch.tensor(imbalance)).assignment
        assert a.counts_E.tolist() == [kept, 0]
    a = Capacity("adaptive", most=1.3)(routing, True, torch.tensor(9.0)).assignment
    assert a.counts_E.tolist() == [7, 0]


def test_adaptive_room_widens_under_a_skewed_gate_until_nothing_is_dropped() -> None:
    layer = MoE(4, FFN(4), 4, TopK(1), capacity=Capacity("adaptive"), seed=0)
    x = torch.rand(64, 4)
    with torch.no_grad():
        layer.experts[2].entries.key.fill_(5.0)
    shares = []
    for _ in range(120):
        before = float(layer.recorder.dropped[1])
        layer(x)
        shares.append(float(layer.recorder.dropped[1]) - before)
    assert shares[0] > 32 and shares[-1] == 0
    assert float(layer.recorder.imbalance[0]) == pytest.approx(4, rel=0.2)


def test_dropped_counts_rows_and_tokens_of_training_forwards_alone() -> None:
    layer = MoE(4, FFN(4), 4, TopK(2), capacity=Capacity(0.5, eval_factor=0.5), seed=0)
    rows = tokens = 0
    for seed in range(5):
        x = torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))
        kept = layer.route(x).assignment
        rows += 40 - len(kept.token_R)
        tokens += 20 - len(set(kept.token_R.tolist()))
        layer(x)
    assert layer.recorder.dropped[1:].tolist() == [rows, tokens]
    layer.eval()(x)
    assert layer.recorder.dropped[1:].tolist() == [rows, tokens]
    assert 0 < layer.recorder.dropped[0] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, "factor must be positive, got 0"),
        ({"factor": -1.0}, "factor must be positive"),
        ({"factor": math.nan}, "factor must be positive"),
        ({"factor": math.inf}, "factor must be positive"),
        ({"factor": "wide"}, "factor must be positive, got 'wide'"),
        ({"eval_factor": 0.0}, "eval_factor must be positive"),
        ({"eval_factor": "adaptive"}, "eval_factor must be positive"),
        ({"most": 0}, "most must be positive"),
        ({"drop": "last"}, r"drop must be one of \('position', 'gate'\), got 'last'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capacity(**options)  # type: ignore[arg-type]


def test_what_is_no_capacity_is_refused_by_the_layer() -> None:
    with pytest.raises(ValueError, match=r"capacity must be a growmoe.Capacity, got 1.25"):
        MoE(4, FFN(4), 4, capacity=1.25)  # type: ignore[arg-type]
