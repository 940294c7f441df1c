"""Published numbers: each is judged against what was measured, and none is passed over."""

from pathlib import Path

import pytest

from growmoe.continual.data.idx import DataError
from growmoe.continual.streams import Options, full_name
from growmoe.continual.suite import SUITES, Target, judge, read_targets, targets_table

TARGETS = Path(__file__).parents[2] / "benchmarks" / "targets.toml"


@pytest.mark.parametrize(
    ("measured", "verdict"), [(0.90, "reproduced"), (0.93, "beaten"), (0.87, "missed")]
)
def test_a_target_is_reproduced_beaten_or_missed(measured, verdict):
    target = Target("s", "m", "final_accuracy", 0.9, 0.02, "a paper")
    tables = {"s": {"methods": {"m": {"final_accuracy": {"mean": measured, "ci95": None}}}}}
    assert judge([target], tables) == [(target, measured, verdict)]
    assert f"| 90.0 | {100 * measured:.1f} | {verdict} | a paper |" in targets_table(
        judge([target], tables)
    )


def test_what_was_not_run_says_so():
    target = Target("s", "m", "final_accuracy", 0.9, 0.02, "a paper")
    assert judge([target], {})[0][1:] == (None, "not run")


def test_the_targets_that_come_with_the_bench_can_be_read_and_have_sources():
    targets = read_targets(TARGETS)
    assert len(targets) > 10
    assert all(0 < t.value <= 1 and 0 < t.tolerance < 0.1 and t.source for t in targets)


@pytest.mark.parametrize("text", ["", "[[target]]\nstream = 3", "not toml", None])
def test_a_broken_file_of_targets_is_named(tmp_path, text):
    path = tmp_path / "targets.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=r"targets\.toml is no file of targets"):
        read_targets(path)


def test_every_stream_of_a_suite_is_in_the_catalogue_in_its_one_spelling():
    for names in SUITES.values():
        assert [full_name(name, Options()) for name in names] == list(names)
