"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from growmoe.continual import metrics

# Rows: after each of three experiences. Worked out by hand below.
R = [
    [0.9, 0.1, 0.0],
    [0.6, 0.8, 0.2],
    [0.5, 0.7, 1.0],
]


def test_final_accuracy_is_the_mean_of_the_last_row():
    assert metrics.final_accuracy(R) == pytest.approx((0.5 + 0.7 + 1.0) / 3)


def test_final_accuracy_with_counts_is_the_share_of_images_named_rightly():
    # 10, 20 and 70 test images: 5 + 14 + 70 of 100 are right.
    assert metrics.final_accuracy(R, [10, 20, 70]) == pytest.approx(0.89)


def test_average_incremental_accuracy_is_the_mean_over_time_on_what_was_seen():
    assert metrics.average_incremental_accuracy(R) == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)


def test_average_incremental_accuracy_weighs_each_time_by_its_own_test_images():
    by_time = [0.9, (6 + 16) / 30, 0.89]
    assert metrics.average_incremental_accuracy(R, [10, 20, 70]) == pytest.approx(np.mean(by_time))


def test_forgetting_is_the_best_past_minus_the_end():
    assert metrics.forgetting(R) == pytest.approx(((0.9 - 0.5) + (0.8 - 0.7)) / 2)


def test_forgetting_counts_from_the_best_even_when_it_came_later():
    later = [[0.5, 0.0, 0.0], [0.9, 0.8, 0.0], [0.6, 0.8, 0.7]]
    assert metrics.forgetting(later) == pytest.approx((0.3 + 0.0) / 2)
    assert metrics.backward_transfer(later) == pytest.approx((0.1 + 0.0) / 2)


def test_backward_transfer_is_the_end_minus_the_moment_of_learning():
    assert metrics.backward_transfer(R) == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)


def test_forward_transfer_is_against_the_untrained_model():
    assert metrics.forward_transfer(R, [0.3, 0.2, 0.1]) == pytest.approx((-0.1 + 0.1) / 2)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert metrics.learning_accuracy(R) == pytest.approx(0.9)


def test_one_experience_has_accuracy_but_no_transfer():
    assert metrics.final_accuracy([[0.7]]) == pytest.approx(0.7)
    assert math.isnan(metrics.forgetting([[0.7]]))
    assert math.isnan(metrics.backward_transfer([[0.7]]))
    assert math.isnan(metrics.forward_transfer([[0.7]], [0.1]))


def test_mean_ci95_uses_students_t():
    # s = 1, n = 3, t_{0.975, 2} = 4.302653
    mean, half = metrics.mean_ci95([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_mean_ci95_of_one_value_has_no_interval():
    mean, half = metrics.mean_ci95([0.4])
    assert mean == 0.4 and math.isnan(half)


@pytest.mark.parametrize("bad", [[], [[0.1, 0.2]], [[1.2]], [[math.nan]], [[-0.1]]])
def test_what_is_no_accuracy_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="accuracy_matrix"):
        metrics.final_accuracy(bad)


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 0], [1, 2, -3]])
def test_test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="test_counts"):
        metrics.final_accuracy(R, counts)


def test_mean_ci95_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        metrics.mean_ci95([])


@given(st.integers(2, 6).flatmap(lambda t: st.lists(
    st.lists(st.floats(0, 1), min_size=t, max_size=t), min_size=t, max_size=t)))  # fmt: skip
def test_forgetting_is_never_less_than_what_backward_transfer_lost(matrix):
    # The best past is at least the accuracy at the moment of learning.
    assert metrics.forgetting(matrix) >= -metrics.backward_transfer(matrix) - 1e-12


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(1, 100))
def test_equal_counts_change_nothing(last_row, count):
    size = len(last_row)
    matrix = [last_row] * size
    weighted = metrics.average_incremental_accuracy(matrix, [count] * size)
    assert weighted == pytest.approx(metrics.average_incremental_accuracy(matrix))


def test_paired_tests_equal_scipys_and_say_nothing_of_nothing():
    a, b = [0.90, 0.92, 0.91, 0.95], [0.88, 0.91, 0.92, 0.90]
    test = metrics.paired_test(a, b)
    assert test["t_p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert test["wilcoxon_p"] == pytest.approx(stats.wilcoxon(a, b).pvalue)
    same = metrics.paired_test(a, a)
    assert same["difference"] == 0 and same["t_p"] is None and same["wilcoxon_p"] is None
    assert metrics.paired_test([0.5], [0.4])["t_p"] is None


def test_a_curve_weighs_each_value_by_what_came_since_the_last():
    assert metrics.curve_mean([[10, 0.0], [40, 1.0]]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="rise"):
        metrics.curve_mean([[10, 0.5], [10, 0.5]])


def test_experts_that_tell_the_class_have_all_its_information_and_mixed_ones_none():
    assert metrics.mutual_information([[5, 0], [0, 7]]) == pytest.approx(1)
    assert metrics.mutual_information([[5, 5], [3, 3]]) == pytest.approx(0)
    # two experts, one of them a mixture: I = ln 2 - (3/4) H(1/3)
    entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    expected = (math.log(2) - 0.75 * entropy) / math.log(2)
    assert metrics.mutual_information([[1, 2], [1, 0]]) == pytest.approx(expected)


def test_each_drift_is_found_once_and_the_rest_are_false_alarms():
    found = metrics.drift_detection([50, 110, 130, 320], [100, 200, 300], 400)
    assert found == {
        "found": 2, "missed": 1, "false_alarms": 2, "false_alarms_per_1000": 5.0, "delay": 15.0,
    }  # fmt: skip
    assert metrics.drift_detection([], [], 100)["false_alarms"] == 0


def test_backward_transfer_equals_avalanches():
    avalanche = pytest.importorskip("avalanche.evaluation.metrics.forgetting_bwt")
    theirs = avalanche.BWT()
    for j in range(len(R) - 1):
        theirs.update(j, R[j][j], initial=True)
        theirs.update(j, R[-1][j])
    result = theirs.result()
    assert metrics.backward_transfer(R) == pytest.approx(sum(result.values()) / len(result))
