"""Published numbers: each is judged against what was measured, and none is passed over."""

import importlib.util
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from growmoe import cli
from growmoe.continual import METHODS, Cell, Memory, Method, metrics
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


def test_every_target_is_of_a_stream_a_method_and_a_metric_that_the_bench_has():
    for target in read_targets(TARGETS):
        assert full_name(target.stream, Options()) == target.stream
        assert target.method in METHODS and target.metric in vars(metrics)
        assert re.search(r"\d{4}", target.source)  # a year, at the least
    pairs = [(t.stream, t.method, t.metric) for t in read_targets(TARGETS)]
    assert len(set(pairs)) == len(pairs)


def test_on_python_3_10_targets_are_read_with_tomli(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10))
    monkeypatch.setitem(sys.modules, "tomli", pytest.importorskip("tomllib"))
    monkeypatch.setitem(sys.modules, "tomllib", None)
    assert read_targets(TARGETS)


SMALL = ("split-digits:examples=10,tests=5", "split-digits:drift=none,examples=10,tests=5")
RUNS: list[str] = []


def quick(stream, seed, progress):
    RUNS.append(stream.name)
    count = stream.num_experiences
    return Cell([[0.8] * count] * count, 1.0, 10, Memory(model=40))


@pytest.fixture
def suite(monkeypatch, tmp_path, capsys):
    """Runs a suite of two small streams with a method that is quick; gives code, out and err."""
    monkeypatch.setitem(SUITES, "paper", SMALL)
    monkeypatch.setitem(METHODS, "quick", Method("always 80%", quick, {"a": 1}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    RUNS.clear()
    targets = tmp_path / "targets.toml"
    lines = [
        f'[[target]]\nstream = "{stream}"\nmethod = "{method}"\nmetric = "final_accuracy"\n'
        f'value = {value}\ntolerance = 0.02\nsource = "somebody, 2020"\n'
        for stream, method, value in (
            (SMALL[0], "quick", 0.79),
            (SMALL[1], "quick", 0.7),
            (SMALL[1], "naive", 0.2),
        )
    ]
    targets.write_text("\n".join(lines))

    def call(*arguments):
        words = ["bench", "--suite", "paper", "--methods", "quick", "--targets", str(targets)]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--output", str(tmp_path / "o"), *arguments])
        return stopped.value.code, *capsys.readouterr()

    return call


def test_a_suite_runs_every_table_and_judges_the_published_numbers(suite, tmp_path):
    code, out, _ = suite("--seeds", "2")
    assert code == 0 and [SMALL[0]] * 2 + [SMALL[1]] * 2 == RUNS
    verdicts = (tmp_path / "o" / "targets.md").read_text()
    assert verdicts in out
    for line, words in zip(
        verdicts.splitlines()[2:], ("79.0 | 80.0 | reproduced", "70.0 | 80.0 | beaten",
                                    "20.0 | – | not run"), strict=True
    ):  # fmt: skip
        assert words in line
    for how in ("", "drift-none-"):
        folder = f"split-digits-{how}examples-10-tests-5"
        assert (tmp_path / "o" / folder / "table.md").exists()


@pytest.mark.slow
def test_a_suite_goes_on_cell_by_cell(suite, tmp_path):
    suite("--seeds", "2")
    assert len(RUNS) == 4
    # as if it had been killed in the second table
    (tmp_path / "o" / "split-digits-drift-none-examples-10-tests-5/cells/quick-seed1.json").unlink()
    (tmp_path / "o" / "targets.md").unlink()
    code, _, err = suite("--seeds", "2")
    assert code == 0 and RUNS[4:] == [SMALL[1]] and "1 cells were finished before" in err
    assert (tmp_path / "o" / "targets.md").exists()


@pytest.mark.slow
def test_a_table_whose_data_is_missing_does_not_stop_the_others(suite, monkeypatch, tmp_path):
    monkeypatch.setitem(SUITES, "paper", ("split-cifar-10", *SMALL))
    code, _, err = suite("--data-dir", str(tmp_path / "nowhere"))
    assert code == 1 and list(SMALL) == RUNS
    assert "split-cifar-10 was not run" in err
    assert "reproduced" in (tmp_path / "o" / "targets.md").read_text()


@pytest.mark.slow
def test_a_suite_that_was_killed_loses_no_finished_cell(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
        from growmoe import cli
        from growmoe.continual.cell import Cell, Memory
        from growmoe.continual.methods import METHODS, Method
        from growmoe.continual.suite import SUITES

        def method(stream, seed, progress):
            print(stream.drift, seed, flush=True)
            if stream.drift == "none" and sys.argv[1] == "slow":
                time.sleep(300)
            return Cell([[0.8] * 5] * 5, 1.0, 10, Memory(model=40))

        SUITES["paper"] = {SMALL!r}
        METHODS["one"] = Method("", method, {{"a": 1}})
        cli.main(["bench", "--suite", "paper", "--methods", "one", "--seeds", "2",
                  "--targets", {str(TARGETS)!r}, "--output", {str(tmp_path / "o")!r}])
        """)
    )
    first = subprocess.Popen(
        [sys.executable, script, "slow"], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while first.stdout.readline() != "none 0\n":
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    again = subprocess.run(
        [sys.executable, script, "quick"], capture_output=True, text=True, cwd=tmp_path
    )
    ran = [line for line in again.stdout.splitlines() if re.fullmatch(r"(sharp|none) \d", line)]
    assert again.returncode == 0 and ran == ["none 0", "none 1"]
    assert (tmp_path / "o" / "targets.md").exists()
