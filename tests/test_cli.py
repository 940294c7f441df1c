"""The command line: one line for a mistake, plain text in a pipe, 80 columns."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("typer")

from growmoe import cli
from growmoe.continual.bench import BenchError
from growmoe.continual.cell import Cell, Memory
from growmoe.continual.methods import METHODS, Method, controls
from growmoe.continual.streams import STREAMS


def good(stream, seed, progress):
    count = stream.num_experiences
    matrix = [[0.8 if j <= i else 0.0 for j in range(count)] for i in range(count)]
    return Cell(matrix, 1.0, 10, Memory(model=40))


def bad(stream, seed, progress):
    raise RuntimeError("it broke")


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(METHODS, "good", Method("always 80%", good, {"a": 1}))
    monkeypatch.setitem(METHODS, "bad", Method("always fails", bad, {"a": 1}))

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        assert "Traceback" not in err
        return stopped.value.code, out, err

    return call


def test_bench_prints_the_table_and_where_the_files_are(run, tmp_path):
    code, out, err = run(
        "bench", "split-digits", "--methods", "good", "--seeds", 2, "--output", tmp_path / "o"
    )
    assert code == 0
    assert "good" in out and "80.0±0.0" in out and "results.json" in out
    assert "good seed 1: final accuracy 80.0%" in err
    table = out.split("written:")[0]
    assert max(map(len, table.splitlines())) <= 80
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [cell["seed"] for cell in results["methods"]["good"]["seeds"]] == [0, 1]


def test_bench_writes_each_finished_cell_for_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    run("bench", "split-digits", "--methods", "good", "--output", tmp_path)
    command = ["bench", "split-digits", "--methods", "good", "--seeds", 2, "--output", tmp_path]
    code, out, _ = run(*command, "--tensorboard")
    assert code == 0 and f"  {tmp_path / 'tensorboard'}\n" in out
    found = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert found == ["good-seed0", "good-seed1"]  # that of before, too


@pytest.mark.parametrize("command", [["bench", "split-digits", "--methods", "good"], ["train-lm"]])
def test_without_tensorboard_nothing_is_run_and_the_extra_is_named(
    run, tmp_path, monkeypatch, command
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, out, err = run(*command, "--tensorboard", "--output", tmp_path / "o")
    assert code == 2 and out == "" and "pip install 'growmoe[report]'" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "o").exists()


def test_the_first_seed_can_be_chosen(run, tmp_path):
    run("bench", "split-digits", "--methods", "good", "--first-seed", 5, "--output", tmp_path)
    assert (tmp_path / "cells" / "good-seed5.json").exists()


def test_a_failed_cell_gives_exit_code_1_after_the_table(run, tmp_path):
    code, out, err = run("bench", "split-digits", "--methods", "bad,good", "--output", tmp_path)
    assert code == 1
    assert "80.0" in out
    assert "growmoe: bad seed 0 failed: RuntimeError: it broke" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "split-digit"], "no stream 'split-digit': did you mean split-digits"),
        (["bench", "split-digits", "--methods", "repaly"], "did you mean replay"),
        (["bench", "split-digits", "--methods", "zzz"], "choose from growmoe, naive"),
        (["bench", "split-digits", "--seeds", "0"], "--seeds"),
        (["bench", "split-digits", "--seeds", "many"], "--seeds"),
        (["bench"], "name a STREAM, as split-digits"),
        (["bench", "split-digits", "--suite", "paper"], "leave out 'split-digits' or --suite"),
        (["banch"], "banch"),
        (["bench", "split-mnist", "--methods", "good", "--data-dir", "DATA"], "magic number"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, arguments, message):
    for kind in ("train", "t10k"):
        (tmp_path / f"{kind}-images-idx3-ubyte").write_bytes(b"nonsense, not an IDX file")
        (tmp_path / f"{kind}-labels-idx1-ubyte").write_bytes(b"nonsense, not an IDX file")
    arguments = [str(tmp_path) if a == "DATA" else a for a in arguments]
    if arguments[0] == "bench" and len(arguments) > 1:
        arguments += ["--output", tmp_path / "out"]
    code, out, err = run(*arguments)
    assert code == 2 and message in err and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("growmoe: ")


def test_a_folder_of_another_stream_is_one_line(run, tmp_path):
    run("bench", "split-digits", "--methods", "good", "--output", tmp_path)
    path = tmp_path / "cells" / "good-seed0.json"
    from growmoe.continual import store

    record = store.read_cell(path)
    record["stream"] = "split-mnist"
    record["checksum"] = store._checksum(record)
    path.write_text(json.dumps(record))
    code, _, err = run("bench", "split-digits", "--methods", "good", "--output", tmp_path)
    assert code == 2 and "holds a bench of split-mnist" in err and len(err.splitlines()) == 1


def test_controls_and_online_are_added_to_what_is_chosen(run, tmp_path, monkeypatch):
    chosen = {}

    def bench(stream, methods, seeds, output, *rest, **how):
        chosen.update(methods)
        raise BenchError("enough")

    monkeypatch.setattr("growmoe.cli.run_bench", bench)
    run("bench", "split-digits", "--methods", "good", "--controls", "--online", 7)
    assert list(chosen) == ["good", *controls()]
    assert {chosen[name].settings["batch_size"] for name in controls()} == {7}


def test_streams_and_methods_are_listed_in_80_columns(run):
    for command, known in (("streams", STREAMS), ("methods", METHODS | controls())):
        code, out, _ = run(command)
        assert code == 0
        lines = out.splitlines()
        assert [line.split()[0] for line in lines] == list(known)
        assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], []])
def test_help_fits_80_columns(run, arguments):
    code, out, err = run(*arguments)
    assert code in (0, 2) and "bench" in out + err
    assert max(map(len, (out + err).splitlines())) <= 80


def test_the_version_is_one_line(run):
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("growmoe ") and out.count("\n") == 1


@pytest.mark.slow
def test_the_module_runs_and_gives_its_version():
    found = subprocess.run(
        [sys.executable, "-m", "growmoe", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "TERM": "dumb"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("growmoe ")


@pytest.mark.slow
def test_a_missing_package_is_one_line_that_names_the_extra():
    code = (
        "import sys; sys.modules['typer'] = None; "
        "from growmoe.__main__ import main; sys.argv = ['growmoe']; main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert "pip install 'growmoe[continual]'" in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.slow
def test_real_methods_run_from_the_command_line(tmp_path):
    command = ["bench", "split-digits", "--methods", "naive,ridge", "--output", str(tmp_path)]
    found = subprocess.run(
        [sys.executable, "-m", "growmoe", *command], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "Warning" not in found.stdout + found.stderr
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert methods["naive"]["final_accuracy"]["mean"] < 0.3
    assert methods["ridge"]["final_accuracy"]["mean"] > 0.9


_TINY_LM = (
    "train-lm --steps 6 --d-model 16 --layers 1 --heads 2 --hidden 16 --experts 3 --batch-size 4 "
    "--sequence-length 16 --windows 4 --evaluate-every 3 --sample-length 8 --device cpu"
)
TINY_LM = _TINY_LM.split()


@pytest.fixture
def poems(tmp_path):
    path = tmp_path / "poems.txt"
    path.write_text("".join(f"line {i} of a poem\n" for i in range(500)))
    return path


def test_train_lm_prints_the_table_and_goes_on_with_the_same_command(run, poems, tmp_path):
    command = [*TINY_LM, "--text", poems, "--output", tmp_path / "run"]
    code, out, err = run(*command)
    assert code == 0
    assert "poems" in out and "bits per byte" in out and "results.json" in out
    assert max(map(len, out.split("written:")[0].splitlines())) <= 80
    assert "step 3/6: poems" in err and "step 6/6: poems" in err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["domains"]) == ["poems"] and results["steps"] == 6
    code, again, err = run(*command)
    assert code == 0 and again == out and err == "finished before: nothing was trained\n"


def test_train_lm_grows_on_embedded_text(run, tmp_path):
    command = [*TINY_LM, "--domains", "english,python", "--bytes-per-domain", 20_000, "--grow"]
    command += ["--rules", "PruneIdle,SpawnOnNovelty", "--output", tmp_path / "run"]
    code, out, _ = run(*command)
    assert code == 0 and "english" in out and "python" in out and "cpp" not in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["grow"] and config["rules"] == ["PruneIdle", "SpawnOnNovelty"]


def test_train_lm_grows_paths_on_one_text_after_the_other(run, tmp_path):
    command = [*TINY_LM, "--domains", "english,python", "--bytes-per-domain", 20_000, "--paths"]
    code, out, _ = run(*command, "--curriculum", "phases", "--output", tmp_path / "run")
    assert code == 0 and "1 experts" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["experts"] == {"layer": 1}
    assert "english: given before" in (tmp_path / "run" / "sample.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domains", "pyton"], "did you mean python"),
        (["--router", "topq"], "did you mean topk"),
        (["--k", "4"], "TopK"),
        (["--heads", "3"], "heads"),
        (["--steps", "0"], "steps must be an integer >= 1"),
        (["--steps", "many"], "--steps"),
        (["--curriculum", "shuffled"], "one of mixed, phases"),
        (["--weights", "1,x"], "weights must be numbers"),
        (["--weights", "1,2"], "for each of 1 domains"),
        (["--text", "nowhere"], "no text at nowhere"),
        (["--rules", "PruneIdle"], "rules are given"),
        (["--sequence-length", "100000"], "sequence_length=100000"),
        (["--strange"], "--strange"),
    ],
)
def test_a_mistake_in_train_lm_is_one_line_and_exit_code_2(
    run, poems, tmp_path, arguments, message
):
    command = [*TINY_LM, "--text", poems, "--output", tmp_path / "run", *arguments]
    code, out, err = run(*command)
    assert code == 2 and message in err and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("growmoe: ")
    assert not (tmp_path / "run").exists()


def test_another_configuration_of_train_lm_is_refused_with_what_differs(run, poems, tmp_path):
    command = [*TINY_LM, "--text", poems, "--output", tmp_path / "run"]
    run(*command)
    code, _, err = run(*command, "--lr", "0.1")
    assert code == 2 and "lr was 0.003, is 0.1" in err and len(err.splitlines()) == 1


def test_help_of_train_lm_fits_80_columns(run):
    code, out, _ = run("train-lm", "--help")
    assert code == 0 and "--sequence-length" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
def test_a_bench_on_workers_that_is_killed_leaves_nothing_behind_and_goes_on(tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("avalanche")
    psutil = pytest.importorskip("psutil")
    mark, cells = str(tmp_path), tmp_path / "out" / "cells"
    command = [
        sys.executable, "-m", "growmoe", "bench", "split-digits", "--methods", "ridge,naive",
        "--seeds", "3", "--workers", "2", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "GROWMOE_MARK": mark, "RAY_worker_niceness": "0"}

    def left():
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("GROWMOE_MARK") == mark:
                    found.append(process.name())
        return found

    def wait(until, seconds):
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            time.sleep(0.05)
        assert until(), left()

    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait(lambda: len(list(cells.glob("*.json"))) >= 2 or driver.poll() is not None, 120)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    wait(lambda: not left(), 60)  # Ray's processes end with the driver
    before = {path.name: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 2 <= len(before) < 6
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert len(after) == 6 and before.items() <= after.items()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_every_command_prints_is_plain_in_a_pipe_and_fits_80_columns(poems, tmp_path):
    run, small, bench = (str(tmp_path / name) for name in ("run", "small", "bench"))
    commands = [
        [*TINY_LM, "--grow", "--organize-every", "2", "--text", str(poems), "--output", run],
        ["inspect", run],
        ["prune", run, "--ratio", "0.3", "--samples", "4", "--output", small],
        ["bench", "split-digits", "--methods", "ridge", "--output", bench],
        ["streams"],
        ["methods"],
    ]
    code = (
        "import contextlib; from growmoe import cli\n"
        f"for command in {commands!r}:\n"
        "    with contextlib.suppress(SystemExit): cli.main(command)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert all(os.path.isdir(folder) for folder in (run, small, bench))
    assert not set("\x1b\r\b") & set(found.stdout + found.stderr)
    lines = [line for line in found.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines + found.stderr.splitlines())) <= 80
    assert "growmoe:" not in found.stderr


@pytest.mark.slow
def test_train_lm_stopped_by_a_signal_goes_on(poems, tmp_path):
    command = [sys.executable, "-m", "growmoe", *TINY_LM, "--text", str(poems)]
    command += ["--steps", "100000", "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "step 0/100000" in process.stderr.readline()
    assert "step 3/100000" in process.stderr.readline()
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on from here" in err
    assert "Traceback" not in err
    again = subprocess.run(
        [*command, "--time-limit", "0.1"], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and "goes on after step" in again.stderr
    assert "the same command goes on from here" in again.stdout


@pytest.mark.parametrize("text", ["CPU", "CPU=", "CPU=x", "CPU=-1", "GPU=nan", "=2", "CPU=1=2"])
def test_resources_that_say_nothing_are_one_line(run, tmp_path, text):
    code, _, err = run("bench", "split-digits", "--resources", text, "--output", tmp_path)
    assert code == 2 and "--resources must be like CPU=2,GPU=0.5" in err
