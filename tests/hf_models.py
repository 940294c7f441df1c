"""A tiny random model of each family, and what one with masked experts gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow_parameters import but_slow
from torch import Tensor, nn

VOCABULARY = 256 + 3
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=128,
    intermediate_size=24,
    num_experts_per_tok=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
DEEPSEEK = dict(
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_shared_experts=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
)
OWN: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8),
    "olmoe": dict(num_experts=8),
    "qwen2_moe": dict(moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=8),
    "qwen3_moe": dict(moe_intermediate_size=24, num_experts=8, head_dim=16, norm_topk_prob=True),
    "deepseek_v2": DEEPSEEK | dict(topk_method="group_limited_greedy"),
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": dict(
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=16,
    ),
    "gpt_oss": dict(num_local_experts=8, head_dim=16),
    "granitemoe": dict(num_local_experts=8),
    "granitemoeshared": dict(num_local_experts=8, shared_intermediate_size=24),
    "phimoe": dict(num_local_experts=8),
    "minimax_m2": dict(num_local_experts=8, head_dim=16, rotary_dim=8),
    "ernie4_5_moe": dict(
        moe_intermediate_size=24,
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=0,
        moe_layer_end_index=-1,
    ),
}
GROUPED = ("deepseek_v2", "deepseek_v3", "glm4_moe")
# for the quick tests, three that differ most: in groups, with biases, plain; the others are slow
KINDS = ("deepseek_v3", "gpt_oss", "mixtral")


def families(*without: str) -> pytest.MarkDecorator:
    """A test of each family but these."""
    return pytest.mark.parametrize("family", but_slow(sorted({*OWN} - {*without}), *KINDS))


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A causal language model in eval mode; its correction biases are not zero."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**COMMON, **OWN[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith("router.bias"):
                nn.init.normal_(tensor, std=0.1)
            elif "proj" in name or "router" in name or "gate" in name:
                nn.init.normal_(tensor, std=0.3)  # experts that differ, choices that are clear
    return model


def double(model: Any) -> Any:
    """In float64, which the grouped matmul of a CPU does not take."""
    model.set_experts_implementation("eager")
    return model.double()


def tokens(batch: int = 3, length: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, token_BS: Tensor) -> Tensor:
    result: Tensor = model(token_BS, use_cache=False).logits
    return result


@contextmanager
def masked_by_hand(model: Any, gone: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Within, these experts have logit -inf (and correction -inf); written apart from the library.

    Args:
        gone: name of a block -> positions.
    """
    offsets: dict[int, Tensor] = {}
    corrections = []
    for name, positions in gone.items():
        block = model.get_submodule(name)
        router = block.router if hasattr(block, "router") else block.gate
        offset = torch.zeros(len(router.weight))
        offset[list(positions)] = -torch.inf
        offsets[router.weight.data_ptr()] = offset
        corrections += [
            (t, t.clone(), list(positions))
            for n, t in [*block.named_parameters(), *block.named_buffers()]
            if "correction_bias" in n
        ]
    linear = F.linear

    def with_offset(x: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
        result = linear(x, weight, *rest, **more)
        offset = offsets.get(weight.data_ptr())
        return result if offset is None else result + offset

    F.linear = with_offset  # type: ignore[assignment]
    try:
        for tensor, _, positions in corrections:
            tensor.data[..., positions] = -torch.inf
        yield
    finally:
        F.linear = linear
        for tensor, before, _ in corrections:
            tensor.data.copy_(before)


def save_with_tokenizer(model: Any, folder: Path, shard: str = "5GB") -> Path:
    """Write a model with a tokenizer that makes a token of each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder, max_shard_size=shard)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))
