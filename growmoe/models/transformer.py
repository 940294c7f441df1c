"""A decoder-only transformer language model whose feed-forward halves are mixtures of experts.

Shape suffixes: B sequences, S tokens of each, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN
from growmoe.models.attention import Attention, Block, KVCache, rotary
from growmoe.models.feed_forward import (
    active_size,
    check_dropout,
    check_mixture,
    feed_forward,
    positive,
    seed_generator,
)
from growmoe.models.sampling import check_sampling, sample
from growmoe.routers import Router
from growmoe.routers.gate import Context
from growmoe.structure import Template


class TransformerLM(nn.Module):
    """A causal language model: pre-norm RMSNorm, rotary positions, no biases, SwiGLU experts.

    Add `growmoe.aux_loss(model)` to the loss, or pass ``moe={"balance_loss": 0}``. A mixture with a
    capacity may drop different tokens when they come one at a time, so that generation then
    differs from the whole forward.

    Args:
        vocab_size: V.
        d_model: D.
        num_layers: L, blocks of attention and feed-forward.
        num_heads: of attention; each is D / num_heads wide, which must be even.
        d_hidden: hidden width of an expert and of a plain block; 8/3 · D, rounded up to a multiple
            of 8, if left out, which has as many weights as an ungated block of 4 · D.
        num_experts: of each mixture; 0 makes a dense model.
        router: copied for each layer; `TopK(2)` if left out.
        expert: as for `MoE`; a SwiGLU `FFN` of `d_hidden` without biases if left out.
        shared: an expert that sees every token, as for `MoE`.
        moe_every: layers moe_every, 2 · moe_every, … (counted from 1) are mixtures, others plain.
        num_kv_heads: heads of keys and values; as many as `num_heads` if left out.
        dropout: of embeddings, attention weights and what blocks add, in training.
        rope_theta: base of the rotary positions.
        tie_embeddings: the output matrix is the embedding.
        causal_routing: refuse a router whose choice for a token depends on later ones.
        moe: further keywords of each `MoE`, such as ``{"balance_loss": 0.02, "warmup": 200}``.
        checkpoint_activations: compute blocks again in the backward instead of keeping what is
            inside them.
        seed: of all initial weights and of the layers' generators; torch's global generator is
            not drawn from. Without it, one number is.

    Raises:
        ValueError: an option out of range, or a router that sees the future.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        *,
        d_hidden: int | None = None,
        num_experts: int = 8,
        router: Router | None = None,
        expert: Template | Sequence[Template] | None = None,
        shared: Template | None = None,
        moe_every: int = 1,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        rope_theta: float = 10000.0,
        tie_embeddings: bool = True,
        causal_routing: bool = True,
        moe: Context | None = None,
        checkpoint_activations: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        d_hidden = -(-d_model // 3) * 8 if d_hidden is None else d_hidden
        positive(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
        positive(num_heads=num_heads, d_hidden=d_hidden, moe_every=moe_every)
        if num_kv_heads is not None:
            positive(num_kv_heads=num_kv_heads)
        check_mixture(num_experts, router, expert, shared, moe, moe_every, num_layers)
        check_dropout(dropout)
        if d_model % (2 * num_heads):
            raise ValueError(
                f"d_model={d_model} must be a multiple of 2 · num_heads={2 * num_heads}: rotary "
                "positions turn pairs"
            )
        if not rope_theta > 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta!r}")
        self.vocab_size, self.d_model, self.rope_theta = vocab_size, d_model, rope_theta
        self.checkpoint_activations = checkpoint_activations

        plain = FFN(d_hidden, "swiglu", bias=False)
        # 2L branches are added to the stream; see ScaledFFN
        scale = (2 * num_layers) ** -0.5
        with seeded(seed_generator(seed)):
            self.embedding = nn.Embedding(vocab_size, d_model)
            self.blocks = nn.ModuleList()
            for i in range(num_layers):
                mixed = num_experts > 0 and (i + 1) % moe_every == 0
                self.blocks.append(
                    Block(
                        Attention(d_model, num_heads, num_kv_heads, causal=True, dropout=dropout),
                        feed_forward(
                            d_model,
                            expert if mixed and expert is not None else plain,
                            num_experts if mixed else 0,
                            router,
                            shared=shared,
                            causal=causal_routing,
                            scale=scale,
                            options=moe,
                        ),
                        (nn.RMSNorm(d_model, eps=1e-5), nn.RMSNorm(d_model, eps=1e-5)),
                        dropout,
                        scale,
                    )
                )
            self.norm = nn.RMSNorm(d_model, eps=1e-5)
            self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
            # the default of 1 would give a tied output logits of deviation sqrt(D): a first loss
            # far above log(V). With 0.02 it is close to that.
            nn.init.normal_(self.embedding.weight, std=0.02)
            if self.head is not None:
                nn.init.normal_(self.head.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, token_BS: Tensor, cache: KVCache | None = None, *, context: Context | None = None
    ) -> Tensor:
        """Token ids, int [B, S], to logits of the next token, [B, S, V].

        Args:
            cache: holds the tokens before these, and is extended by these.
            context: for the routers, beside "token", the ids: a value for each token [B · S] or
                each sequence [B], or one for all.

        Raises:
            ValueError: ids of another shape or dtype, none, or (checked on a CPU, since an
                accelerator would have to wait) out of the vocabulary; a cache of another batch.
        """
        self._check(token_BS, cache)
        if context is not None and not isinstance(context, Mapping):
            raise ValueError(f"context must be a mapping such as {{'task': 0}}, got {context!r}")
        tokens, past = token_BS.shape[1], 0 if cache is None else cache.length
        mine = {"token": token_BS.reshape(-1), **(context or {})}
        positions_S = torch.arange(past, past + tokens, device=token_BS.device)
        rotation = rotary(positions_S, self._attention.d_head, self.rope_theta)
        x_BSD = self.dropout(self.embedding(token_BS))
        recompute = self.checkpoint_activations and cache is None and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            if recompute:
                x_BSD = checkpoint(block, x_BSD, mine, rotation, use_reentrant=False)
            else:
                x_BSD = block(x_BSD, mine, rotation, cache, i)
        x_BSD = self.norm(x_BSD)
        logits_BSV: Tensor = (
            F.linear(x_BSD, self.embedding.weight) if self.head is None else self.head(x_BSD)
        )
        if cache is not None:
            cache.commit(tokens)
        return logits_BSV

    @torch.no_grad()
    def generate(
        self,
        token_BS: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | Collection[int] | None = None,
    ) -> Tensor:
        """Continue prompts of one length, in eval mode: int [B, S] -> int64 [B, S + N].

        Args:
            max_new_tokens: the largest N.
            temperature, top_k, top_p, generator: see `growmoe.models.sampling.sample`;
                temperature 0 is greedy.
            stop: token ids that end a sequence. They are part of the output, and a sequence that
                has ended repeats its last token; once all have ended, no more are drawn.

        Raises:
            ValueError: an empty prompt, ids out of the vocabulary, or a setting out of range.
        """
        self._check(token_BS, None)
        self._check_range(token_BS)
        check_sampling(temperature, top_k, top_p)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
        stops = [stop] if isinstance(stop, int) else list(stop or ())
        if not all(isinstance(s, int) and 0 <= s < self.vocab_size for s in stops):
            raise ValueError(f"stop must be token ids in [0, {self.vocab_size}), got {stop!r}")
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            cache, out_BS = KVCache(), token_BS.long()
            stop_N = torch.tensor(stops, dtype=torch.int64, device=out_BS.device)
            ended_B = torch.zeros(len(out_BS), dtype=torch.bool, device=out_BS.device)
            for _ in range(max_new_tokens):
                logits_BV = self(out_BS[:, cache.length :], cache)[:, -1]
                next_B = sample(logits_BV, temperature, top_k, top_p, generator)
                next_B = torch.where(ended_B, out_BS[:, -1], next_B)
                out_BS = torch.cat([out_BS, next_B[:, None]], dim=1)
                if stops:
                    ended_B = torch.isin(next_B, stop_N)
                    if bool(ended_B.all()):
                        break
            return out_BS
        finally:
            for module, training in modes:
                module.training = training

    def num_params(self, active: bool = False) -> int:
        """How many parameters it holds; a tied embedding counts once.

        Args:
            active: only those that a token uses: of each mixture its mean expert, as often as
                `growmoe.models.feed_forward.active_experts` says (the router's `k`, or all), and
                the router entries of all.
        """
        if active:
            return round(active_size(self, lambda p: p.numel()))
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of a forward per token, in the mean, at 2 per multiply-add.

        Counted are matrix products: attention's projections, its scores and values over all of
        `sequence_length` (the causal half that kernels may skip included, as is the custom),
        active experts (see `num_params`), linear gates and the output. A backward takes twice as
        many. Expert bodies other than `FFN` count 2 for each weight in a matrix.
        """
        positive(sequence_length=sequence_length)

        def used(p: nn.Parameter) -> int:
            return 2 * p.numel() if id(p) in multiplied else 0

        multiplied = {id(p) for p in self.parameters() if p.dim() >= 2} - {
            id(self.embedding.weight)
        }
        for block in self.blocks:
            experts: Any = getattr(block.feed_forward, "experts", {})
            for e in experts.values():  # a key is a row of the gate's matrix
                multiplied |= {id(p) for p in e.entries.parameters()}
        output = 2 * self.d_model * self.vocab_size if self.head is None else 0
        scores = 4 * sequence_length * self.d_model * len(self.blocks)
        return active_size(self, used) + output + scores

    @property
    def _attention(self) -> Attention:
        return self.blocks[0].attention  # type: ignore[return-value, union-attr]

    def _check(self, token_BS: Tensor, cache: KVCache | None) -> None:
        if not isinstance(token_BS, Tensor) or token_BS.dim() != 2 or not token_BS.numel():
            shape = tuple(token_BS.shape) if isinstance(token_BS, Tensor) else repr(token_BS)
            raise ValueError(f"token_BS must be token ids [B, S], at least one, got {shape}")
        if token_BS.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token_BS must be int64 or int32, got {token_BS.dtype}")
        if token_BS.device.type == "cpu":
            self._check_range(token_BS)
        if cache is not None and cache.length:
            mine = self._attention
            cache.check(len(token_BS), len(self.blocks), mine.num_kv_heads, mine.d_head)

    def _check_range(self, token_BS: Tensor) -> None:
        low, high = int(token_BS.min()), int(token_BS.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token_BS holds ids from {low} to {high}, vocab_size={self.vocab_size} takes "
                f"0 to {self.vocab_size - 1}"
            )
