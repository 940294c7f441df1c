"""A small residual convolutional network that ends in mixtures of experts over positions.

Shape suffixes: B images, C channels, H height, W width, N positions, D the last width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN
from growmoe.models.feed_forward import (
    check_dropout,
    check_mixture,
    feed_forward,
    positive,
    seed_generator,
)
from growmoe.models.mlp import ResidualBlock
from growmoe.models.vit import check_images
from growmoe.routers import Router
from growmoe.routers.gate import Context
from growmoe.structure import Template


class ConvStage(nn.Module):
    """A strided convolution, then a residual pair of convolutions: [B, C, H, W] -> [B, C', …].

    Group norm, not batch norm: its statistics are of one image, so that a stream whose domain
    changes does not shift what an image gives.

    Args:
        channels: C.
        width: C'.
        stride: of the first convolution.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.GroupNorm(math.gcd(8, width), width)

        def convolution(channels: int, stride: int = 1) -> nn.Module:
            return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)

        self.enter = nn.Sequential(convolution(channels, stride), norm(), nn.GELU())
        self.residual = nn.Sequential(
            convolution(width), norm(), nn.GELU(), convolution(width), norm()
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.enter(x_BCHW)
        return F.gelu(x_BCHW + self.residual(x_BCHW))


class ConvNet(nn.Module):
    """Convolutional stages, mixtures of experts over what they give at each position, head.

    Add `growmoe.aux_loss(model)` to the loss, or pass ``moe={"balance_loss": 0}``.

    Args:
        in_channels: C.
        num_classes: O, the width of the output.
        widths: channels of each stage; each but the first halves height and width. The last is D.
        num_layers: blocks after the stages.
        d_hidden: hidden width of an expert; 4 · D if left out.
        num_experts: of each mixture; 0 makes plain blocks.
        router: copied for each block; `TopK(2)` if left out.
        expert: as for `MoE`; a GELU `FFN` of `d_hidden` with biases if left out.
        shared: an expert that sees every position, as for `MoE`.
        dropout: of what blocks add, in training.
        moe: further keywords of each `MoE`.
        seed: of all initial weights and of the layers' generators; torch's global generator is
            not drawn from. Without it, one number is.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int] = (32, 64),
        *,
        num_layers: int = 1,
        d_hidden: int | None = None,
        num_experts: int = 8,
        router: Router | None = None,
        expert: Template | Sequence[Template] | None = None,
        shared: Template | None = None,
        dropout: float = 0.0,
        moe: Context | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, num_classes=num_classes, num_layers=num_layers)
        if not isinstance(widths, Sequence) or not widths:
            raise ValueError(f"widths must be a sequence of one or more integers, got {widths!r}")
        positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        d_model = widths[-1]
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        positive(d_hidden=d_hidden)
        check_mixture(num_experts, router, expert, shared, moe)
        check_dropout(dropout)
        self.in_channels = in_channels
        template = FFN(d_hidden, "gelu", bias=True) if expert is None else expert
        with seeded(seed_generator(seed)):
            before = (in_channels, *widths[:-1])
            self.stages = nn.Sequential(
                *(
                    ConvStage(channels, width, stride=1 if i == 0 else 2)
                    for i, (channels, width) in enumerate(zip(before, widths, strict=True))
                )
            )
            self.blocks = nn.ModuleList(
                ResidualBlock(
                    d_model,
                    feed_forward(
                        d_model,
                        template,
                        num_experts,
                        router,
                        shared=shared,
                        scale=num_layers**-0.5,
                        options=moe,
                    ),
                    dropout,
                )
                for _ in range(num_layers)
            )
            self.norm = nn.LayerNorm(d_model)
            self.head = nn.Linear(d_model, num_classes)

    def forward(self, image_BCHW: Tensor, context: Context | None = None) -> Tensor:
        """Float [B, C, H, W] of any height and width -> [B, O].

        Args:
            context: for the routers: a value for each image, or one for all, by name.

        Raises:
            ValueError: images of another number of channels or not floating point.
        """
        check_images(image_BCHW, (self.in_channels, None, None), "ConvNet")
        x_BND = self.stages(image_BCHW).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x_BND = block(x_BND, context)
        y_BO: Tensor = self.head(self.norm(x_BND).mean(1))
        return y_BO
