import copy

import pytest
import torch
import torch.nn.functional as F

import growmoe
from growmoe import surgery
from growmoe.experts.moments import Moments
from growmoe.routers import ClosedFormGate
from growmoe.routers.ridge import solve_ridge


def classifier_layer(d_model=4, labels=3):
    """A closed-form layer with one expert for each label."""
    layer = growmoe.MoE(
        d_model,
        [lambda c=c: Moments(labels, c, d_model) for c in range(labels)],
        num_experts=labels,
        router=ClosedFormGate(),
        d_out=labels,
        evidence="moments",
        balance_loss=0.0,
        seed=0,
    )
    return layer.train()


def clusters(count=300, d_model=4, labels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(labels, d_model, generator=torch.Generator().manual_seed(9))
    y = torch.randint(labels, (count,), generator=g)
    return centre[y] + torch.randn(count, d_model, generator=g), y


def test_moments_are_the_sum_over_all_rows_whatever_their_order_and_batches():
    x, _ = clusters()
    whole, parts = Moments(3, 1, 4), Moments(3, 1, 4)
    whole(x)
    for part in x[torch.randperm(len(x))].split(7):
        parts(part)
    x1 = F.pad(x, (0, 1), value=1.0)
    torch.testing.assert_close(whole.moment, x1.T @ x1)
    torch.testing.assert_close(parts.moment, whole.moment)
    assert whole.count == len(x)
    torch.testing.assert_close(whole.totals()[0], x1.sum(0))


@pytest.mark.parametrize("width", (1, 127, 128, 300))
def test_half_of_the_symmetric_moment_is_kept_and_rows_can_be_taken_back(width):
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    body = Moments(2, 0, width)
    body(x)
    x1 = F.pad(x, (0, 1), value=1.0)
    torch.testing.assert_close(body.moment, x1.T @ x1)
    assert body.panels.numel() <= (width + 1) * (width + 1 + 128) / 2
    body.add(x[20:], times=-1.0)
    torch.testing.assert_close(body.moment, x1[:20].T @ x1[:20], rtol=1e-4, atol=1e-4)
    assert body.count == 20


def test_blocks_are_summed_up_apart_and_their_heads_averaged():
    x, y = clusters(400, d_model=6)
    body = Moments(3, 1, 6, blocks=(4, 2))
    body(x)
    for moment, part in zip(body.moments(), (x[:, :4], x[:, 4:]), strict=True):
        part1 = F.pad(part, (0, 1), value=1.0)
        torch.testing.assert_close(moment, part1.T @ part1)
    assert body.sample(7, torch.Generator().manual_seed(0)).shape == (7, 6)
    with pytest.raises(ValueError, match=r"blocks \(4, 3\) do not make up 6"):
        Moments(3, 1, 6, blocks=(4, 3))

    def scores(columns, blocks):
        layer = growmoe.MoE(
            columns.stop - columns.start,
            [lambda c=c: Moments(3, c, columns.stop - columns.start, blocks) for c in range(3)],
            num_experts=3,
            router=ClosedFormGate(),
            d_out=3,
            evidence="moments",
        )
        layer.train()(x[:, columns], context=y)
        return layer.eval().route(x[:, columns]).logits_TE

    both = (scores(slice(0, 4), None) + scores(slice(4, 6), None)) / 2
    torch.testing.assert_close(scores(slice(0, 6), (4, 2)), both)


def test_a_merger_is_what_one_expert_would_hold_that_had_seen_everything():
    x, _ = clusters()
    a, b, both = (Moments(3, 1, 4) for _ in range(3))
    a(x[:100]), b(x[100:]), both(x)
    torch.testing.assert_close(a.merged([b], [1, 1]).moment, both.moment)
    with pytest.raises(ValueError, match=r"different labels \[0, 1\]"):
        a.merged([Moments(3, 0, 4)], [1, 1])


def test_eval_mode_and_freezing_stop_the_sums_but_not_the_say():
    layer = classifier_layer()
    x, y = clusters()
    layer(x, context=y)
    surgery.freeze(layer, [1])
    before = layer.experts[1].body.moment.clone()
    layer(x, context=y)
    assert torch.equal(layer.experts[1].body.moment, before)
    assert layer.experts[0].body.count == 2 * (y == 0).sum()
    assert layer.experts[1].statistics["rows"] == 2 * (y == 1).sum()
    # the frozen expert's moments count for all it received: the gate is as if it had gone on
    other = classifier_layer()
    other(x, context=y), other(x, context=y)
    torch.testing.assert_close(layer.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


def test_the_global_head_is_ridge_regression_on_everything_seen():
    x, y = clusters()
    layer = classifier_layer()
    for rows in torch.arange(len(x)).split(50):
        layer(x[rows], context=y[rows])
    routing = layer.eval().route(x)
    x1 = F.pad(x, (0, 1), value=1.0).double()
    gram = x1.T @ x1
    penalty = 0.3 * gram.diagonal()[:-1].mean() / len(x)
    gram[:-1, :-1] += penalty * torch.eye(4)
    expected = x1 @ torch.linalg.solve(gram, x1.T @ F.one_hot(y).double())
    torch.testing.assert_close(routing.logits_TE.double(), expected, rtol=1e-4, atol=1e-4)


def log_ratio(head, x1, first, second):
    """Of Gaussians with the mean and variance of either's scores, as if seen 20 rows more."""
    (u, v), count = (first @ head, second @ head), len(first) + len(second)
    both = (len(u) * u.var(correction=0) + len(v) * v.var(correction=0)) / count
    a, b = (
        torch.distributions.Normal(
            s.mean(), ((len(s) * s.var(correction=0) + 20 * both) / (len(s) + 20)).sqrt()
        )
        for s in (u, v)
    )
    return a.log_prob(x1 @ head) - b.log_prob(x1 @ head)


def test_weights_are_the_votes_of_the_pairs_local_heads():
    x, y = clusters()
    every = F.pad(x, (0, 1), value=1.0)
    layer = classifier_layer()
    layer(x, context=y)
    scores = layer.eval()(x[:5])
    m = [layer.experts[c].body.moment for c in range(3)]
    x1 = F.pad(x[:5], (0, 1), value=1.0)
    votes = torch.zeros(5, 3)
    for a in range(3):
        for b in range(3):
            if a != b:
                target = (m[a][-1] - m[b][-1])[:, None]
                head = solve_ridge(m[a] + m[b], target, 2.0)[:, 0]
                votes[:, a] += torch.sigmoid(log_ratio(head, x1, every[y == a], every[y == b]))
    torch.testing.assert_close(scores, votes / votes.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert (layer(x).argmax(1) == y).float().mean() > 0.9


def test_the_order_of_the_stream_changes_nothing_but_rounding():
    x, y = clusters(600)
    mixed, sorted_by_class = classifier_layer(), classifier_layer()
    for rows in torch.randperm(len(x)).split(20):
        mixed(x[rows], context=y[rows])
    for rows in y.argsort().split(20):
        sorted_by_class(x[rows], context=y[rows])
    torch.testing.assert_close(mixed.eval()(x), sorted_by_class.eval()(x), rtol=1e-3, atol=1e-4)


def test_an_input_whose_label_has_no_expert_is_not_routed():
    layer = growmoe.MoE(
        4, lambda: Moments(3, 0, 4), 1, router=ClosedFormGate(), d_out=3, evidence="moments"
    )
    x, y = clusters()
    layer.train()(x, context=y)
    assert layer.experts[0].body.count == (y == 0).sum()


def test_what_is_novel_to_its_label_goes_to_the_newborn():
    layer = classifier_layer()
    for seed in range(40):
        x, y = clusters(60, seed=seed)
        layer(x, context=y)
    child = surgery.spawn(layer, parent=1).child
    x, y = clusters(60, seed=99)
    moved = torch.where((y == 1)[:, None], x + 50, x)
    layer(moved, context=y)
    assert layer.experts[child].body.count == (y == 1).sum()
    assert int(layer.experts[child].body.label) == 1
    known = x[y == 1]
    layer(known, context=y[y == 1])
    assert layer.experts[child].body.count == (y == 1).sum()  # what was known stays with the parent


def test_state_dict_deepcopy_and_checkpoint_keep_predictions(tmp_path):
    layer = classifier_layer()
    x, y = clusters()
    layer(x, context=y)
    expected = layer.eval()(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    growmoe.save(tmp_path / "c.safetensors", layer)
    other = classifier_layer().eval()
    other(x[:1])  # heads of an empty model must not outlive the load
    growmoe.load(tmp_path / "c.safetensors", other)
    torch.testing.assert_close(other(x), expected)


def test_samples_have_the_moments_of_what_was_seen():
    x, _ = clusters(2000)
    body = Moments(3, 0, 4)
    body(x)
    drawn = body.sample(20000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0.1, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), x.T.cov(), rtol=0.1, atol=0.2)


def test_only_moments_experts_can_stand_behind_the_gate():
    layer = growmoe.MoE(4, growmoe.FFN(8), 2, router=ClosedFormGate())
    with pytest.raises(ValueError, match="expert 0 is a FFN"):
        layer.eval()(torch.zeros(2, 4))
