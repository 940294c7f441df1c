"""ViT sees patches where they are, with any router."""

from __future__ import annotations

import pytest
import torch

from growmoe import ExpertChoice, moe_layers
from growmoe.models import ViT
from growmoe.models.vit import sincos_positions
from growmoe.routers import Hash, Sinkhorn


def model_of(**options: object) -> ViT:
    size = {"in_channels": 2, "d_model": 16, "num_layers": 4, "num_heads": 2, "num_experts": 4}
    return ViT((4, 6), 2, 5, **{**size, "seed": 0, **options})


@pytest.mark.parametrize("router", [None, ExpertChoice(), Sinkhorn(1)])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_images_become_logits_with_any_router(router, positions: str) -> None:
    model = model_of(router=router, positions=positions)
    y = model(torch.randn(3, 2, 4, 6))
    assert y.shape == (3, 5)
    y.sum().backward()
    assert model.patches.weight.grad.abs().sum() > 0


def test_every_nth_block_is_a_mixture() -> None:
    assert list(moe_layers(model_of())) == ["blocks.1.feed_forward", "blocks.3.feed_forward"]
    assert len(moe_layers(model_of(moe_every=1))) == 4
    assert not moe_layers(model_of(num_experts=0))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_without_positions_the_order_of_patches_does_not_matter(positions: str) -> None:
    model = model_of(positions=positions).eval()
    x = torch.randn(3, 2, 4, 6)
    moved = x.roll(2, dims=3)  # by one patch
    assert not torch.allclose(model(x), model(moved), atol=1e-4)
    model.positions_ND.zero_()
    torch.testing.assert_close(model(x), model(moved), atol=1e-5, rtol=1e-4)


def test_fixed_positions_tell_every_row_and_column() -> None:
    p = sincos_positions(3, 5, 16).view(3, 5, 16)
    assert torch.equal(p[1, :, :8], p[1, :1, :8].expand(5, 8))  # half tells the row alone
    assert torch.equal(p[:, 2, 8:], p[:1, 2, 8:].expand(3, 8))
    distance = torch.cdist(p.view(15, 16), p.view(15, 16)) + 9 * torch.eye(15)
    assert distance.min() > 0.1
    assert "positions_ND" not in model_of(positions="sincos").state_dict()
    assert "positions_ND" in model_of().state_dict()


@torch.no_grad()
def test_a_context_of_one_value_per_image_is_of_its_patches() -> None:
    model = model_of(router=Hash(2, by="task")).eval()
    x = torch.randn(1, 2, 4, 6).expand(3, 2, 4, 6)
    y = model(x, {"task": torch.tensor([0, 1, 0])})
    torch.testing.assert_close(y[0], y[2])
    assert not torch.allclose(y[0], y[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": 5}, "patch_size=2 does not divide"),
        ({"image_size": (4, 4, 4)}, "one or two"),
        ({"d_model": 15}, "num_heads=2"),
        ({"positions": "none"}, "positions"),
        ({"positions": "sincos", "d_model": 18}, "multiple of 4"),
        ({"moe_every": 5}, "leaves no mixture"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_bad_options_are_refused(options: dict, says: str) -> None:
    size = {"image_size": 4, "patch_size": 2, "num_classes": 5, "num_heads": 2, "seed": 0}
    with pytest.raises(ValueError, match=says):
        ViT(**{**size, **options})


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.randn(3, 2, 6, 4), r"\[B, 2, 4, 6\]"),
        (torch.randn(2, 4, 6), "images have shape"),
        (torch.zeros(3, 2, 4, 6, dtype=torch.uint8), "uint8"),
    ],
)
def test_bad_images_are_refused(x: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of()(x)
