"""A residual network for vectors, such as rows of a table, whose blocks are mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN
from growmoe.models.feed_forward import (
    check_dropout,
    check_mixture,
    feed_forward,
    positive,
    run,
    seed_generator,
)
from growmoe.routers import Router
from growmoe.routers.gate import Context
from growmoe.structure import Template


class ResidualBlock(nn.Module):
    """A feed-forward half by itself: what it makes of the normalised stream is added to it.

    Args:
        d_model: D, the width of the stream.
        feed_forward: a `MoE`, or any module [..., D] -> [..., D].
        dropout: of what is added, in training.
    """

    def __init__(self, d_model: int, feed_forward: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """[..., D] -> [..., D]; the context is for the mixture's router."""
        y: Tensor = self.dropout(run(self.feed_forward, self.norm(x), context))
        return x + y


class MLP(nn.Module):
    """Stem, residual mixtures of experts, head; pre-norm.

    Add `growmoe.aux_loss(model)` to the loss, or pass ``moe={"balance_loss": 0}``.

    Args:
        d_in: I, the width of an input.
        d_model: D, the width between the blocks.
        d_out: O, the width of the output.
        num_layers: blocks.
        d_hidden: hidden width of an expert and of a plain block; 4 · D if left out.
        num_experts: of each mixture; 0 makes plain blocks.
        router: copied for each block; `TopK(2)` if left out.
        expert: as for `MoE`; a GELU `FFN` of `d_hidden` with biases if left out.
        shared: an expert that sees every input, as for `MoE`.
        moe_every: blocks moe_every, 2 · moe_every, … (counted from 1) are mixtures, others plain.
        dropout: of what blocks add, in training.
        flatten: take [B, ...] of I numbers each, such as images, instead of [..., I].
        moe: further keywords of each `MoE`.
        seed: of all initial weights and of the layers' generators; torch's global generator is
            not drawn from. Without it, one number is.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        d_out: int,
        num_layers: int = 2,
        *,
        d_hidden: int | None = None,
        num_experts: int = 8,
        router: Router | None = None,
        expert: Template | Sequence[Template] | None = None,
        shared: Template | None = None,
        moe_every: int = 1,
        dropout: float = 0.0,
        flatten: bool = False,
        moe: Context | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        positive(d_in=d_in, d_model=d_model, d_out=d_out, num_layers=num_layers)
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        positive(d_hidden=d_hidden, moe_every=moe_every)
        check_mixture(num_experts, router, expert, shared, moe, moe_every, num_layers)
        check_dropout(dropout)
        self.d_in, self.flatten = d_in, flatten
        plain = FFN(d_hidden, "gelu", bias=True)
        with seeded(seed_generator(seed)):
            self.stem = nn.Linear(d_in, d_model)
            self.blocks = nn.ModuleList()
            for i in range(num_layers):
                mixed = num_experts > 0 and (i + 1) % moe_every == 0
                half = feed_forward(
                    d_model,
                    expert if mixed and expert is not None else plain,
                    num_experts if mixed else 0,
                    router,
                    shared=shared,
                    scale=num_layers**-0.5,
                    options=moe,
                )
                self.blocks.append(ResidualBlock(d_model, half, dropout))
            self.norm = nn.LayerNorm(d_model)
            self.head = nn.Linear(d_model, d_out)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """[..., I] -> [..., O], or with `flatten` [B, ...] -> [B, O].

        Args:
            context: for the routers: a value for each input, or one for all, by name.

        Raises:
            ValueError: an input of another width, not floating point, or (on a CPU) not finite.
        """
        inner = x.shape[1:].numel() if self.flatten and x.dim() > 1 else x.shape[-1:].numel()
        if x.dim() < 1 + self.flatten or inner != self.d_in:
            takes = (
                f"[B, ...] of d_in={self.d_in} numbers" if self.flatten else f"[..., {self.d_in}]"
            )
            hint = "; flatten=True takes [B, ...]" if x.shape[1:].numel() == self.d_in else ""
            raise ValueError(f"x has shape {tuple(x.shape)}, MLP takes {takes}{hint}")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}, it must be floating point")
        x = self.stem(x.flatten(1) if self.flatten else x)
        for block in self.blocks:
            x = block(x, context)
        y: Tensor = self.head(self.norm(x))
        return y
