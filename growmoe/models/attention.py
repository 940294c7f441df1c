"""A pre-norm block: attention, then a feed-forward half that may be a mixture of experts.

Shape suffixes: B inputs, S tokens of each, P tokens seen before, D model width, H heads,
G heads of keys and values, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growmoe.models.feed_forward import run
from growmoe.routers.gate import Context

Rotation = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of the tokens a model has seen, so that each is computed once.

    Pass a new one with a prompt and then with the tokens that follow; one cache is for one batch
    of one model. A forward that fails leaves it as it was.

    Attributes:
        length: P, how many tokens it holds.
    """

    def __init__(self) -> None:
        self.length = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._extended: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BGSK: Tensor, v_BGSK: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, these new ones last: two [B, G, P + S, K]."""
        if layer in self._held:
            k_BGPK, v_BGPK = self._held[layer]
            k_BGSK = torch.cat([k_BGPK, k_BGSK], dim=2)
            v_BGSK = torch.cat([v_BGPK, v_BGSK], dim=2)
        self._extended[layer] = (k_BGSK, v_BGSK)
        return k_BGSK, v_BGSK

    def commit(self, tokens: int) -> None:
        """Keep what a whole forward of so many tokens has added."""
        self._held, self._extended = self._extended, {}
        self.length += tokens

    def check(self, batch: int, layers: int, heads: int, width: int) -> None:
        """Raise ValueError if what is held is of another batch size or another model."""
        held = (len(self._held), *self._held[0][0].shape[:2], self._held[0][0].shape[3])
        if held != (layers, batch, heads, width):
            raise ValueError(
                "cache: it holds (layers, batch, key heads, head width) = "
                f"{held}, this forward is of {(layers, batch, heads, width)}"
            )


class Attention(nn.Module):
    """Multi-head attention without biases, grouped-query where there are fewer key heads.

    Grouped queries: Ainslie et al. 2023, arXiv 2305.13245.

    Args:
        d_model: D.
        num_heads: H; K = D / H.
        num_kv_heads: G, which divides H; H if left out.
        causal: whether a token sees only those up to itself.
        dropout: of the attention weights, in training.

    Raises:
        ValueError: heads that do not divide D, or key heads that do not divide the heads.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        causal: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_model % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide d_model={d_model}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.d_head = d_model // num_heads
        self.causal, self.dropout = causal, dropout
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, num_kv_heads * self.d_head, bias=False)
        self.value = nn.Linear(d_model, num_kv_heads * self.d_head, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D].

        Args:
            rotation: of queries and keys, from `rotary`.
            cache: holds the tokens before these.
            layer: whose keys in the cache are this attention's.
        """
        tokens = x_BSD.shape[1]
        q_BHSK = self.query(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_BGSK = self.key(x_BSD).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        v_BGSK = self.value(x_BSD).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        if rotation is not None:
            q_BHSK, k_BGSK = _rotate(q_BHSK, rotation), _rotate(k_BGSK, rotation)
        if cache is not None:
            k_BGSK, v_BGSK = cache.extend(layer, k_BGSK, v_BGSK)
        past = k_BGSK.shape[2] - tokens
        mask_SP = None
        if self.causal and past and tokens > 1:  # is_causal would align the mask to the first key
            mask_SP = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x_BSD.device)
            mask_SP = mask_SP.tril(past)
        y_BHSK = F.scaled_dot_product_attention(
            q_BHSK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask_SP,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and not past,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        y_BSD: Tensor = self.out(y_BHSK.transpose(1, 2).flatten(2))
        return y_BSD


class Block(nn.Module):
    """Attention and a feed-forward half, each on the normalised stream and added to it.

    Args:
        attention: over the tokens of an input.
        feed_forward: a `MoE`, or any module [..., D] -> [..., D].
        norms: RMSNorm or LayerNorm of the two inputs.
        dropout: of what is added to the stream, in training.
        scale: of the attention's output weights at birth.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: nn.Module,
        norms: tuple[nn.Module, nn.Module],
        dropout: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed_forward = norms
        self.attention, self.feed_forward = attention, feed_forward
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            attention.out.weight.mul_(scale)

    def forward(
        self,
        x_BSD: Tensor,
        context: Context | None = None,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]; the context is for the mixture's router."""
        y_BSD = self.attention(self.norm_attention(x_BSD), rotation, cache, layer)
        x_BSD = x_BSD + self.dropout(y_BSD)
        y_BSD = run(self.feed_forward, self.norm_feed_forward(x_BSD), context)
        return x_BSD + self.dropout(y_BSD)


def rotary(positions_S: Tensor, d_head: int, theta: float) -> Rotation:
    """Cosines and sines of rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 15).

    Args:
        positions_S: [S], from 0.
        d_head: K, even; the first half of a head is paired with its second half.
        theta: pair i turns by position · theta^(-2i/K).

    Returns:
        Two float32 [S, K/2].
    """
    pair = torch.arange(0, d_head, 2, device=positions_S.device, dtype=torch.float32)
    angle_SK = positions_S.float()[:, None] * theta ** (-pair / d_head)
    return angle_SK.cos(), angle_SK.sin()


def _rotate(x_BHSK: Tensor, rotation: Rotation) -> Tensor:
    cos_SK, sin_SK = rotation
    a, b = x_BHSK.chunk(2, dim=-1)  # bfloat16 times float32 is float32: positions stay exact
    return torch.cat([a * cos_SK - b * sin_SK, a * sin_SK + b * cos_SK], dim=-1).to(x_BHSK.dtype)
