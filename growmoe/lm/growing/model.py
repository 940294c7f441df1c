"""A language model that holds a path for each kind of text, and knows by itself which to use.

B sequences    S tokens of each    P tokens before them    K paths    V vocabulary
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from growmoe.experts.expert import Expert
from growmoe.lm.growing.path import LowRankPath, Path
from growmoe.lm.growing.router import ALL, PathRouter
from growmoe.models import TransformerLM
from growmoe.models.feed_forward import seed_generator
from growmoe.moe import MoE

Gate = Literal["likelihood", "trigrams"]
SWITCH = 1 / 128  # prior probability that the text changes to another path at a token
_ENOUGH = 16  # tokens before a sequence from which trigrams can tell


class GrowingLM(nn.Module):
    """A causal language model whose experts are paths, each a whole `TransformerLM` or a change.

    It begins as one path and grows by `StreamLearner`, or by `growmoe.surgery` on `layer`. At test
    time it is told no domain. A *gate* decides for each sequence, never by later tokens:

    - "likelihood": p(x_t | x_<t) = Σ_k w_k(t) p_k(x_t | x_<t), where w are the posterior
      probabilities of the paths given x_<t, with a small chance of a change at each token (fixed
      share, Herbster and Warmuth 1998). It runs all K paths.
    - "trigrams": the one path that has learned most of the trigrams in `before`, the tokens before
      the sequence. It runs one path. A sequence with fewer than 16 tokens before it is gated by
      likelihood.

    Args:
        vocab_size, d_model, num_layers, num_heads, d_hidden: of each path, as for `TransformerLM`.
        rank: None makes a new path a copy of all of its parent; else it shares the first path's
            matrices, which then stand still, and has a change of this rank of each.
        gate: how paths are chosen.
        buckets: of the trigram counts, for each path.
        seed: of the weights.

    Attributes:
        layer: the `MoE` of paths; its lineage tells when and why each was born.
        share_K: [K], the mean weight that the gate gave each path in the last forward, or None
            where it did not mix.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        *,
        d_hidden: int | None = None,
        rank: int | None = None,
        gate: Gate = "likelihood",
        buckets: int = 1 << 14,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {', '.join(get_args(Gate))}, got {gate!r}")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank must be a positive integer or None, got {rank!r}")
        self.vocab_size, self.rank, self.gate = vocab_size, rank, gate
        self._sizes = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "d_hidden": d_hidden,
        }
        self.share_K: Tensor | None = None
        self.layer = MoE(
            1,  # an input is a token id
            self._whole,
            num_experts=1,
            router=PathRouter(buckets),
            d_out=vocab_size,
            causal=True,
            warmup=1,
            evidence="moments",
            seed=int(torch.randint(2**62, (), generator=seed_generator(seed))),
        )

    def _whole(self) -> Path:
        sizes = cast(dict[str, Any], self._sizes)
        return Path(TransformerLM(**sizes, num_experts=0), self.rank)

    def options(self) -> dict[str, Any]:
        """With which another of the same architecture is built, but for the seed."""
        router = cast(PathRouter, self.layer.router)
        return {**self._sizes, "rank": self.rank, "gate": self.gate, "buckets": router.buckets}

    def kinds(self) -> dict[str, Any]:
        """What `growmoe.load` needs as `experts` to build the paths of a checkpoint."""

        def low_rank(rank: int) -> LowRankPath:
            return LowRankPath(cast(Path, self.layer.experts[0].body), rank)

        name = "growmoe.lm.growing.path"
        return {
            f"{name}.Path": lambda rank: self._whole(),
            f"{name}.LowRankPath": low_rank,
        }

    @property
    def paths(self) -> list[Expert]:
        """The experts, in ascending order of id."""
        return list(self.layer.experts.values())

    # What happens to tokens.

    def forward(self, token_BS: Tensor, before_BP: Tensor | None = None) -> Tensor:
        """Token ids, int [B, S], to log-probabilities of the next token, [B, S, V].

        Args:
            before_BP: int [B, P], the tokens before these, by which a path may be chosen; they are
                not attended to.

        Raises:
            ValueError: ids of another shape or dtype, or out of the vocabulary.
        """
        self._check(token_BS)
        self.share_K = None
        if len(self.layer.experts) == 1:
            return self.path_logits(token_BS, self.paths[0].id).log_softmax(-1)
        if self._one_path_will_do(before_BP):
            return self.path_logits(token_BS, self.choose(cast(Tensor, before_BP))).log_softmax(-1)
        logp_KBSV = self.all_log_probs(token_BS)
        weight_KBS = self._weights(logp_KBSV, token_BS, before_BP)
        self.share_K = weight_KBS.detach().mean((1, 2))
        return (logp_KBSV + weight_KBS.log()[..., None]).logsumexp(0)

    def path_logits(self, token_BS: Tensor, path: int | Tensor) -> Tensor:
        """Logits of the path with an id, or of one for each sequence: [B, S] -> [B, S, V]."""
        self._check(token_BS)
        self._measure(token_BS.shape[1])
        x_BS1 = token_BS[..., None].float()
        logits_BSV: Tensor = self.layer(x_BS1, {"path": path})
        return logits_BSV

    def all_log_probs(self, token_BS: Tensor) -> Tensor:
        """Log-probabilities of the next token by each path: [B, S] -> [K, B, S, V]."""
        self._check(token_BS)
        self._measure(token_BS.shape[1])
        _, out_RV = self.layer.rows(token_BS[..., None].float(), {"path": ALL})
        return out_RV.view(len(self.layer.experts), *token_BS.shape, -1).log_softmax(-1)

    def choose(self, before_BP: Tensor) -> Tensor:
        """The id of the path that has learned most of these tokens' trigrams: int64 [B]."""
        self._check(before_BP)
        experts = self.paths
        best_B = cast(PathRouter, self.layer.router).scores(before_BP, experts).argmax(1)
        return torch.tensor([e.id for e in experts], device=before_BP.device)[best_B]

    def path_weights(self, token_BS: Tensor, before_BP: Tensor | None = None) -> Tensor:
        """How much each path weighs in a prediction of `forward`: [K, B, S], summing to 1 over K.

        Args: as for `forward`.
        """
        self._check(token_BS)
        if self._one_path_will_do(before_BP):
            chosen_B = self.choose(cast(Tensor, before_BP))
            id_K = torch.tensor([e.id for e in self.paths], device=token_BS.device)
            weight_KB = (id_K[:, None] == chosen_B).to(next(self.parameters()).dtype)
            return weight_KB[..., None].expand(-1, -1, token_BS.shape[1])
        return self._weights(self.all_log_probs(token_BS), token_BS, before_BP)

    def _one_path_will_do(self, before_BP: Tensor | None) -> bool:
        told = before_BP is not None and before_BP.shape[1] >= _ENOUGH
        return self.gate == "trigrams" and told

    def _weights(self, logp_KBSV: Tensor, token_BS: Tensor, before_BP: Tensor | None) -> Tensor:
        weight_KB = logp_KBSV.new_full(logp_KBSV.shape[:2], 1 / len(logp_KBSV))
        if before_BP is not None and before_BP.shape[1] > 1:
            past_KBSV = self.all_log_probs(before_BP[:, :-1])
            _, weight_KB = posterior(_of(past_KBSV, before_BP[:, 1:]), weight_KB)
        # position t predicts token t + 1, so it may use the evidence of tokens 1 to t
        weight_KBS, _ = posterior(_of(logp_KBSV[:, :, :-1], token_BS[:, 1:]), weight_KB)
        return weight_KBS

    @torch.no_grad()
    def generate(
        self,
        token_BS: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts, each by the one path under which it is likeliest: [B, S] -> [B, S + N].

        Args: as for `TransformerLM.generate`.
        """
        self._check(token_BS)
        if token_BS.shape[1] > 1:
            logp_KBS = _of(self.all_log_probs(token_BS[:, :-1]), token_BS[:, 1:])
            best_B = logp_KBS.sum(-1).argmax(0)
        else:
            best_B = torch.zeros(len(token_BS), dtype=torch.int64)
        out_BS = token_BS.new_zeros(len(token_BS), token_BS.shape[1] + max_new_tokens).long()
        for k, expert in enumerate(self.paths):
            rows = (best_B == k).nonzero()[:, 0]
            if len(rows):
                body = cast(Path | LowRankPath, expert.body)
                lm = body.whole() if isinstance(body, LowRankPath) else body.lm
                out_BS[rows] = lm.generate(
                    token_BS[rows], max_new_tokens, temperature, top_k, top_p, generator
                )
        return out_BS

    def num_params(self, active: bool = False) -> int:
        """How many numbers are kept for prediction: parameters and trigram counts.

        Args:
            active: only those of one path, that of the highest id, with what it shares.
        """
        if active:
            lm = cast(Path | LowRankPath, self.paths[-1].body).lm
            return sum(p.numel() for p in lm.parameters())
        router = cast(PathRouter, self.layer.router)
        return sum(p.numel() for p in self.parameters()) + len(self.paths) * router.buckets

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of a forward per token, as `TransformerLM` counts them, with this gate.

        "trigrams" is counted as one path; `before` costs it no matrix product. "likelihood" is
        counted as K paths: the evidence of tokens before is that of predicting them.
        """
        one = cast(Path, self.paths[0].body).lm.flops_per_token(sequence_length)
        return one if self.gate == "trigrams" else one * len(self.paths)

    def _measure(self, length: int) -> None:
        for expert in self.paths:
            cast(Path, expert.body).length = length

    def _check(self, token_BS: Tensor) -> None:
        if not isinstance(token_BS, Tensor) or token_BS.dim() != 2 or not token_BS.numel():
            shape = tuple(token_BS.shape) if isinstance(token_BS, Tensor) else repr(token_BS)
            raise ValueError(f"token_BS must be token ids [B, S], at least one, got {shape}")
        if token_BS.is_floating_point() or token_BS.dtype is torch.bool:
            raise ValueError(f"token_BS must be integers, got {token_BS.dtype}")


def posterior(logp_KBS: Tensor, weight_KB: Tensor) -> tuple[Tensor, Tensor]:
    """Of each path before each token, and after all: fixed share with probability `SWITCH`.

    w_k(t + 1) ∝ (1 − c) w_k(t) p_k(x_t) + c Σ_j w_j(t) p_j(x_t) / K

    Args:
        logp_KBS: [K, B, S], each path's log-probability of the tokens.
        weight_KB: w(0).

    Returns:
        w(0) … w(S): [K, B, S + 1], and w(S).
    """
    weights, share = [weight_KB], SWITCH / len(logp_KBS)
    for logp_KB in logp_KBS.unbind(-1):
        joint_KB = (weight_KB.log() + logp_KB).softmax(0)
        weight_KB = (1 - SWITCH) * joint_KB + share
        weights.append(weight_KB)
    return torch.stack(weights, dim=-1), weight_KB


def _of(logp_KBSV: Tensor, token_BS: Tensor) -> Tensor:
    """The log-probability of each token: [K, B, S]."""
    index = token_BS.long().expand(len(logp_KBSV), *token_BS.shape)[..., None]
    return logp_KBSV.gather(-1, index)[..., 0]
