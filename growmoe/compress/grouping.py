"""Which experts of a layer are merged: groups of ids, the one that the others are aligned to first.

Every way below takes a layer with its statistics and the number of experts that are to be left,
and returns that many groups, those of one expert included.

M-SMoE and HC-SMoE as published keep all rows of the router and let those of a group lead to one
expert, which frees no router and needs a model that knows of it. Here an expert has one row, so
that what comes out is an ordinary model with fewer experts; and each layer loses as many, where
M-SMoE shares the budget out by frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from growmoe.compress.criteria import reap
from growmoe.compress.layer import Layer, outputs_of
from growmoe.compress.statistics import LayerStatistics

Groups = list[list[int]]


def m_smoe(layer: Layer, statistics: LayerStatistics, left: int) -> Groups:
    """The most frequent stay; each other joins the one whose router logits are most like its own.

    Similarity is the cosine of the two experts' logits over the tokens (M-SMoE, Li et al. 2023,
    arXiv 2310.01334, section 3.2).
    """
    return _around(layer, statistics.count, cosine(statistics.logits_EE), left)


def hc_smoe(layer: Layer, statistics: LayerStatistics, left: int) -> Groups:
    """Average-linkage clusters of the experts' mean outputs over the same tokens.

    Distance is Euclidean (HC-SMoE, Chen et al. 2024, arXiv 2410.08589, section 3.2). The most
    frequent of a cluster comes first.
    """
    mean_EO = outputs_of(layer, statistics.sample_ND).double().mean(1).cpu().numpy()
    label_E = fcluster(linkage(mean_EO, "average", metric="euclidean"), left, "maxclust")
    clusters = [np.flatnonzero(label_E == label).tolist() for label in np.unique(label_E)]
    # clusters at equal distances join at once, which leaves fewer than were asked for
    while len(clusters) < left:
        largest = max(clusters, key=len)
        clusters.append([largest.pop()])
    return _named(layer, statistics.count, clusters)


def ream(layer: Layer, statistics: LayerStatistics, left: int, largest: int = 16) -> Groups:
    """The most salient by REAP stay; in that order each takes the most similar of the others.

    Similarity is the mean of the cosines of gated outputs and of router logits; a group holds at
    most `largest`, so that most survivors stay as they were (REAM, arXiv 2604.04356).
    """
    similar_EE = (
        output_similarity(layer, statistics, gated=True) + cosine(statistics.logits_EE)
    ) / 2
    order = _descending(reap(statistics))
    centres, rest = order[:left], set(order[left:])
    clusters = []
    for centre in centres:
        nearest = sorted(rest, key=lambda e: (-float(similar_EE[centre, e]), e))[: largest - 1]
        rest -= set(nearest)
        clusters.append([centre, *nearest])
    for e in sorted(rest):  # more than all groups hold
        min(clusters, key=len).append(e)
    return [[layer.ids[e] for e in cluster] for cluster in clusters]


def nearest_output(layer: Layer, statistics: LayerStatistics, left: int) -> Groups:
    """The most salient by REAP stay; each other joins the one whose outputs are most like its own.

    Outputs are compared on the same tokens, by the cosine over tokens and values together.
    """
    return _around(layer, reap(statistics), output_similarity(layer, statistics), left)


GROUPINGS: Mapping[str, Callable[[Layer, LayerStatistics, int], Groups]] = {
    "m-smoe": m_smoe,
    "hc-smoe": hc_smoe,
    "ream": ream,
    "frequency": nearest_output,
}


def cosine(gram_EE: Tensor) -> Tensor:
    """A Gram matrix as cosines: [E, E] -> [E, E]."""
    norm_E = gram_EE.diagonal().clamp_min(1e-300).sqrt()
    return gram_EE / (norm_E[:, None] * norm_E)


@torch.no_grad()
def output_similarity(layer: Layer, statistics: LayerStatistics, gated: bool = False) -> Tensor:
    """Cosines of the experts' outputs on the kept inputs, float64 [E, E]; `gated`: times softmax
    probabilities of the layer's own weights where it chose the expert, else as they are."""
    x_ND = statistics.sample_ND
    out_ETO = outputs_of(layer, x_ND).double()
    if gated:
        weight_TE = layer.weights(x_ND).double()
        # an expert that was not chosen has a small say, so that all can be compared
        weight_TE = weight_TE + 0.1 / weight_TE.shape[1]
        out_ETO = out_ETO * weight_TE.T[:, :, None].to(out_ETO.device)
    flat = out_ETO.flatten(1)
    return cosine((flat @ flat.T).cpu())


def _descending(value_E: Tensor) -> list[int]:
    return sorted(range(len(value_E)), key=lambda e: (-float(value_E[e]), e))


def _around(layer: Layer, weight_E: Tensor, similar_EE: Tensor, left: int) -> Groups:
    order = _descending(weight_E)
    clusters = {centre: [centre] for centre in order[:left]}
    for e in order[left:]:
        clusters[max(clusters, key=lambda c: (float(similar_EE[c, e]), -c))].append(e)
    return [[layer.ids[e] for e in cluster] for cluster in clusters.values()]


def _named(layer: Layer, weight_E: Tensor, clusters: Sequence[Sequence[int]]) -> Groups:
    return [
        [layer.ids[e] for e in sorted(cluster, key=lambda e: (-float(weight_E[e]), e))]
        for cluster in clusters
    ]
