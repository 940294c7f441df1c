"""MLP takes vectors of any leading shape and computes what its parts say."""

from __future__ import annotations

import pytest
import torch

from growmoe import FFN, ExpertChoice, TopK, moe_layers
from growmoe.models import MLP
from growmoe.routers import Hash


def model_of(**options: object) -> MLP:
    return MLP(6, 8, 3, **{"num_experts": 4, "seed": 0, **options})


@torch.no_grad()
def test_it_is_stem_residual_blocks_and_head() -> None:
    model = model_of(num_layers=3, moe_every=2).double().eval()
    assert list(moe_layers(model)) == ["blocks.1.feed_forward"]
    x = torch.randn(5, 6).double()
    h = model.stem(x)
    for block in model.blocks:
        h = h + block.feed_forward(block.norm(h))
    torch.testing.assert_close(model(x), model.head(model.norm(h)))


@torch.no_grad()
def test_any_leading_shape_is_a_batch() -> None:
    model = model_of().eval()
    x = torch.randn(2, 4, 6)
    assert model(x).shape == (2, 4, 3)
    torch.testing.assert_close(model(x)[1, 2], model(x[1, 2]))
    assert model(x[:0]).shape == (0, 4, 3)


@torch.no_grad()
def test_images_are_flattened_if_asked() -> None:
    flat, plain = model_of(flatten=True).eval(), model_of().eval()
    x = torch.randn(5, 1, 2, 3)
    torch.testing.assert_close(flat(x), plain(x.flatten(1)))
    torch.testing.assert_close(flat(x.flatten(1)), plain(x.flatten(1)))


@torch.no_grad()
def test_the_context_reaches_every_router() -> None:
    model = model_of(router=Hash(2, by="task")).eval()
    x = torch.randn(1, 6).expand(3, 6)
    y = model(x, {"task": torch.tensor([0, 1, 0])})
    torch.testing.assert_close(y[0], y[2])
    assert not torch.allclose(y[0], y[1])
    with pytest.raises(ValueError, match="task"):
        model(x)


def test_dropout_is_of_training_alone() -> None:
    model, x = model_of(dropout=0.5), torch.randn(5, 6)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_without_experts_it_is_dense() -> None:
    model = model_of(num_experts=0)
    assert not moe_layers(model)
    assert all(type(block.feed_forward) is FFN for block in model.blocks)
    assert model_of(router=ExpertChoice())(torch.randn(5, 6)).shape == (5, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"d_hidden": -1}, "d_hidden"),
        ({"dropout": -0.1}, "dropout"),
        ({"moe_every": 3}, "leaves no mixture"),
        ({"router": TopK(5)}, "at least 5"),
        ({"num_experts": 0, "shared": FFN(4)}, "shared would have no effect"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(**options)


@pytest.mark.parametrize(
    ("flatten", "x", "says"),
    [
        (False, torch.randn(5, 7), r"takes \[..., 6\]$"),
        (False, torch.randn(5, 2, 3), "flatten=True"),
        (False, torch.tensor(1.0), "takes"),
        (True, torch.randn(5, 2, 2), "d_in=6 numbers"),
        (True, torch.randn(6), "d_in=6 numbers"),
        (False, torch.zeros(5, 6, dtype=torch.int64), "int64"),
        (False, torch.full((5, 6), torch.nan), "NaN"),
    ],
)
def test_bad_inputs_are_refused(flatten: bool, x: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(flatten=flatten)(x)
