"""The Hugging Face families: where each keeps its experts, in memory and on disk.

A new family is one declaration. One like Mixtral, say, whose router is called `switch`, whose
config counts `n_experts`, and whose files name an expert's matrices `mlp.experts.3.wi_0.weight` …:

    FAMILIES["newmoe"] = Family(
        count="n_experts",
        router="switch",
        rows={"switch.weight": 0},
        split=("wi_0.weight", "wi_1.weight", "wo.weight"),
    )

What the experts themselves are made of is not declared: every parameter of `experts` has one slice
for each expert, along its first dimension, in all families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from growmoe.compress.layer import CompressError


@dataclass(frozen=True)
class Family:
    """Where the mixtures of one `model_type` lie. Names are relative to the block.

    Attributes:
        count: field of the config with the number of experts.
        k: field of the config with the experts per token.
        block: the mixture in a decoder layer.
        router: the module of the block that returns (logits, weights, indices).
        rows: tensors that hold something for each expert, besides those of `experts` -> the
            dimension that counts experts.
        correction: that of them, if any, which is added in the choice and not in the weights.
        arguments: attributes of the block that the router is given after the hidden states.
        sizes: attributes that hold the number of experts, where there are such.
        groups: fields of the config with the number of groups and of those a token may choose in.
        grouped: a field and the value it has if the groups count; None: they always do.
        group_best: how many experts of a group its score is made of.
        sigmoid: whether scores are sigmoids of the logits, and not their softmax.
        disk_block: the block's name in files.
        disk_rows: name in files -> name in memory, where they differ.
        split: in files, names of an expert's gate, up and down matrices after ``experts.3.``; None
            where files hold the stacked tensors.
    """

    count: str
    k: str = "num_experts_per_tok"
    block: str = "mlp"
    router: str = "gate"
    rows: Mapping[str, int] = field(default_factory=lambda: {"gate.weight": 0})
    correction: str | None = None
    arguments: tuple[str, ...] = ()
    sizes: tuple[str, ...] = (
        "num_experts",
        "experts.num_experts",
        "gate.num_experts",
        "router.num_experts",
        "router.out_features",
    )
    groups: tuple[str, str] | None = None
    grouped: tuple[str, Any] | None = None
    group_best: int = 1
    sigmoid: bool = False
    disk_block: str = "mlp"
    disk_rows: Mapping[str, str] = field(default_factory=dict)
    split: tuple[str, str, str] | None = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

    def on_disk(self, name: str) -> str:
        """The name in files of a decoder layer's tensor that is not split by experts."""
        inner = name.removeprefix(f"{self.block}.")
        if inner == name:
            return name
        renamed = {memory: disk for disk, memory in self.disk_rows.items()}
        return f"{self.disk_block}.{renamed.get(inner, inner)}"

    def groups_of(self, config: Any) -> tuple[int, int]:
        """How many groups of experts there are, and how many of them a token may choose in."""
        if self.groups is None:
            return 1, 1
        if self.grouped is not None and getattr(config, self.grouped[0], None) != self.grouped[1]:
            return 1, 1
        groups = getattr(config, self.groups[0], None) or 1
        return groups, getattr(config, self.groups[1], None) or groups

    def fewest(self, config: Any) -> int:
        """The fewest experts with which the router works: k, and enough in each group."""
        k = int(getattr(config, self.k))
        groups, chosen = self.groups_of(config)
        if groups == 1:
            # a single group is scored all the same
            return max(k, self.group_best if self.groups else 1)
        return groups * max(self.group_best, -(-k // chosen))


_MIXTRAL_FILES = ("w1.weight", "w3.weight", "w2.weight")
_CORRECTED = {"gate.weight": 0, "gate.e_score_correction_bias": 0}
_DEEPSEEK_V3 = Family(
    count="n_routed_experts",
    rows=_CORRECTED,
    correction="gate.e_score_correction_bias",
    groups=("n_group", "topk_group"),
    group_best=2,
    sigmoid=True,
)
_GRANITE = Family(
    count="num_local_experts",
    block="block_sparse_moe",
    router="router",
    rows={"router.weight": 0},
    disk_block="block_sparse_moe",
    disk_rows={
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    },
    split=None,
)

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        count="num_local_experts", disk_block="block_sparse_moe", split=_MIXTRAL_FILES
    ),
    "olmoe": Family(count="num_experts"),
    "qwen2_moe": Family(count="num_experts"),
    "qwen3_moe": Family(count="num_local_experts"),
    "deepseek_v2": Family(
        count="n_routed_experts",
        groups=("n_group", "topk_group"),
        grouped=("topk_method", "group_limited_greedy"),
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe": _DEEPSEEK_V3,
    "gpt_oss": Family(
        count="num_local_experts",
        router="router",
        rows={"router.weight": 0, "router.bias": 0},
        split=None,
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "phimoe": Family(
        count="num_local_experts",
        router="router",
        rows={"router.weight": 0},
        disk_block="block_sparse_moe",
        disk_rows={"gate.weight": "router.weight"},
        split=_MIXTRAL_FILES,
    ),
    "minimax_m2": Family(
        count="num_local_experts",
        rows={"gate.weight": 0, "e_score_correction_bias": 0},
        correction="e_score_correction_bias",
        sigmoid=True,
        arguments=("e_score_correction_bias",),
        disk_block="block_sparse_moe",
        split=_MIXTRAL_FILES,
    ),
    "ernie4_5_moe": Family(
        count="moe_num_experts",
        k="moe_k",
        rows={"gate.weight": 0, "gate.moe_statics.e_score_correction_bias": 1},
        correction="gate.moe_statics.e_score_correction_bias",
        disk_rows={
            "moe_statics.e_score_correction_bias": "gate.moe_statics.e_score_correction_bias"
        },
    ),
}


def family_of(config: Any) -> Family:
    """The family of a config.

    Raises:
        CompressError: it is none that is known here.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise CompressError(
            f"model_type {kind!r} is no mixture of experts that is known here; the families are "
            f"{', '.join(FAMILIES)}. A new one is one declaration in growmoe.hf.families"
        )
    return FAMILIES[kind]
