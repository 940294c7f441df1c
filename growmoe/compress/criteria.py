"""How much each expert matters: float64 [E] from one layer's statistics, the lowest to go first.

j is an expert, T_j its tokens and N_j their number, g_j its combine weight, f_j its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from growmoe.compress.calibrate import Batches, Loss, losses
from growmoe.compress.layer import CompressError, Layer
from growmoe.compress.statistics import LayerStatistics


def frequency(statistics: LayerStatistics) -> Tensor:
    """N_j."""
    return statistics.count.clone()


def gate_mass(statistics: LayerStatistics) -> Tensor:
    """Σ_{T_j} g_j."""
    return statistics.gate.clone()


def ean(statistics: LayerStatistics) -> Tensor:
    """Expert activation norm: Σ_{T_j} ‖f_j‖ (arXiv 2504.05586)."""
    return statistics.norm.clone()


def man(statistics: LayerStatistics) -> Tensor:
    """Mean activation norm: the mean over T_j of ‖f_j‖ (arXiv 2606.15716); 0 without tokens."""
    return statistics.norm / statistics.count.clamp_min(1)


def msan(statistics: LayerStatistics) -> Tensor:
    """Mean squared activation norm: the mean over T_j of ‖f_j‖² (arXiv 2606.15716)."""
    return statistics.square / statistics.count.clamp_min(1)


def reap(statistics: LayerStatistics) -> Tensor:
    """Router-weighted activation: the mean over T_j of g_j ‖f_j‖ (arXiv 2510.13999, eq. 9)."""
    return statistics.gated_norm / statistics.count.clamp_min(1)


def mone(statistics: LayerStatistics) -> Tensor:
    """Usage times output variance: (N_j / T) · E‖f_j − E f_j‖² (MoNE, arXiv 2507.00390).

    Low where the expert is rare or gives nearly the same for every token, so that its mean output
    can stand for it.
    """
    return statistics.count / max(1, statistics.tokens) * statistics.variance


def taylor(statistics: LayerStatistics) -> Tensor:
    """|Σ_{T_j} ⟨∂L/∂(g_j f_j), g_j f_j⟩|: to first order, what the loss would change by without j.

    After Molchanov et al. 2019, arXiv 1906.10771, with the expert's output as the unit.
    """
    return statistics.taylor.abs()


@torch.no_grad()
def aimer(bodies: Sequence[nn.Module]) -> Tensor:
    """−mean|W| / RMS(W) over all matrices of the expert (AIMER, arXiv 2603.18492); needs no data.

    The ratio is largest where all weights are equally large; such experts go first, hence the sign.
    """
    found = []
    for body in bodies:
        matrices = [p.detach().double() for p in body.parameters() if p.dim() >= 2]
        if not matrices:
            found.append(torch.tensor(-torch.inf, dtype=torch.float64))
            continue
        flat = torch.cat([m.flatten() for m in matrices]).cpu()
        found.append(-flat.abs().mean() / flat.square().mean().sqrt().clamp_min(1e-300))
    return torch.stack(found)


def router_norm_change(rows_ED: Tensor, before_ED: Tensor) -> Tensor:
    """‖w_j‖₂ now − ‖w_j‖₂ in the pretrained model, for a fine-tuned one (arXiv 2405.16646, eq. 3).

    Args:
        rows_ED: the router's rows, [E, D].
        before_ED: those of the model that fine-tuning began with.
    """
    if rows_ED.shape != before_ED.shape:
        raise CompressError(
            f"router-norm: the reference has rows {tuple(before_ED.shape)}, the model "
            f"{tuple(rows_ED.shape)}"
        )
    return rows_ED.double().norm(dim=1).cpu() - before_ED.double().norm(dim=1).cpu()


def random(num_experts: int, generator: torch.Generator) -> Tensor:
    """Any order: the null that a criterion has to beat."""
    return torch.rand(num_experts, generator=generator, dtype=torch.float64)


def leave_one_out(
    model: nn.Module,
    layer: Layer,
    batches: Batches,
    loss: Loss,
    progress: Callable[[], None] = lambda: None,
) -> Tensor:
    """The mean loss without j − the mean loss with it: E passes over the batches."""
    before = float(losses(model, batches, loss).mean())
    found = []
    for id in layer.ids:
        with layer.masked([id]):
            found.append(float(losses(model, batches, loss).mean()) - before)
        progress()
    return torch.tensor(found, dtype=torch.float64)


# name -> from one layer's statistics
FROM_STATISTICS: Mapping[str, Callable[[LayerStatistics], Tensor]] = {
    "frequency": frequency,
    "gate-mass": gate_mass,
    "ean": ean,
    "man": man,
    "msan": msan,
    "reap": reap,
    "mone": mone,
    "taylor": taylor,
}
CRITERIA = (
    *FROM_STATISTICS,
    "aimer",
    "naee",
    "leave-one-out",
    "greedy-loss",
    "router-norm",
    "random",
)
NEEDS_MODEL = ("taylor", "leave-one-out", "greedy-loss")


def saliency(
    name: str, layer: Layer, statistics: LayerStatistics, generator: torch.Generator
) -> Tensor:
    """The saliency of a layer's experts by the name of a criterion that needs no model.

    Raises:
        CompressError: no such criterion.
    """
    if name in FROM_STATISTICS:
        return FROM_STATISTICS[name](statistics)
    if name == "aimer":
        return aimer([layer.ffn(id) for id in layer.ids])
    if name == "random":
        return random(len(layer.ids), generator)
    raise CompressError(f"saliency {name!r} is not had from statistics alone")


def super_experts(statistics: Mapping[str, LayerStatistics]) -> dict[str, list[int]]:
    """Positions of experts that must not go: those behind massive activations (2507.23279, eq. 6).

    An expert is super if its largest |output| exceeds both the 99.5th percentile over all experts
    of all layers and a tenth of their maximum, in the first three quarters of the layers.
    """
    names = list(statistics)
    every = torch.cat([statistics[name].peak for name in names])
    limit = max(float(every.quantile(0.995)), 0.1 * float(every.max()))
    first = names[: max(1, round(0.75 * len(names)))]
    return {
        name: (statistics[name].peak > limit).nonzero()[:, 0].tolist() if name in first else []
        for name in names
    }
