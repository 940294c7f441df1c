"""The bench: nothing finished is lost, nothing broken is trusted, nothing unlike is mixed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rows import rows
from slow_parameters import but_slow

from growmoe.continual import store
from growmoe.continual.bench import BenchError, run_bench
from growmoe.continual.cell import Cell, Memory
from growmoe.continual.methods import Method
from growmoe.continual.streams import Data, class_incremental
from growmoe.continual.table import markdown_table

LINEAGE = [
    {"step": 0, "layer": "moe", "act": "init", "ids": [0], "parents": [], "child": None,
     "accepted": True, "reason": "", "signals": {}, "change": None},
    {"step": 5, "layer": "moe", "act": "spawn", "ids": [0], "parents": [0], "child": 1,
     "accepted": True, "reason": "novel", "signals": {"novelty": 3.1}, "change": 0.0},
]  # fmt: skip


def load(name, seed, data_dir=None, shade=9):
    labels = torch.arange(4).repeat(3)
    pixels = torch.full((12, 1, 2, 2), shade, dtype=torch.uint8)
    return class_incremental(name, Data(pixels, labels, pixels, labels, 255), seed, 2)


class Recorded:
    """A method that remembers its runs, and can be told to fail."""

    def __init__(self, fail=None, lineage=False):
        self.runs, self.fail, self.lineage = [], fail, lineage

    def __call__(self, stream, seed, progress):
        self.runs.append(seed)
        progress(0.5, "half")
        if self.fail and seed in self.fail:
            raise self.fail[seed]
        chance = float(np.random.rand()), float(torch.rand(()))
        return Cell(
            [[0.9, 0.0], [0.5, 0.8 + 0.01 * seed]],
            seconds=1.5,
            parameters=10,
            memory=Memory(model=40, examples=1_000_000),
            lineage=LINEAGE if self.lineage else None,
            load_history=[{"step": 3, "load": {0: 1.0}}] if self.lineage else None,
            extras={"chance": chance},
        )


def bench(tmp_path, seeds=(0, 1), said=None, load=load, stream="tiny", settings=None, **functions):
    methods = {name: Method(name, f, settings or {"a": 1}) for name, f in functions.items()}
    say = (lambda text: None) if said is None else said.append
    return run_bench(stream, methods, list(seeds), tmp_path / "out", say=say, load=load)


def test_results_hold_the_matrix_and_the_summary(tmp_path):
    outcome = bench(tmp_path, one=Recorded())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == outcome.results and not outcome.failures
    assert {"stream", "versions", "command", "hardware", "methods"} <= results.keys()
    one = results["methods"]["one"]
    assert [cell["seed"] for cell in one["seeds"]] == [0, 1]
    assert one["seeds"][1]["accuracy_matrix"] == [[0.9, 0.0], [0.5, 0.81]]
    assert one["final_accuracy"]["mean"] == pytest.approx((0.65 + 0.655) / 2)
    assert one["forgetting"]["mean"] == pytest.approx(0.4)
    assert one["backward_transfer"]["mean"] == pytest.approx(-0.4)
    assert one["forgetting"]["ci95"] == pytest.approx(0.0)
    assert one["memory_bytes"]["mean"] == 1_000_040
    assert all(path.stat().st_size > 0 for path in outcome.files)


def test_finished_cells_are_not_run_again(tmp_path):
    bench(tmp_path, one=Recorded())
    again, more = Recorded(), Recorded()
    results = bench(tmp_path, seeds=(0, 1, 2), one=again, two=more).results
    assert again.runs == [2] and more.runs == [0, 1, 2]
    assert len(results["methods"]["one"]["seeds"]) == 3


def test_cells_of_other_methods_in_the_folder_stay_in_the_results(tmp_path):
    bench(tmp_path, one=Recorded())
    assert set(bench(tmp_path, two=Recorded()).results["methods"]) == {"one", "two"}


def test_an_interrupt_keeps_what_is_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, one=Recorded(fail={1: KeyboardInterrupt()}))
    again = Recorded()
    bench(tmp_path, one=again)
    assert again.runs == [1]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        sys.path[:0] = {[str(p) for p in Path(__file__).parents[:3]]!r}
        from pathlib import Path
        import test_bench
        class Slow(test_bench.Recorded):
            def __call__(self, stream, seed, progress):
                if seed == 1:
                    print("second", flush=True)
                    time.sleep(60)
                return super().__call__(stream, seed, progress)
        test_bench.bench(Path({str(tmp_path)!r}), one=Slow())
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "second\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    # As if the kill had come while a file was being written.
    (tmp_path / "out" / "cells" / ".one-seed1.json.x1y2z3").write_text('{"format": 1, "stre')
    again = Recorded()
    outcome = bench(tmp_path, one=again)
    assert again.runs == [1] and len(outcome.results["methods"]["one"]["seeds"]) == 2


DAMAGES = [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: "null",
    lambda text: text.replace("0.9", "0.95"),
    lambda text: text.replace('"format": 1', '"format": 0'),
    lambda text: "\x00" * len(text),
]


@pytest.mark.parametrize("damage", but_slow(DAMAGES, DAMAGES[1], DAMAGES[4]))
def test_a_broken_cell_is_reported_and_run_again(tmp_path, damage):
    bench(tmp_path, one=Recorded())
    path = tmp_path / "out" / "cells" / "one-seed1.json"
    path.write_text(damage(path.read_text()))
    said, again = [], Recorded()
    outcome = bench(tmp_path, said=said, one=again)
    assert again.runs == [1]
    assert any("broken cell" in line and "one-seed1.json" in line for line in said)
    assert outcome.results["methods"]["one"]["seeds"][1]["accuracy_matrix"][0][0] == 0.9


def test_a_cell_copied_under_another_name_is_not_trusted(tmp_path):
    bench(tmp_path, seeds=(0,), one=Recorded())
    cells = tmp_path / "out" / "cells"
    (cells / "one-seed1.json").write_text((cells / "one-seed0.json").read_text())
    again = Recorded()
    bench(tmp_path, one=again)
    assert again.runs == [1]


def test_a_folder_of_another_stream_is_refused(tmp_path):
    bench(tmp_path, one=Recorded())
    with pytest.raises(BenchError, match="holds a bench of tiny, not of other"):
        bench(tmp_path, stream="other", one=Recorded())


def test_a_folder_of_other_data_is_refused(tmp_path):
    bench(tmp_path, one=Recorded())
    with pytest.raises(BenchError, match="other data"):
        bench(tmp_path, load=lambda *a: load(*a, shade=8), one=Recorded())


def test_a_folder_of_other_settings_is_refused_and_says_which(tmp_path):
    bench(tmp_path, one=Recorded())
    untouched = Recorded()
    with pytest.raises(BenchError, match=r"one of other settings \(a was 1, is 2\)"):
        bench(tmp_path, settings={"a": 2}, one=untouched)
    assert untouched.runs == []


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(BenchError, match="cannot write"):
        bench(tmp_path, one=Recorded())


def test_a_failing_method_does_not_lose_the_others(tmp_path):
    bad = Recorded(fail={0: ValueError("no\nsuch thing")})
    outcome = bench(tmp_path, bad=bad, good=Recorded())
    assert outcome.failures == ["bad seed 0 failed: ValueError: no"]
    assert len(outcome.results["methods"]["good"]["seeds"]) == 2
    assert len(outcome.results["methods"]["bad"]["seeds"]) == 1
    trace = tmp_path / "out" / "errors" / "bad-seed0.txt"
    assert "no\nsuch thing" in trace.read_text()
    assert not bench(tmp_path, bad=Recorded()).failures
    assert not trace.exists()


def test_a_method_that_returns_no_accuracies_has_failed(tmp_path):
    def nan(stream, seed, progress):
        return Cell([[float("nan")]], 1.0, 1, Memory())

    outcome = bench(tmp_path, seeds=(0,), nan=nan)
    assert "accuracies from 0 to 1" in outcome.failures[0]
    assert outcome.results["methods"] == {}


def test_every_cell_starts_from_its_seed_whatever_ran_before(tmp_path):
    alone = bench(tmp_path / "a", seeds=(1,), one=Recorded()).results
    after = bench(tmp_path / "b", seeds=(0, 1), zero=Recorded(), one=Recorded()).results
    chances = [r["methods"]["one"]["seeds"][-1]["extras"]["chance"] for r in (alone, after)]
    assert chances[0] == chances[1]


def test_cells_run_on_one_thread_and_leave_the_number_as_it_was(tmp_path):
    seen = []

    def method(stream, seed, progress):
        seen.append(torch.get_num_threads())
        return Recorded()(stream, seed, progress)

    before = torch.get_num_threads()
    bench(tmp_path, one=method)
    assert seen == [1, 1] and torch.get_num_threads() == before


def test_progress_never_falls_and_ends_at_one(tmp_path):
    seen = []
    methods = {"one": Method("", Recorded()), "two": Method("", Recorded())}
    run_bench("tiny", methods, [0, 1], tmp_path, progress=lambda f, t: seen.append(f), load=load)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_lineage_is_written_as_lines_and_left_out_of_the_results(tmp_path):
    outcome = bench(tmp_path, seeds=(0,), grows=Recorded(lineage=True))
    path = tmp_path / "out" / "lineage" / "grows-seed0.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINEAGE
    assert "lineage" not in outcome.results["methods"]["grows"]["seeds"][0]
    names = {p.name for p in outcome.files}
    assert {"lifelines-grows-seed0.png", "load-grows-seed0.png", "accuracy.png"} <= names


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    store.write_atomically(path, "old")

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        store.write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_markdown_table_has_percentages_intervals_and_megabytes(tmp_path):
    text = markdown_table(bench(tmp_path, one=Recorded()).results)
    assert text == (tmp_path / "out" / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| one"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    percentages = ["65.3 ± 3.2", "77.6 ± 1.6", "40.0 ± 0.0", "-40.0 ± 0.0"]
    assert cells == ["one", "2", *percentages, "10", "1.00", "1.5", "–"]


def test_the_table_says_what_a_method_was_given(tmp_path):
    method = Method("one", Recorded(), {"a": 1}, needs=("boundaries", "examples"))
    outcome = run_bench("tiny", {"one": method}, [0], tmp_path / "out", load=load)
    assert outcome.results["methods"]["one"]["needs"] == ["boundaries", "examples"]
    row = next(x for x in markdown_table(outcome.results).splitlines() if x.startswith("| one"))
    assert row.endswith("| boundaries, examples |")


def test_one_seed_has_no_interval(tmp_path):
    text = markdown_table(bench(tmp_path, seeds=(0,), one=Recorded()).results)
    assert "±" not in text


def test_seconds_of_sleep_do_not_count_as_training(tmp_path):
    def method(stream, seed, progress):
        time.sleep(0.01)
        return Recorded()(stream, seed, progress)

    cell = bench(tmp_path, seeds=(0,), one=method).results["methods"]["one"]["seeds"][0]
    assert cell["seconds"] == 1.5 and cell["wall_seconds"] >= 0.01


def test_the_best_rival_is_named_with_a_paired_test_and_joint_is_none(tmp_path):
    results = bench(tmp_path, growmoe=Recorded(), joint=Recorded(), naive=Recorded()).results
    comparison = results["comparison"]
    assert comparison["best_rival"] == "naive"
    assert comparison["rivals"]["naive"] == {
        "seeds": 2, "difference": 0.0, "t_p": None, "wilcoxon_p": None,
    }  # fmt: skip
    assert "growmoe against naive, the best rival: +0.0 points" in markdown_table(results)


def test_a_rival_that_is_told_the_task_is_tested_but_not_the_best(tmp_path):
    methods = {
        "growmoe": Method("", Recorded()),
        "told": Method("", Recorded(), needs=("boundaries", "task labels")),
        "oracle": Method("", Recorded(), needs=("true domains",)),
    }
    comparison = run_bench("tiny", methods, [0, 1], tmp_path / "a", load=load).results["comparison"]
    assert comparison["best_rival"] is None and set(comparison["rivals"]) == {"told", "oracle"}
    methods["growmoe"] = methods["told"]
    comparison = run_bench("tiny", methods, [0, 1], tmp_path / "b", load=load).results["comparison"]
    assert comparison["best_rival"] == "told"


def test_latex_and_csv_say_what_the_markdown_says(tmp_path):
    bench(tmp_path, one=Recorded())
    latex = (tmp_path / "out" / "table.tex").read_text()
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert r"\begin{tabular}{lrrrrrrrrr}" in latex
    final = next(line for line in markdown.splitlines() if line.startswith("| one")).split("|")[3]
    assert final.strip().replace("±", r"$\pm$") in latex
    assert latex.count(r"\\") == 2
    lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    quantities = {line.split(",")[3]: line.split(",")[4] for line in lines[1:]}
    assert float(quantities["final_accuracy"]) == pytest.approx(0.6525)
    assert float(quantities["memory_bytes"]) == 1_000_040


def test_several_workers_without_ray_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    method = {"one": Method("one", Recorded(), {})}
    with pytest.raises(ImportError, match=r"growmoe\[distributed\]"):
        run_bench("tiny", method, [0, 1], tmp_path / "out", load=load, workers=2)


class Dies(Recorded):
    """A method whose process dies, so many times for each seed: files remember."""

    def __init__(self, folder, times):
        super().__init__()
        self.folder, self.times = str(folder), times

    def __call__(self, stream, seed, progress):
        marks = [Path(self.folder) / f"{self.times}-{seed}-{i}" for i in range(self.times)]
        for mark in marks:
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(stream, seed, progress)


@pytest.fixture(scope="module")
def ray_of_two():
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_workers_give_the_cells_that_one_process_gives_and_a_failure_is_its_own(
    tmp_path, ray_of_two
):
    methods = {
        "good": Method("good", Recorded(), {}),
        "bad": Method("bad", Recorded(fail={1: ValueError("broke")}), {}),
    }
    shown = []
    many = run_bench(
        "tiny", methods, [0, 1], tmp_path / "many", load=load, workers=2,
        show=lambda name, seen: shown.append((name, seen)),
    )  # fmt: skip
    last = dict(shown)
    assert last == dict.fromkeys(f"{name} seed {seed}" for name in methods for seed in (0, 1))
    one = run_bench("tiny", methods, [0, 1], tmp_path / "one", load=load)
    assert many.failures == one.failures == ["bad seed 1 failed: ValueError: broke"]
    assert_same_cells(many, one)


def assert_same_cells(many, one):
    assert many.results["methods"].keys() == one.results["methods"].keys()
    for name, entry in one.results["methods"].items():
        others = many.results["methods"][name]["seeds"]
        for cell, other in zip(entry["seeds"], others, strict=True):
            assert cell["extras"] == other["extras"]
            assert cell["accuracy_matrix"] == other["accuracy_matrix"]


@pytest.mark.slow
def test_a_cell_whose_process_is_killed_is_run_once_more_and_harms_no_other(tmp_path, ray_of_two):
    methods = {
        "once": Method("once", Dies(tmp_path, 1), {}),
        "good": Method("good", Recorded(), {}),
        "twice": Method("twice", Dies(tmp_path, 2), {}),
    }
    many = run_bench(
        "tiny", methods, [0], tmp_path / "many", load=load, workers=2,
        resources={"CPU": 0.5, "memory": 1e6},
    )  # fmt: skip
    (failure,) = many.failures
    assert failure.startswith("twice seed 0 failed: WorkerCrashedError")
    whole = {name: Method(name, Recorded(), {}) for name in ("once", "good")}
    assert_same_cells(many, run_bench("tiny", whole, [0], tmp_path / "one", load=load))


@pytest.mark.slow
def test_a_cell_that_takes_more_than_there_is_is_refused(tmp_path, ray_of_two):
    methods = {"one": Method("one", Recorded(), {})}
    for resources, lacks in (({"CPU": 3}, "3 CPU, Ray has 2"), ({"GPU": 1}, "1 GPU, Ray has 0")):
        with pytest.raises(BenchError, match=f"a cell takes {lacks}"):
            run_bench("tiny", methods, [0, 1], tmp_path, load=load, workers=2, resources=resources)


def test_cells_are_shown_while_they_run_and_listened_to_when_finished(tmp_path):
    shown, heard = [], []
    methods = {"a": Method("", Recorded(), {})}
    for _ in range(2):
        run_bench(
            "tiny", methods, (0, 1), tmp_path, load=load,
            show=lambda name, seen: shown.append((name, seen and seen.text)),
            listen=lambda record: heard.append((record["method"], record["seed"])),
        )  # fmt: skip
    assert shown == [
        (f"a seed {seed}", text) for seed in (0, 1) for text in ("begins", "half", None)
    ]
    assert heard == [("a", 0), ("a", 1)] * 2  # those of before, too


@pytest.mark.slow
def test_what_is_shown_of_a_method_is_what_its_cell_keeps():
    from growmoe.continual.methods import METHODS
    from growmoe.glimpse import Onlooker

    seen = []
    stream, method = rows(), METHODS["growmoe"].again(batch_size=16, early=32)
    progress = Onlooker(seen.append)
    cell = method.run(stream, 0, progress)
    progress._next = 0.0
    progress(1.0, "at the end")
    assert seen[-1].curves["accuracy on all (%)"] == [100 * v for _, v in cell.anytime]
    assert seen[-1].curves["memory (MB)"] == pytest.approx(
        [v / 1e6 for _, v in cell.memory_history]
    )
    assert sum(seen[-1].experts.values()) >= 6  # one for each label
    assert method.run(stream, 0, lambda *_: None).anytime == cell.anytime
