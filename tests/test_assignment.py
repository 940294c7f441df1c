"""An assignment's rows are sorted and complete; dispatch and combine are each other's transpose."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe import Assignment


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """expert_TK, weight_TK, E."""
    num_experts = draw(st.integers(1, 6))
    k = draw(st.integers(1, num_experts))
    row = st.permutations(range(num_experts)).map(lambda order: order[:k])
    rows = draw(st.lists(row, max_size=9))
    expert_TK = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight_TK = torch.rand(expert_TK.shape, dtype=torch.float64, generator=generator)
    return expert_TK, weight_TK, num_experts


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    """Made by either way, pairs being any subset in any order."""
    if draw(st.booleans()):
        return Assignment.from_choice(*draw(choices()))
    num_tokens, num_experts = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    every = [(t, e) for t in range(num_tokens) for e in range(num_experts)]
    pairs = draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    token_R, expert_R = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    weight_R = torch.rand(len(pairs), dtype=torch.float64)
    return Assignment.from_pairs(token_R, expert_R, weight_R, num_experts, num_tokens)


@given(assignments())
def test_rows_are_sorted_by_expert_and_counted(a: Assignment) -> None:
    experts = a.expert_R.tolist()
    assert experts == sorted(experts)
    assert a.counts_E.tolist() == [experts.count(e) for e in range(a.num_experts)]
    assert len(a.token_R) == len(a.weight_R) == len(experts)


@given(assignments())
def test_an_experts_rows_keep_the_order_of_the_tokens_they_were_given_in(a: Assignment) -> None:
    if a.slot_TK is None:
        return
    for e in range(a.num_experts):
        tokens = a.token_R[a.expert_R == e].tolist()
        assert tokens == sorted(tokens)


@given(choices())
def test_every_choice_has_its_row(choice: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    expert_TK, weight_TK, num_experts = choice
    a = Assignment.from_choice(expert_TK, weight_TK, num_experts)
    want = torch.zeros(len(expert_TK), num_experts, dtype=torch.float64)
    for t, row in enumerate(expert_TK.tolist()):
        for j, e in enumerate(row):
            want[t, e] = weight_TK[t, j]
    assert torch.equal(a.dense(), want)
    assert a.slot_TK is not None
    for t, slots in enumerate(a.slot_TK.tolist()):
        assert [int(a.token_R[s]) for s in slots] == [t] * expert_TK.shape[1]
        assert a.expert_R[slots].tolist() == expert_TK[t].tolist()


@given(assignments(), st.integers(1, 4))
def test_dispatch_copies_and_combine_sums(a: Assignment, width: int) -> None:
    x_TD = torch.randn(a.num_tokens, width, dtype=torch.float64)
    x_RD = a.dispatch(x_TD)
    assert x_RD.shape == (len(a.token_R), width)
    for r, t in enumerate(a.token_R.tolist()):
        assert torch.equal(x_RD[r], x_TD[t])
    out_RD = torch.randn(len(a.token_R), width, dtype=torch.float64)
    want = torch.zeros(a.num_tokens, width, dtype=torch.float64)
    for r, t in enumerate(a.token_R.tolist()):
        want[t] += a.weight_R[r] * out_RD[r]
    torch.testing.assert_close(a.combine(out_RD), want)


@given(assignments(), st.integers(1, 4))
def test_combine_is_the_transpose_of_dispatch(a: Assignment, width: int) -> None:
    ones = Assignment(
        a.token_R, a.expert_R, torch.ones_like(a.weight_R), a.counts_E, a.num_tokens, a.slot_TK
    )
    x_TD = torch.randn(a.num_tokens, width, dtype=torch.float64)
    y_RD = torch.randn(len(a.token_R), width, dtype=torch.float64)
    left, right = (ones.dispatch(x_TD) * y_RD).sum(), (x_TD * ones.combine(y_RD)).sum()
    torch.testing.assert_close(left, right)


@given(assignments())
def test_combine_of_dispatch_is_the_row_sum_of_dense(a: Assignment) -> None:
    ones_TD = torch.ones(a.num_tokens, 1, dtype=torch.float64)
    torch.testing.assert_close(a.combine(a.dispatch(ones_TD))[:, 0], a.dense().sum(1))


def pairs(weight_R: torch.Tensor) -> Assignment:
    token_R, expert_R = torch.tensor([[0, 2, 0, 3], [1, 1, 0, 2]])
    return Assignment.from_pairs(token_R, expert_R, weight_R, 4, 5)


def choice(weight_R: torch.Tensor) -> Assignment:
    return Assignment.from_choice(torch.tensor([[1, 0], [2, 1]]), weight_R.view(2, 2), 3)


def test_first_and_second_derivatives_are_right() -> None:
    weight_R = torch.rand(4, dtype=torch.float64, requires_grad=True)
    for make, tokens in ((pairs, 5), (choice, 2)):
        x_TD = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)

        def through(x_TD: torch.Tensor, weight_R: torch.Tensor) -> torch.Tensor:
            a = make(weight_R)  # noqa: B023
            return a.combine(a.dispatch(x_TD).sin())

        assert torch.autograd.gradcheck(through, (x_TD, weight_R))
        assert torch.autograd.gradgradcheck(through, (x_TD, weight_R))
        assert torch.autograd.gradcheck(lambda w: make(w).dense(), (weight_R,))  # noqa: B023


def test_a_token_without_rows_gets_zero() -> None:
    a = pairs(torch.ones(4))
    y = a.combine(a.dispatch(torch.ones(5, 2)))
    assert y.tolist() == [[2, 2], [0, 0], [1, 1], [1, 1], [0, 0]]


def test_combine_keeps_the_dtype_of_the_rows() -> None:
    a = pairs(torch.ones(4))
    assert a.combine(torch.ones(4, 2, dtype=torch.bfloat16)).dtype is torch.bfloat16
