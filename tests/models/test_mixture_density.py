"""MixtureDensity foretells several answers, and a birth gives it one more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from growmoe import FFN, surgery
from growmoe.models import MixtureDensity


def model_of(experts: int = 3, **options: object) -> MixtureDensity:
    return MixtureDensity(2, 3, experts, **{"d_model": 8, "seed": 0, **options})


def bimodal(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """y is near 1 + 0.3x or near its negative, half of the time each."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 1, generator=g) * 2 - 1
    sign = torch.randint(0, 2, (rows, 1), generator=g) * 2 - 1
    return x, sign * (1 + 0.3 * x) + 0.05 * torch.randn(rows, 1, generator=g)


def train(model: MixtureDensity, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.train()
    for step in range(steps):
        model.loss(*bimodal(128, seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def likelihood_loss(model: MixtureDensity) -> float:
    model.eval()
    x, y = bimodal(2000, seed=10_000)
    return -model.distribution(x).log_prob(y).mean().item()


def assert_on_both_modes(model: MixtureDensity) -> None:
    x = torch.tensor([[-0.8], [0.0], [0.8]])
    means, probs = model.eval().hypotheses(x)
    want = torch.cat([-1 - 0.3 * x, 1 + 0.3 * x], dim=1)
    torch.testing.assert_close(means.squeeze(-1).sort(-1).values, want, atol=0.2, rtol=0)
    assert (probs - 0.5).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_two_hypotheses_find_two_answers_and_one_cannot(epsilon: float | None) -> None:
    losses = {}
    for experts in (1, 2):
        model = MixtureDensity(1, 1, experts, d_model=16, winner_takes_all=epsilon, seed=0)
        train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 250)
        losses[experts] = likelihood_loss(model)
    one_gaussian = 0.5 * math.log(2 * math.pi * math.e)  # of variance about 1, the best it can do
    assert losses[1] == pytest.approx(one_gaussian, abs=0.05)
    assert losses[2] < losses[1] - 0.4
    assert_on_both_modes(model)


@pytest.mark.slow
def test_one_more_answer_is_one_surgery() -> None:
    model = MixtureDensity(1, 1, 1, d_model=16, seed=0, moe={"warmup": 50})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, optimizer, 100)
    before = likelihood_loss(model)
    surgery.spawn(model.mixture, None, optimizer)
    assert likelihood_loss(model) == pytest.approx(before, abs=1e-5)
    train(model, optimizer, 250)
    assert likelihood_loss(model) < before - 1.5
    assert_on_both_modes(model)


@torch.no_grad()
@pytest.mark.parametrize("parent", [None, 1])
@pytest.mark.parametrize("epsilon", [None, 0.2])
def test_a_newborn_changes_no_density_and_no_loss(
    parent: int | None, epsilon: float | None
) -> None:
    model = model_of(winner_takes_all=epsilon).eval()
    x, y = torch.randn(6, 2), torch.randn(6, 3)
    before = model.distribution(x).log_prob(y), model.loss(x, y), model.hypotheses(x)
    surgery.spawn(model.mixture, parent)
    torch.testing.assert_close(model.distribution(x).log_prob(y), before[0])
    torch.testing.assert_close(model.loss(x, y), before[1])
    means, probs = model.hypotheses(x)
    assert torch.equal(probs[:, 3], torch.zeros(6))
    torch.testing.assert_close(means[:, :3], before[2][0])


def test_a_newborn_is_let_in_by_training_and_all_gradients_are_finite() -> None:
    for epsilon in (None, 0.2):
        model = model_of(winner_takes_all=epsilon, moe={"warmup": 4})
        surgery.spawn(model.mixture)
        newborn = model.mixture.experts[3]
        model.loss(torch.randn(6, 2), torch.randn(6, 3)).backward()
        assert newborn.admission == 0.25
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert float(newborn.body.w_out.grad.abs().sum()) > 0
        assert model.mixture.steps == 1


@torch.no_grad()
def test_after_prune_and_merge_the_hypotheses_are_those_of_the_living() -> None:
    model = model_of(4).eval()
    x = torch.randn(6, 2)
    before, _ = model.hypotheses(x)
    surgery.prune(model.mixture, [1])
    means, probs = model.hypotheses(x)
    torch.testing.assert_close(means, before[:, [0, 2, 3]])
    torch.testing.assert_close(probs.sum(-1), torch.ones(6))
    surgery.merge(model.mixture, [0, 3])
    assert list(model.mixture.experts) == [2, 4]
    torch.testing.assert_close(model.hypotheses(x)[0][:, 0], before[:, 2])


@torch.no_grad()
def test_the_density_is_the_mixture_written_out() -> None:
    model = model_of().double().eval()
    x, y = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    mean, scale, log_probs = model(x)
    density = torch.zeros(5).double()
    for e, expert in enumerate(model.mixture.experts.values()):
        features = model.stem(x)
        raw = expert.body(features)
        torch.testing.assert_close(mean[:, e], raw[:, :3])
        torch.testing.assert_close(scale[:, e], 1e-3 + raw[:, 3:].exp().log1p())
        gauss = Normal(raw[:, :3], scale[:, e]).log_prob(y).sum(-1).exp()
        keys = torch.stack([o.entries.key for o in model.mixture.experts.values()])
        density += (features @ keys.T).softmax(-1)[:, e] * gauss
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5).double())
    torch.testing.assert_close(model.distribution(x).log_prob(y), density.log())
    torch.testing.assert_close(model.loss(x, y, reduction="none"), -density.log())
    torch.testing.assert_close(model.loss(x, y), -density.log().mean())
    assert model.distribution(x).sample((4,)).shape == (4, 5, 3)


@torch.no_grad()
def test_winner_takes_all_weighs_as_its_formula_says() -> None:
    model = model_of(winner_takes_all=0.3).eval()
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    mean, scale, log_probs = model(x)
    each = Normal(mean, scale).log_prob(y[:, None]).sum(-1)
    for b, got in enumerate(model.loss(x, y, reduction="none")):
        winner = int((mean[b] - y[b]).norm(dim=-1).argmin())
        want = -log_probs[b, winner]
        for e in range(3):
            want = want - (0.7 if e == winner else 0.15) * each[b, e]
        torch.testing.assert_close(got, want)


@torch.no_grad()
def test_a_lone_hypothesis_wins_all() -> None:
    x, y = torch.randn(5, 2), torch.randn(5, 3)
    a, b = model_of(1, winner_takes_all=0.3), model_of(1)
    torch.testing.assert_close(a.loss(x, y), b.loss(x, y))


@torch.no_grad()
def test_any_leading_shape_is_a_batch() -> None:
    model = model_of().eval()
    x, y = torch.randn(2, 4, 2), torch.randn(2, 4, 3)
    means, probs = model.hypotheses(x)
    assert means.shape == (2, 4, 3, 3) and probs.shape == (2, 4, 3)
    assert model.distribution(x).batch_shape == (2, 4)
    assert model.loss(x, y, reduction="none").shape == (2, 4)
    torch.testing.assert_close(means[1, 2], model.hypotheses(x[1, 2])[0])


def test_no_hook_is_left_behind() -> None:
    model = model_of()
    model(torch.randn(3, 2))
    with pytest.raises(ValueError, match="NaN"):
        model(torch.full((3, 2), math.nan))
    assert not any(m._forward_hooks for m in model.modules())


def test_hypotheses_start_apart_and_newborns_too() -> None:
    model = MixtureDensity(1, 1, 20, spread=5.0, seed=0, d_model=8)
    surgery.spawn(model.mixture)
    mean, scale, _ = model(torch.zeros(1, 1))
    assert 3 < mean.std().item() < 7
    assert 1.0 < scale.mean().item() < 1.5
    assert (mean[0, -1] - mean[0].mean()).abs().item() > 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": 0}, "num_experts"),
        ({"d_model": 0}, "d_model"),
        ({"min_scale": 0}, "min_scale"),
        ({"spread": -1}, "spread"),
        ({"winner_takes_all": 1.0}, "winner_takes_all"),
        ({"expert": FFN(4, d_model=8, d_out=5)}, "d_out=6"),
        ({"moe": {"router": 3}}, "router"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(**options)


def test_bad_inputs_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="d_in=2"):
        model(torch.randn(4, 3))
    with pytest.raises(ValueError, match="int64"):
        model(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be \\(4, 3\\)"):
        model.loss(torch.randn(4, 2), torch.randn(4, 1))
    with pytest.raises(ValueError, match="reduction"):
        model.loss(torch.randn(4, 2), torch.randn(4, 3), reduction="sum")
    assert model.mixture.steps == 0
