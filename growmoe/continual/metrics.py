"""What a continual learner achieved, from its accuracy matrix alone.

Legend: R[i, j] is the accuracy, from 0 to 1, on the test images of experience j after training on
experiences 0..i; T is the number of experiences; n_j is the number of test images of experience j.
Definitions of the same name differ between papers; each function names the one it takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import stdtrit


def _square(accuracy_matrix: ArrayLike) -> NDArray[np.float64]:
    r_TT = np.asarray(accuracy_matrix, dtype=np.float64)
    if r_TT.ndim != 2 or r_TT.shape[0] != r_TT.shape[1] or r_TT.shape[0] == 0:
        raise ValueError(f"accuracy_matrix must be [T, T] with T >= 1, got shape {r_TT.shape}")
    if not np.isfinite(r_TT).all() or r_TT.min() < 0 or r_TT.max() > 1:
        raise ValueError("accuracy_matrix must hold accuracies from 0 to 1")
    return r_TT


def _weights(test_counts: ArrayLike | None, num_experiences: int) -> NDArray[np.float64]:
    if test_counts is None:
        return np.ones(num_experiences)
    n_T = np.asarray(test_counts, dtype=np.float64)
    if n_T.shape != (num_experiences,) or not (n_T > 0).all():
        raise ValueError(
            f"test_counts must be {num_experiences} numbers above 0, got {np.asarray(test_counts)}"
        )
    return n_T


def accuracy_by_experience(
    accuracy_matrix: ArrayLike, test_counts: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Accuracy on all classes seen so far, after each experience.

    A_i = sum_{j<=i} n_j R[i, j] / sum_{j<=i} n_j. With test_counts this is the share of test images
    named rightly; without, every experience counts the same, as in Chaudhry et al. 2018
    (arXiv:1801.10112, section 4.1). The two agree where experiences have equally many test images.

    Args:
        accuracy_matrix: R, [T, T].
        test_counts: n, [T], or None.

    Returns:
        A, float64 [T].
    """
    r_TT = _square(accuracy_matrix)
    n_T = _weights(test_counts, len(r_TT))
    return (np.tril(r_TT) @ n_T) / np.cumsum(n_T)


def final_accuracy(accuracy_matrix: ArrayLike, test_counts: ArrayLike | None = None) -> float:
    """Accuracy on all experiences after the last: A_{T-1}.

    ACC of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, equation 2) when test_counts is None.
    """
    return float(accuracy_by_experience(accuracy_matrix, test_counts)[-1])


def average_incremental_accuracy(
    accuracy_matrix: ArrayLike, test_counts: ArrayLike | None = None
) -> float:
    """Mean over time of the accuracy on what was seen so far: (1/T) sum_i A_i.

    Rebuffi et al. 2017 (arXiv:1611.07725, section 4). It is not the A of Díaz-Rodríguez et al. 2018
    (arXiv:1810.13166, equation 1), which averages R over all pairs j <= i: late times weigh more.
    """
    return float(accuracy_by_experience(accuracy_matrix, test_counts).mean())


def forgetting(accuracy_matrix: ArrayLike) -> float:
    """How far the earlier experiences fell below their best, at the end.

    F = 1/(T-1) sum_{j<T-1} (max_{l<T-1} R[l, j] - R[T-1, j]): Chaudhry et al. 2018
    (arXiv:1801.10112, section 4.2); below 0 where the end is the best. Every experience counts the
    same. NaN for a single experience.
    """
    r_TT = _square(accuracy_matrix)
    if len(r_TT) == 1:
        return math.nan
    return float((r_TT[:-1, :-1].max(axis=0) - r_TT[-1, :-1]).mean())


def backward_transfer(accuracy_matrix: ArrayLike) -> float:
    """What later learning did to earlier experiences, against the moment each was learned.

    BWT = 1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j]): Lopez-Paz & Ranzato 2017 (arXiv:1706.08840,
    equation 3). Díaz-Rodríguez et al. 2018 (arXiv:1810.13166, equation 2) average over all later
    times instead of the last. NaN for a single experience.
    """
    r_TT = _square(accuracy_matrix)
    if len(r_TT) == 1:
        return math.nan
    return float((r_TT[-1, :-1] - np.diag(r_TT)[:-1]).mean())


def forward_transfer(accuracy_matrix: ArrayLike, untrained_accuracy: ArrayLike) -> float:
    """What earlier learning did for experiences not yet trained on.

    FWT = 1/(T-1) sum_{j>=1} (R[j-1, j] - b_j): Lopez-Paz & Ranzato 2017 (arXiv:1706.08840,
    equation 4). In a class-incremental stream it cannot exceed 0 by much: unseen classes are not
    guessed. NaN for a single experience.

    Args:
        accuracy_matrix: R, [T, T].
        untrained_accuracy: b, [T], the accuracy of the model before any training.
    """
    r_TT = _square(accuracy_matrix)
    b_T = np.asarray(untrained_accuracy, dtype=np.float64)
    if b_T.shape != (len(r_TT),):
        raise ValueError(f"untrained_accuracy must be [{len(r_TT)}], got shape {b_T.shape}")
    if len(r_TT) == 1:
        return math.nan
    return float((np.diag(r_TT, k=1) - b_T[1:]).mean())


def learning_accuracy(accuracy_matrix: ArrayLike) -> float:
    """Accuracy on each experience right after learning it: (1/T) sum_j R[j, j].

    Riemer et al. 2019 (arXiv:1810.11910, section 5.1).
    """
    return float(np.diag(_square(accuracy_matrix)).mean())


def mean_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the half-width of its 95% confidence interval by Student's t.

    Half-width: t_{0.975, n-1} s / sqrt(n), with the sample standard deviation s. NaN for one value.

    Raises:
        ValueError: there are no values.

    >>> mean, ci95 = mean_ci95([0.8, 0.9])
    >>> f"{mean:.3f} ± {ci95:.3f}"
    '0.850 ± 0.635'
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError("values must be a sequence of at least one number")
    if array.size == 1:
        return float(array[0]), math.nan
    half = float(stdtrit(array.size - 1, 0.975)) * array.std(ddof=1) / math.sqrt(array.size)
    return float(array.mean()), float(half)


def paired_test(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | int | None]:
    """Whether two methods differ over the same seeds.

    Returns:
        `seeds`, `difference` (mean of ours minus theirs), `t_p` (Student's paired t-test) and
        `wilcoxon_p` (signed-rank test), both two-sided; None where a test says nothing.

    >>> test = paired_test([0.9, 0.91, 0.92], [0.8, 0.82, 0.83])
    >>> f"{test['difference']:.3f} {test['t_p']:.4f}"
    '0.093 0.0013'
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise ValueError(f"both must have a value for each seed, got {a.shape} and {b.shape}")
    difference = a - b
    t_p = wilcoxon_p = None
    if a.size > 1 and difference.std() > 1e-12:
        t_p = float(stats.ttest_rel(a, b).pvalue)
    if a.size > 1 and np.abs(difference).max() > 1e-12:
        wilcoxon_p = float(stats.wilcoxon(difference).pvalue)
    return {
        "seeds": int(a.size),
        "difference": float(difference.mean()),
        "t_p": t_p,
        "wilcoxon_p": wilcoxon_p,
    }


def curve_mean(curve: Sequence[Sequence[float]]) -> float:
    """Mean over time of a curve [[examples seen, value], …], each value since the point before.

    Of accuracies on all tests at equal distances this is the any-time accuracy (Caccia et al. 2022,
    arXiv:2203.13307: area under the curve); of accuracies on each batch before it is learned, the
    prequential accuracy (Gama et al. 2013, Machine Learning 90:317).
    """
    points = np.asarray(curve, dtype=np.float64)
    if points.ndim != 2 or points.shape[1:] != (2,) or not len(points):
        raise ValueError(f"curve must be [[examples seen, value], ...], got shape {points.shape}")
    widths = np.diff(points[:, 0], prepend=0.0)
    if (widths <= 0).any():
        raise ValueError("the examples seen must be above 0 and rise along the curve")
    return float((widths * points[:, 1]).sum() / widths.sum())


def mutual_information(counts: ArrayLike) -> float:
    """How much the expert says of the class or domain, from 0 to 1.

    I(expert; class) / H(class), in the counts of examples by [expert, class]: 0 if every expert
    gets the same mix, 1 if the expert tells the class. NaN for a single class.
    """
    n_EC = np.asarray(counts, dtype=np.float64)
    if n_EC.ndim != 2 or (n_EC < 0).any() or not n_EC.sum():
        raise ValueError("counts must be [experts, classes] and not all 0")
    p_EC = n_EC / n_EC.sum()
    p_E, p_C = p_EC.sum(1, keepdims=True), p_EC.sum(0, keepdims=True)
    some = p_EC > 0
    information = (p_EC[some] * np.log(p_EC[some] / (p_E * p_C)[some])).sum()
    entropy = -(p_C[p_C > 0] * np.log(p_C[p_C > 0])).sum()
    return float(information / entropy) if entropy > 1e-12 else math.nan


def drift_detection(
    detections: Sequence[float], drifts: Sequence[float], length: float
) -> dict[str, float | int | None]:
    """How well drifts were found: delays, misses and false alarms.

    The first detection at or after a drift and before the next one finds it; all others are false
    alarms (Bifet et al. 2013, SDM, "CD-MOA").

    Args:
        detections: when something was detected, in examples seen.
        drifts: when the stream drifted, rising, likewise.
        length: of the stream, likewise.

    Returns:
        `found`, `missed`, `false_alarms`, `false_alarms_per_1000` examples, and `delay`, the mean
        over the found ones (None if there is none).
    """
    edges = [*drifts, length + 1]
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError("drifts must rise and lie within the stream")
    delays = []
    for begin, end in itertools.pairwise(edges):
        hits = [t for t in detections if begin <= t < end]
        if hits:
            delays.append(min(hits) - begin)
    false = len(detections) - len(delays)
    return {
        "found": len(delays),
        "missed": len(drifts) - len(delays),
        "false_alarms": false,
        "false_alarms_per_1000": 1000 * false / length,
        "delay": float(np.mean(delays)) if delays else None,
    }
