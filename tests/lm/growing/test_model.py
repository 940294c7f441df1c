from __future__ import annotations

import copy

import pytest
import torch

from growmoe import surgery
from growmoe.lm.growing import GrowingLM
from growmoe.lm.growing.model import SWITCH, posterior

SIZES = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 2, "seed": 0}


def grown(**options):
    """Two further paths, each of other weights and trigrams."""
    model = GrowingLM(**SIZES, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        event = surgery.spawn(model.layer, 0, noise=0.0, admitted=True)
        expert = model.layer.experts[event.child]
        with torch.no_grad():
            for p in expert.body.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        text = torch.randint(8 * event.child, 8 * event.child + 8, (4, 50), generator=generator)
        model.layer.router.learn(expert, text)
    return model.eval()


@pytest.mark.parametrize("gate", ["likelihood", "trigrams"])
@pytest.mark.parametrize("rank", [None, 2])
def test_no_prediction_changes_when_later_tokens_do(gate, rank):
    model = grown(gate=gate, rank=rank)
    before = torch.randint(32, (3, 20))
    for told in (before, None):
        x = torch.randint(32, (3, 24))
        y = model(x, told)
        for t in (0, 7, 22):
            other = x.clone()
            other[:, t + 1 :] = torch.randint(32, other[:, t + 1 :].shape)
            torch.testing.assert_close(model(other, told)[:, : t + 1], y[:, : t + 1])


@pytest.mark.parametrize("gate", ["likelihood", "trigrams"])
def test_what_it_gives_are_log_probabilities(gate):
    model = grown(gate=gate)
    y = model(torch.randint(32, (3, 24)), torch.randint(32, (3, 20)))
    torch.testing.assert_close(y.exp().sum(-1), torch.ones(3, 24))


def test_the_mixture_is_that_of_the_definition():
    model = grown()
    x = torch.randint(32, (2, 10))
    with torch.no_grad():
        y, logp = model(x), model.all_log_probs(x).double()
        for b in range(2):
            w = torch.full((3,), 1 / 3).double()
            for t in range(10):
                expected = (w[:, None] * logp[:, b, t].exp()).sum(0).log()
                torch.testing.assert_close(y[b, t].double(), expected, rtol=1e-4, atol=1e-4)
                if t < 9:
                    joint = w * logp[:, b, t, x[b, t + 1]].exp()
                    w = (1 - SWITCH) * joint / joint.sum() + SWITCH / 3


@pytest.mark.parametrize("gate", ["likelihood", "trigrams"])
@pytest.mark.parametrize("told", [None, torch.randint(8, 16, (3, 20))])
def test_the_weights_of_the_paths_are_those_of_the_predictions(gate, told):
    model = grown(gate=gate)
    x = torch.randint(32, (3, 24))
    weight_KBS = model.path_weights(x, told)
    assert weight_KBS.shape == (3, 3, 24)
    torch.testing.assert_close(weight_KBS.sum(0), torch.ones(3, 24))
    mixed = (model.all_log_probs(x) + weight_KBS.log()[..., None]).logsumexp(0)
    torch.testing.assert_close(model(x, told), mixed)


def test_the_only_path_weighs_all():
    model = GrowingLM(**SIZES).eval()
    torch.testing.assert_close(model.path_weights(torch.randint(32, (2, 5))), torch.ones(1, 2, 5))


def test_the_posterior_follows_a_change_of_text():
    logp = torch.full((2, 1, 40), -5.0)
    logp[0, :, :20] = -1.0
    logp[1, :, 20:] = -1.0
    weights, last = posterior(logp, torch.full((2, 1), 0.5))
    assert weights[0, 0, 20] > 0.99
    assert weights[1, 0, 24] > 0.9
    assert torch.equal(weights[..., -1], last)


def test_tokens_before_choose_the_path_that_learned_such_trigrams():
    model = grown(gate="trigrams")
    before = torch.cat([torch.randint(8, 16, (2, 40)), torch.randint(16, 24, (2, 40))])
    assert model.choose(before).tolist() == [1, 1, 2, 2]
    x = torch.randint(32, (4, 12))
    for row, path in enumerate((1, 1, 2, 2)):
        expected = model.path_logits(x[row : row + 1], path).log_softmax(-1)
        torch.testing.assert_close(model(x, before)[row : row + 1], expected)


def test_a_birth_changes_no_path_and_starts_as_its_parent():
    for rank in (None, 2):
        model = GrowingLM(**SIZES, rank=rank).eval()
        x = torch.randint(32, (2, 12))
        y = model.path_logits(x, 0)
        surgery.spawn(model.layer, 0, noise=0.0, admitted=True)
        assert torch.equal(model.path_logits(x, 0), y)
        torch.testing.assert_close(model.path_logits(x, 1), y)


def test_paths_of_one_ancestor_merge_and_their_trigrams_add_up():
    model = grown()
    sums = sum(model.layer.experts[id].entries.trigrams for id in (1, 2))
    event = surgery.merge(model.layer, [1, 2])
    child = model.layer.experts[event.child]
    assert torch.equal(child.entries.trigrams, sums)
    assert torch.isfinite(model(torch.randint(32, (2, 12)))).all()


def test_a_copied_low_rank_model_has_an_ancestor_of_its_own():
    model = grown(rank=2)
    other = copy.deepcopy(model)
    assert other.layer.experts[1].body.base is other.layer.experts[0].body
    x = torch.randint(32, (2, 12))
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_prompt_is_continued_by_its_likeliest_path(rank):
    model = grown(rank=rank)
    prompt = torch.randint(32, (3, 10))
    out = model.generate(prompt, 6, temperature=0.0)
    assert out.shape == (3, 16)
    assert torch.equal(out[:, :10], prompt)
    logp = model.all_log_probs(prompt[:, :-1])
    best = logp.gather(-1, prompt[None, :, 1:, None].expand(3, -1, -1, -1)).sum((2, 3)).argmax(0)
    for row in range(3):
        greedy = model.path_logits(out[row : row + 1, :-1], int(best[row]))[0, 9:].argmax(-1)
        assert torch.equal(out[row, 10:], greedy)


def test_what_is_kept_is_counted():
    model = grown()
    one = sum(p.numel() for p in model.paths[0].parameters())
    assert model.num_params() == 3 * (one + model.layer.router.buckets)
    assert model.num_params(active=True) == one
    assert model.flops_per_token(16) == 3 * model.paths[0].body.lm.flops_per_token(16)
    model.gate = "trigrams"
    assert model.flops_per_token(16) == model.paths[0].body.lm.flops_per_token(16)


@pytest.mark.parametrize(
    "wrong", [{"gate": "oracle"}, {"rank": 0}, {"buckets": 0}, {"num_heads": 3}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GrowingLM(**{**SIZES, **wrong})


def test_tokens_that_are_none_and_paths_that_are_not_there_are_refused():
    model = grown()
    with pytest.raises(ValueError, match="token"):
        model(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="vocab_size"):
        model(torch.full((2, 5), 99))
    with pytest.raises(ValueError, match="no path"):
        model.path_logits(torch.zeros(2, 5, dtype=torch.long), 7)
