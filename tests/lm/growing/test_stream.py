from __future__ import annotations

import pytest
import torch

from growmoe.lm import TrainError
from growmoe.lm.growing import TextStream


def test_a_stream_is_the_same_whenever_it_is_read_and_another_for_another_seed(alphabets):
    phases = [("low", 4), ("high", 4)]
    one = TextStream(alphabets, phases, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, one, strict=True))
    other = TextStream(alphabets, phases, seed=2)
    assert not torch.equal(next(iter(one)), next(iter(other)))


@pytest.mark.parametrize("order", ["shuffled", "documents"])
def test_rows_change_their_domain_one_after_the_other(alphabets, order):
    stream = TextStream(alphabets, [("low", 5), ("high", 5)], order, 8, 16, stagger=4)
    low = set(alphabets["low"].train.tolist())
    new = torch.stack(
        [torch.tensor([not set(row.tolist()) <= low for row in batch]) for batch in stream]
    )
    assert not new[:5].any()
    assert new[5].sum() == 2
    assert new[8:].all()
    assert stream.boundaries == [5]


def test_in_documents_each_row_reads_on_also_where_its_domain_returns(alphabets):
    stream = TextStream(
        alphabets, [("low", 2), ("high", 2), ("low", 2)], "documents", 4, 16, seed=3
    )
    batches = list(stream)
    assert torch.equal(batches[1][:, 0], batches[0][:, -1])
    assert torch.equal(batches[4][:, 0], batches[1][:, -1])


def test_streams_that_cannot_be_are_refused(alphabets):
    with pytest.raises(TrainError, match="no domain"):
        TextStream(alphabets, [("klingon", 3)])
    with pytest.raises(TrainError, match="order"):
        TextStream(alphabets, [("low", 3)], "backwards")
    with pytest.raises(TrainError, match="stagger"):
        TextStream(alphabets, [("low", 3)], stagger=5)
    with pytest.raises(TrainError, match="too short"):
        TextStream(alphabets, [("low", 3)], sequence_length=100_000)
