"""ConvNet ends in mixtures of experts that see every position."""

from __future__ import annotations

import pytest
import torch

from growmoe import ExpertChoice, moe_layers
from growmoe.models import ConvNet
from growmoe.routers import Hash


def model_of(**options: object) -> ConvNet:
    return ConvNet(2, 5, **{"widths": (8, 12), "num_experts": 4, "seed": 0, **options})


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1), (12, 3)])
def test_images_of_any_size_become_logits(size: tuple[int, int]) -> None:
    y = model_of(num_layers=2)(torch.randn(3, 2, *size))
    assert y.shape == (3, 5)
    y.sum().backward()


def test_each_position_of_the_last_stage_is_a_token() -> None:
    model = model_of(widths=(4, 8, 12))
    seen = []
    layer = moe_layers(model)["blocks.0.feed_forward"]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(torch.randn(3, 2, 16, 8))
    assert seen == [(3, 4 * 2, 12)]  # halved twice


@torch.no_grad()
def test_what_an_image_gives_does_not_depend_on_its_batch() -> None:
    model = model_of()
    model.train()
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_context_of_one_value_per_image_is_of_its_positions() -> None:
    model = model_of(router=Hash(2, by="task")).eval()
    x = torch.randn(1, 2, 4, 4).expand(3, 2, 4, 4)
    y = model(x, {"task": torch.tensor([0, 1, 0])})
    torch.testing.assert_close(y[0], y[2])
    assert not torch.allclose(y[0], y[1])


def test_without_experts_it_is_dense_and_any_router_will_do() -> None:
    assert not moe_layers(model_of(num_experts=0))
    assert model_of(router=ExpertChoice())(torch.randn(3, 2, 4, 4)).shape == (3, 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"widths": ()}, "widths must be"),
        ({"widths": (8, 0)}, r"widths\[1\]"),
        ({"widths": 8}, "widths must be"),
        ({"num_layers": 0}, "num_layers"),
        ({"dropout": 2}, "dropout"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of(**options)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.randn(3, 1, 4, 4), r"\[B, 2, any, any\]"),
        (torch.randn(2, 4, 4), "images have shape"),
        (torch.zeros(3, 2, 4, 4, dtype=torch.uint8), "uint8"),
    ],
)
def test_bad_images_are_refused(x: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of()(x)
