"""Several tasks share the experts, each through a gate of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from growmoe.assignment import Assignment
from growmoe.experts.expert import Expert
from growmoe.routers.gate import Context, Entry, linear_key, stacked, told, wide
from growmoe.routers.router import Router, Routing, from_mask


class MultiGate(Router):
    """Multi-gate mixture of experts, MMoE (Ma et al., KDD 2018, eqs. 5 and 6).

    Each of J tasks has a key on each expert and a softmax of its own over the experts. Without a
    "task" in the context the layer returns the mixtures of all tasks, [..., J, O], computing each
    expert once; with it that task's alone, [..., O].

    Args:
        num_tasks: J.
        k: experts per token and task, their weights divided by their sum; all if left out, as in
            the paper.

    Raises:
        ValueError: num_tasks or k is not a positive integer; a task out of range.
    """

    balances = True  # all experts have all tokens, in the paper
    wants = "task"

    def __init__(self, num_tasks: int, k: int | None = None) -> None:
        super().__init__()
        for name, value in (("num_tasks", num_tasks), ("k", k)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"MultiGate: {name} must be a positive integer, got {value!r}")
        if num_tasks is None:
            raise ValueError("MultiGate: num_tasks must be a positive integer, got None")
        self.num_tasks, self.k = num_tasks, k
        self.balances = k is None
        self.capped = k is not None

    @property
    def min_experts(self) -> int:  # type: ignore[override]
        return self.k or 1

    def entries(self, d_model: int) -> dict[str, Entry]:
        key = linear_key(d_model)

        def fresh(generator: torch.Generator) -> Tensor:
            return torch.stack([key.fresh(generator) for _ in range(self.num_tasks)])

        def toward(mean_D: Tensor, keys_EJD: Tensor) -> Tensor:
            assert key.toward is not None
            return torch.stack([key.toward(mean_D, keys_ED) for keys_ED in keys_EJD.unbind(1)])

        return {"key": Entry(fresh, toward=toward)}

    def forward(
        self,
        x_TD: Tensor,
        experts: Sequence[Expert],
        admission_E: Tensor,
        context: Context | None = None,
    ) -> Routing:
        x_wide_TD, key_EJD = wide(x_TD, stacked(experts, "key"))
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TEJ = torch.einsum("td,ejd->tej", x_wide_TD, key_EJD)
        logits_TEJ = logits_TEJ + admission_E.to(logits_TEJ).log()[:, None]
        task_T = None
        if context is not None and context.get("task") is not None:
            task_T = told(context, "task", len(x_TD), x_TD.device)
            if len(task_T) and not 0 <= int(task_T.min()) <= int(task_T.max()) < self.num_tasks:
                raise ValueError(f"MultiGate: tasks must be in 0..{self.num_tasks - 1}")
            own_T11 = task_T[:, None, None].expand(-1, len(experts), 1)
            logits_TEJ = logits_TEJ.gather(2, own_T11)
        probs_TEJ = logits_TEJ.softmax(1)
        weight_TEJ = probs_TEJ
        chosen_TE = torch.ones_like(probs_TEJ[..., 0], dtype=torch.bool)
        if self.k is not None:
            top_TKJ = probs_TEJ.topk(self.k, dim=1).indices
            chosen_TEJ = torch.zeros_like(probs_TEJ, dtype=torch.bool).scatter(1, top_TKJ, True)
            weight_TEJ = torch.where(chosen_TEJ, probs_TEJ, 0.0)
            weight_TEJ = weight_TEJ / weight_TEJ.sum(1, keepdim=True).clamp_min(1e-20)
            chosen_TE = chosen_TEJ.any(-1)
        weight = weight_TEJ if task_T is None else weight_TEJ[..., 0]
        if self.k is None:
            every_TE = torch.arange(len(experts), device=x_TD.device).expand(len(x_TD), -1)
            assignment = Assignment.from_choice(every_TE, weight, len(experts))
        else:
            assignment = from_mask(chosen_TE, weight)
        return Routing(assignment, probs_TEJ.mean(-1), logits_TEJ.mean(-1))

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, k={self.k}"
