from __future__ import annotations

import pytest
import torch

from growmoe import surgery
from growmoe.lm.growing import GrowingLM


def taught(*texts, buckets=1 << 14):
    """A router and experts that have learned a text each."""
    model = GrowingLM(16, 8, 1, 2, buckets=buckets, seed=0)
    for _ in texts[1:]:
        surgery.spawn(model.layer, 0, noise=0.0, admitted=True)
    for expert, text in zip(model.paths, texts, strict=True):
        model.layer.router.learn(expert, text)
    return model.layer.router, model.paths


def text_of(low, high, seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, 40), generator=generator)


def test_the_distance_is_that_of_the_definition():
    # where all trigrams share one bucket, nothing differs
    router, experts = taught(text_of(0, 4, 0), buckets=1)
    assert router.distance(text_of(8, 12, 1), experts, torch.ones(1)) == pytest.approx(0.0)
    # a text of one trigram, of which the path has seen n: q = (n + 1/2) / (n + H/2)
    router, experts = taught(torch.zeros(1, 12, dtype=torch.long), buckets=64)
    q = (10 + 0.5) / (10 + 32)
    found = router.distance(torch.zeros(2, 5, dtype=torch.long), experts, torch.ones(1))
    assert found == pytest.approx(1 - q**0.5)


def test_other_text_lies_further_than_more_of_the_same():
    router, experts = taught(text_of(0, 4, 0, rows=64))
    same = router.distance(text_of(0, 4, 1), experts, torch.ones(1))
    other = router.distance(text_of(4, 8, 1), experts, torch.ones(1))
    part = router.distance(text_of(0, 2, 1), experts, torch.ones(1))  # easier, yet other text
    assert same < part < other <= 1.0


def test_a_batch_of_two_texts_lies_near_the_paths_so_mixed_and_far_from_either():
    texts = text_of(0, 4, 0, rows=64), text_of(4, 8, 1, rows=64)
    router, experts = taught(*texts, buckets=1024)
    batch = torch.cat([text_of(0, 4, 2, rows=4), text_of(4, 8, 3, rows=4)])
    winner = router.scores(batch, experts).argmax(1)
    assert winner.tolist() == [0] * 4 + [1] * 4
    mixed = router.distance(batch, experts, torch.tensor([0.5, 0.5]))
    for alone in ([1.0, 0.0], [0.0, 1.0]):
        assert mixed < router.distance(batch, experts, torch.tensor(alone)) - 0.1


def test_what_is_known_does_not_depend_on_the_order_of_the_stream():
    one, two = text_of(0, 4, 0), text_of(4, 8, 1)
    (_, (forth,)), (_, (back,)) = taught(torch.cat([one, two])), taught(torch.cat([two, one]))
    assert torch.equal(forth.entries.trigrams, back.entries.trigrams)
