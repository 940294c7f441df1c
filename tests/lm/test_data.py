"""Batches: a pure function of seed and step, true to their domains."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growmoe.lm import Domain, TrainError, batch
from growmoe.lm.data import phase_weights, windows


def counting(name: str, first: int, length: int = 400) -> Domain:
    """Domains that share no token."""
    tokens = first + torch.arange(length) % 50
    return Domain(name, tokens, tokens, tokens, (length,) * 3)


DOMAINS = {name: counting(name, 60 * i) for i, name in enumerate(("a", "b", "c"))}


@given(step=st.integers(0, 10**6), seed=st.integers(0, 10**6))
def test_a_batch_depends_on_seed_and_step_alone(step, seed):
    first = batch(DOMAINS, None, step, seed, 4, 16)
    before = torch.get_rng_state()
    batch(DOMAINS, None, step + 1, seed, 4, 16)
    again = batch(DOMAINS, None, step, seed, 4, 16)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_other_seeds_and_steps_give_other_batches():
    seen = {
        tuple(batch(DOMAINS, None, step, seed, 4, 16)[0].flatten().tolist())
        for step in range(10)
        for seed in range(10)
    }
    assert len(seen) == 100


def test_a_row_is_a_window_of_its_domain_and_y_is_what_follows_x():
    x_BS, y_BS, domain_B = batch(DOMAINS, [1, 2, 3], 0, 0, 64, 16)
    assert x_BS.shape == y_BS.shape == (64, 16) and x_BS.dtype == y_BS.dtype == torch.int64
    assert torch.equal(x_BS[:, 1:], y_BS[:, :-1])
    assert torch.equal(x_BS // 60, domain_B[:, None].expand(-1, 16))
    assert torch.equal((x_BS % 60 + 1) % 50, y_BS % 60)


def test_domains_are_drawn_by_their_weights():
    drawn = torch.cat([batch(DOMAINS, [1, 0, 3], i, 0, 100, 4)[2] for i in range(20)])
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    assert share.tolist() == pytest.approx([0.25, 0.0, 0.75], abs=0.04)


def test_every_place_of_a_domain_is_drawn():
    short = {"a": Domain("a", *(torch.arange(8),) * 3, (8, 8, 8))}
    x_BS, y_BS, _ = batch(short, None, 0, 0, 200, 4)
    assert set(x_BS[:, 0].tolist()) == {0, 1, 2, 3}
    assert int(y_BS.max()) == 7


def test_windows_share_no_target_and_reach_both_ends():
    tokens_NS1 = windows(counting("a", 0, 101), "test", 10, 10)
    assert tokens_NS1.shape == (10, 11)
    one = Domain("a", *(torch.arange(101),) * 3, (101,) * 3)
    targets = windows(one, "test", 1000, 10)[:, 1:].flatten().tolist()
    assert len(targets) == len(set(targets)) == 100
    few = windows(one, "test", 3, 10)
    assert few[0, 0] == 0 and few[-1, -1] == 100


def test_phases_take_one_domain_after_the_other():
    phases = [phase_weights("phases", (), 3, step, 7).index(1.0) for step in range(7)]
    assert phases == [0, 0, 0, 1, 1, 2, 2]
    assert phase_weights("mixed", (), 3, 5, 7) == [1.0, 1.0, 1.0]
    assert phase_weights("mixed", (1, 2, 3), 3, 5, 7) == [1, 2, 3]


def test_a_domain_shorter_than_a_window_is_refused_by_name():
    with pytest.raises(TrainError, match="domain 'a': its train part has 400 tokens"):
        batch(DOMAINS, None, 0, 0, 4, 400)
    assert batch(DOMAINS, None, 0, 0, 4, 399)[0].shape == (4, 399)
