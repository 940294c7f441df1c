"""A small vision transformer, some of whose feed-forward halves are mixtures of experts.

Shape suffixes: B images, C channels, N patches of each, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN
from growmoe.models.attention import Attention, Block
from growmoe.models.feed_forward import (
    check_dropout,
    check_mixture,
    feed_forward,
    positive,
    seed_generator,
)
from growmoe.routers import Router
from growmoe.routers.gate import Context
from growmoe.structure import Template


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) with mean pooling.

    Sparse blocks alternate with plain ones, as in V-MoE (Riquelme et al. 2021, arXiv 2106.05974).
    Nothing is causal here, so any router will do. Add `growmoe.aux_loss(model)` to the loss, or
    pass ``moe={"balance_loss": 0}``.

    Args:
        image_size: height and width, or one number for both.
        patch_size: side of a patch, which divides both.
        num_classes: O, the width of the output.
        in_channels: C.
        d_model: D.
        num_layers: L, blocks of attention and feed-forward.
        num_heads: of attention, which divide D.
        d_hidden: hidden width of an expert and of a plain block; 4 · D if left out.
        num_experts: of each mixture; 0 makes a dense model.
        router: copied for each layer; `TopK(2)` if left out.
        expert: as for `MoE`; a GELU `FFN` of `d_hidden` with biases if left out.
        shared: an expert that sees every patch, as for `MoE`.
        moe_every: layers moe_every, 2 · moe_every, … (counted from 1) are mixtures, others plain.
        positions: "learned", or "sincos": fixed sines and cosines of row and column, for which D
            must be a multiple of 4.
        dropout: of attention weights and what blocks add, in training.
        moe: further keywords of each `MoE`.
        seed: of all initial weights and of the layers' generators; torch's global generator is
            not drawn from. Without it, one number is.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int,
        num_classes: int,
        *,
        in_channels: int = 3,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        d_hidden: int | None = None,
        num_experts: int = 8,
        router: Router | None = None,
        expert: Template | Sequence[Template] | None = None,
        shared: Template | None = None,
        moe_every: int = 2,
        positions: Literal["learned", "sincos"] = "learned",
        dropout: float = 0.0,
        moe: Context | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2:
            raise ValueError(f"image_size must be one or two integers, got {image_size!r}")
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        positive(height=size[0], width=size[1], patch_size=patch_size, num_classes=num_classes)
        positive(in_channels=in_channels, d_model=d_model, num_layers=num_layers)
        positive(num_heads=num_heads, d_hidden=d_hidden, moe_every=moe_every)
        check_mixture(num_experts, router, expert, shared, moe, moe_every, num_layers)
        check_dropout(dropout)
        if size[0] % patch_size or size[1] % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}")
        if positions not in ("learned", "sincos"):
            raise ValueError(f"positions must be 'learned' or 'sincos', got {positions!r}")
        if positions == "sincos" and d_model % 4:
            raise ValueError(f"positions='sincos' needs d_model a multiple of 4, got {d_model}")
        self.shape = (in_channels, *size)
        plain = FFN(d_hidden, "gelu", bias=True)
        scale = (2 * num_layers) ** -0.5  # see ScaledFFN
        rows, columns = size[0] // patch_size, size[1] // patch_size
        with seeded(seed_generator(seed)):
            self.patches = nn.Conv2d(in_channels, d_model, patch_size, stride=patch_size)
            self.positions_ND: Tensor
            if positions == "learned":
                self.positions_ND = nn.Parameter(0.02 * torch.randn(rows * columns, d_model))
            else:
                # not saved: it follows from the sizes
                fixed_ND = sincos_positions(rows, columns, d_model)
                self.register_buffer("positions_ND", fixed_ND, persistent=False)
            self.blocks = nn.ModuleList()
            for i in range(num_layers):
                mixed = num_experts > 0 and (i + 1) % moe_every == 0
                half = feed_forward(
                    d_model,
                    expert if mixed and expert is not None else plain,
                    num_experts if mixed else 0,
                    router,
                    shared=shared,
                    scale=scale,
                    options=moe,
                )
                attention = Attention(d_model, num_heads, causal=False, dropout=dropout)
                norms = (nn.LayerNorm(d_model), nn.LayerNorm(d_model))
                self.blocks.append(Block(attention, half, norms, dropout, scale))
            self.norm = nn.LayerNorm(d_model)
            self.head = nn.Linear(d_model, num_classes)

    def forward(self, image_BCHW: Tensor, context: Context | None = None) -> Tensor:
        """Float [B, C, height, width] -> [B, O].

        Args:
            context: for the routers: a value for each image, or one for all, by name.

        Raises:
            ValueError: images of another shape or not floating point.
        """
        check_images(image_BCHW, self.shape, "ViT")
        x_BND = self.patches(image_BCHW).flatten(2).transpose(1, 2) + self.positions_ND
        for block in self.blocks:
            x_BND = block(x_BND, context)
        y_BO: Tensor = self.head(self.norm(x_BND).mean(1))
        return y_BO


def check_images(image_BCHW: Tensor, shape: tuple[int | None, ...], name: str) -> None:
    """Raise ValueError unless these are float images of this (C, H, W), None being any size."""
    got = tuple(image_BCHW.shape)
    fits = len(got) == 4 and all(a is None or a == b for a, b in zip(shape, got[1:], strict=True))
    if not fits:
        takes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"images have shape {got}, {name} takes [B, {takes}]")
    if not image_BCHW.is_floating_point():
        raise ValueError(f"images are {image_BCHW.dtype}, they must be floating point")


def sincos_positions(rows: int, columns: int, d_model: int) -> Tensor:
    """Sines and cosines of row and column, a quarter of the width for each: [rows · columns, D].

    Beyer et al. 2022, arXiv 2205.01580, after Vaswani et al. 2017, arXiv 1706.03762.
    """
    quarter = d_model // 4
    rate_Q = 10000.0 ** -(torch.arange(quarter) / max(quarter - 1, 1))
    row_N = torch.arange(rows).repeat_interleave(columns)
    column_N = torch.arange(columns).repeat(rows)
    row_NQ, column_NQ = row_N[:, None] * rate_Q, column_N[:, None] * rate_Q
    return torch.cat([row_NQ.sin(), row_NQ.cos(), column_NQ.sin(), column_NQ.cos()], dim=1)
