"""Several tasks at once: shared experts with a gate for each task, beside a plain shared bottom.

Shape suffixes: B inputs (of any leading shape), I input width, J tasks, O width of what is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from growmoe.experts.expert import seeded
from growmoe.experts.ffn import FFN
from growmoe.models.feed_forward import check_mixture, positive, seed_generator
from growmoe.moe import MoE
from growmoe.routers import MultiGate
from growmoe.routers.gate import Context
from growmoe.structure import Template


class MultiTask(nn.Module):
    """Multi-gate mixture of experts, MMoE (Ma et al., KDD 2018).

    Experts are shared, each task mixes them by a gate of its own, and a tower turns the mixture
    into the task's output. The gates are linear in the input, as in the paper.

    Args:
        d_in: I.
        tasks: the width of each task's output, by name.
        num_experts: to begin with.
        d_hidden: hidden width of an expert.
        d_shared: O, the width of what experts give; d_hidden if left out.
        d_tower: hidden width of a tower; d_hidden // 2 if left out.
        k: experts per input and task; all if left out, as in the paper.
        expert: as for `MoE`, from I to O; a ReLU `FFN` of `d_hidden` with biases if left out.
        shared: an expert that every task gets in full, as for `MoE`.
        moe: further keywords of the `MoE`.
        seed: of all initial weights and of the layer's generator; torch's global generator is not
            drawn from. Without it, one number is.

    Attributes:
        mixture: the `MoE`, on which surgery is done.
        towers: one for each task, in the order of `tasks`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        d_in: int,
        tasks: Mapping[str, int],
        num_experts: int = 8,
        d_hidden: int = 64,
        *,
        d_shared: int | None = None,
        d_tower: int | None = None,
        k: int | None = None,
        expert: Template | Sequence[Template] | None = None,
        shared: Template | None = None,
        moe: Context | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_tasks(tasks)
        positive(d_in=d_in, num_experts=num_experts, d_hidden=d_hidden)
        self.d_shared = d_hidden if d_shared is None else d_shared
        self.d_tower = max(1, d_hidden // 2) if d_tower is None else d_tower
        positive(d_shared=self.d_shared, d_tower=self.d_tower)
        check_mixture(num_experts, None, expert, shared, moe)
        self.d_in, self.tasks = d_in, dict(tasks)
        with seeded(seed_generator(seed)):
            self.mixture = MoE(
                d_in,
                FFN(d_hidden, "relu", bias=True) if expert is None else expert,
                num_experts,
                MultiGate(len(tasks), k),
                shared=shared,
                d_out=self.d_shared,
                **(moe or {}),
            )
            self.towers = _towers(self.tasks, self.d_shared, self.d_tower)

    def forward(self, x_BI: Tensor, task: str | None = None) -> dict[str, Tensor]:
        """[..., I] -> the output of each task, [..., its width], by name.

        Args:
            task: only this one; then only its gate and its tower are computed.

        Raises:
            ValueError: an unknown task, or an input of another width, not floating point, or (on a
                CPU) not finite.
        """
        if task is not None:
            index = _index(self.tasks, task)
            return {task: self.towers[index](self.mixture(x_BI, {"task": index}))}
        mixed_BJO = self.mixture(x_BI)
        return {
            name: tower(mixed_BO)
            for name, tower, mixed_BO in zip(
                self.tasks, self.towers, mixed_BJO.unbind(-2), strict=True
            )
        }


class SharedBottom(nn.Module):
    """One network that all tasks share, and a tower for each (Caruana 1997): MMoE's control.

    Args:
        d_in: I.
        tasks: the width of each task's output, by name.
        d_hidden: hidden width of what is shared.
        d_shared: O, the width of what it gives; d_hidden if left out.
        d_tower: hidden width of a tower; d_hidden // 2 if left out.
        seed: as for `MultiTask`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        d_in: int,
        tasks: Mapping[str, int],
        d_hidden: int = 64,
        *,
        d_shared: int | None = None,
        d_tower: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_tasks(tasks)
        positive(d_in=d_in, d_hidden=d_hidden)
        d_shared = d_hidden if d_shared is None else d_shared
        d_tower = max(1, d_hidden // 2) if d_tower is None else d_tower
        positive(d_shared=d_shared, d_tower=d_tower)
        self.d_in, self.tasks = d_in, dict(tasks)
        with seeded(seed_generator(seed)):
            self.bottom = FFN(d_hidden, "relu", bias=True, d_model=d_in, d_out=d_shared)
            self.towers = _towers(self.tasks, d_shared, d_tower)

    @classmethod
    def sized_as(cls, model: MultiTask, seed: int | None = None) -> SharedBottom:
        """One with the same towers and, within half a hidden unit, as many parameters."""
        shared = sum(p.numel() for p in model.mixture.parameters())
        unit = model.d_in + 1 + model.d_shared  # a hidden unit's weights in and out, and its bias
        d_hidden = max(1, round((shared - model.d_shared) / unit))
        widths = {"d_shared": model.d_shared, "d_tower": model.d_tower}
        return cls(model.d_in, model.tasks, d_hidden, **widths, seed=seed)

    def forward(self, x_BI: Tensor, task: str | None = None) -> dict[str, Tensor]:
        """[..., I] -> the output of each task (or of one), [..., its width], by name.

        Raises:
            ValueError: an unknown task, or an input of another width.
        """
        if x_BI.dim() < 1 or x_BI.shape[-1] != self.d_in:
            raise ValueError(
                f"x has shape {tuple(x_BI.shape)}, its last dimension must be d_in={self.d_in}"
            )
        mixed_BO = self.bottom(x_BI)
        names = self.tasks if task is None else (task,)
        return {name: self.towers[_index(self.tasks, name)](mixed_BO) for name in names}


def _check_tasks(tasks: Mapping[str, int]) -> None:
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"tasks must map names to widths, such as {{'age': 1}}, got {tasks!r}")
    for name, width in tasks.items():
        if not isinstance(name, str):
            raise ValueError(f"tasks: names must be strings, got {name!r}")
        positive(**{f"tasks[{name!r}]": width})


def _towers(tasks: Mapping[str, int], d_shared: int, d_tower: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(d_shared, d_tower), nn.ReLU(), nn.Linear(d_tower, width))
        for width in tasks.values()
    )


def _index(tasks: Mapping[str, int], task: str) -> int:
    if task not in tasks:
        raise ValueError(f"task {task!r} is unknown; there are {list(tasks)}")
    return list(tasks).index(task)
