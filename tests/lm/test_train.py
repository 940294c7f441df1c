"""A run: it learns, goes on exactly where it was stopped, and says what is wrong."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

import growmoe
from growmoe.lm import ByteTokenizer, Stopped, TrainConfig, TrainError, load_domains, train
from growmoe.rules import SpawnOnOverload

TINY = TrainConfig(
    d_model=16, layers=2, heads=2, experts=3, hidden=16, batch_size=4, sequence_length=16,
    steps=12, windows=4, log_every=2, evaluate_every=4, sample_length=0, device="cpu",
)  # fmt: skip


class Enough(Exception):
    """The machine fails, from the run's point of view."""


def lines(folder):
    """The log, without what the clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in found]


def fail_at(step):
    def progress(fraction, text):
        if fraction >= step / TINY.steps and text.startswith("step"):
            raise Enough

    return progress


def assert_same(run, other):
    mine, theirs = run.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
    assert [e.to_json() for e in run.events] == [e.to_json() for e in other.events]


@pytest.mark.slow
def test_it_learns_more_than_how_frequent_the_bytes_are(texts):
    config = replace(TINY, domains=texts[:1], steps=120, d_model=32, lr=1e-2, layers=1)
    run = train(config)
    (result,) = run.results["domains"].values()
    assert result["test"] < 0.8 * result["unigram"]
    assert run.bits_per_byte == {"words": result["test"]}
    losses = [line["loss"] for line in run.history if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert run.finished and run.steps == 120


@pytest.mark.parametrize("stop", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"dropout": 0.2, "save_every": 3}, marks=pytest.mark.slow),
        {"experts": 0, "curriculum": "phases"},
        pytest.param(
            {"grow": True, "organize_every": 2, "shared": 8, "schedule": "wsd", "save_every": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"paths": True, "curriculum": "phases", "save_every": 3}, marks=pytest.mark.slow
        ),
    ],
    ids=["dropout", "dense", "growing", "paths"],
)
def test_a_run_that_failed_goes_on_bit_for_bit(texts, tmp_path, options, stop):
    config = replace(TINY, domains=texts, **options)
    rules = [SpawnOnOverload(factor=1.05, min_age=1)] if config.grow else None
    whole = train(config, output=tmp_path / "whole", rules=rules)
    with pytest.raises(Enough):
        train(config, output=tmp_path / "parts", rules=rules, progress=fail_at(stop))
    parts = train(config, output=tmp_path / "parts", rules=rules)
    assert_same(whole, parts)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert whole.bits_per_byte == parts.bits_per_byte
    if config.grow:
        assert sum(event.act == "spawn" for event in whole.events) >= 2
        assert (tmp_path / "parts" / "lineage.jsonl").read_text() == (
            tmp_path / "whole" / "lineage.jsonl"
        ).read_text()


@pytest.mark.slow
def test_paths_are_born_where_the_text_changes_and_go_on_from_a_checkpoint(texts, tmp_path):
    config = replace(
        TINY, domains=texts, paths=True, curriculum="phases", lr=1e-2, batch_size=8,
        sequence_length=32, steps=160, evaluate_every=80, save_every=120,
    )  # fmt: skip
    said = []
    whole = train(config, say=said.append)
    (born,) = [event for event in whole.events if event.act == "spawn"]
    assert 80 < born.step <= 92 and any("novel text" in line for line in said)
    at_end_of_first, at_end = (
        line["bits_per_byte"] for line in whole.history[1:] if line["kind"] == "evaluation"
    )
    assert at_end["words"] < at_end_of_first["words"] + 0.15
    assert at_end["numbers"] < at_end_of_first["numbers"]
    assert whole.results["experts"] == {"layer": 2}

    def stop(fraction, text):
        if fraction >= 0.85:
            raise Enough

    with pytest.raises(Enough):
        train(config, output=tmp_path, progress=stop)
    parts = train(config, output=tmp_path)
    assert_same(whole, parts)
    assert parts.bits_per_byte == whole.bits_per_byte


def test_an_interrupt_leaves_a_checkpoint_of_the_step_it_came_in(texts, tmp_path):
    config = replace(TINY, domains=texts, save_every=1000)
    whole = train(config)

    def interrupt(fraction, text):
        if text.startswith("step") and fraction == 0.5:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        train(config, output=tmp_path, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    said = []
    run = train(config, output=tmp_path, say=said.append)
    assert said[0] == "goes on after step 6 of 12"
    assert_same(whole, run)


@pytest.mark.slow
def test_a_time_limit_stops_with_results_and_the_next_call_goes_on(texts, tmp_path):
    config = replace(TINY, domains=texts)
    part = train(replace(config, time_limit=1e-9), output=tmp_path)
    assert part.steps == 1 and not part.finished and part.results["finished"] is False
    assert set(part.bits_per_byte) == {"words", "numbers"}
    run = train(config, output=tmp_path)
    assert run.finished
    assert_same(train(config), run)


def test_a_finished_run_is_given_back_and_not_trained_again(texts, tmp_path):
    config = replace(TINY, domains=texts)
    first = train(config, output=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in first.files}
    said = []
    again = train(config, output=tmp_path, say=said.append)
    assert said == ["finished before: nothing was trained"]
    assert_same(first, again)
    assert again.results == first.results and again.files == first.files
    assert written == {path: path.stat().st_mtime_ns for path in again.files}


def test_a_folder_holds_what_its_description_says(texts, tmp_path):
    config = replace(TINY, domains=texts, sample_length=8)
    run = train(config, output=tmp_path, command="growmoe train-lm")
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {
        "config.json", "metrics.jsonl", "checkpoint.safetensors", "lineage.jsonl", "results.json",
        "table.md", "sample.txt",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["command"] == "growmoe train-lm" and config["config"]["steps"] == 12
    assert "torch" in config["versions"] and config["hardware"]["threads"] >= 1
    assert json.loads((tmp_path / "results.json").read_text()) == run.results
    assert json.loads(json.dumps(run.history)) == run.history
    kinds = [line["kind"] for line in lines(tmp_path)]
    assert kinds.count("evaluation") == 4 and kinds.count("train") == 6
    sample = (tmp_path / "sample.txt").read_text()
    assert sample.count("⟫") == 4 and "━━ words" in sample


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 13, "lr": 0.1}, "steps was 12, is 13; lr was 0.003, is 0.1"),
        ({"domains": 1}, "domains was words="),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"bytes_per_domain": 3000}, "bytes_per_domain was 4000000, is 3000"),
    ],
)
def test_another_configuration_is_refused_and_changes_nothing(texts, tmp_path, change, message):
    config = replace(TINY, domains=texts)
    train(config, output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if change == {"domains": 1}:
        change = {"domains": texts[:1]}
    with pytest.raises(TrainError) as caught:
        train(replace(config, **change), output=tmp_path)
    assert message in str(caught.value) and "choose another --output" in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_other_data_under_the_same_name_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    config = replace(TINY, domains=(f"text={path}",), steps=1)
    path.write_text("a text " * 500)
    train(config, output=tmp_path / "run")
    path.write_text("another " * 500)
    with pytest.raises(TrainError, match="data text was"):
        train(config, output=tmp_path / "run")


def test_a_folder_of_something_else_and_a_torn_checkpoint_are_refused(texts, tmp_path):
    config = replace(TINY, domains=texts, steps=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(TrainError, match="is not empty and holds no run"):
        train(config, output=tmp_path / "other")
    train(config, output=tmp_path / "run")
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainError, match=r"torn.*delete it to begin anew"):
        train(config, output=tmp_path / "run")


def test_the_parts_of_a_benchmark_can_be_given(texts):
    domains = load_domains(texts, 20_000)
    config = replace(TINY, steps=2)
    model = growmoe.models.TransformerLM(
        256, 16, 1, 2, d_hidden=8, num_experts=4, router=growmoe.TopK(1), seed=3
    )
    run = train(config, domains=domains, model=model)
    assert run.model is model and set(run.bits_per_byte) == set(domains)
    assert run.results["experts"] == {"blocks.0.feed_forward": 4}


def test_a_run_leaves_the_global_random_state_alone(texts):
    before = torch.get_rng_state()
    train(replace(TINY, domains=texts, dropout=0.5, steps=2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_does_not(texts):
    first, again, other = (
        train(replace(TINY, domains=texts, dropout=0.1, seed=seed)) for seed in (0, 0, 1)
    )
    assert_same(first, again)
    assert first.bits_per_byte != other.bits_per_byte


def test_bfloat16_and_a_tokenizer_of_ones_own(texts):
    class Words:
        """A token is one of the 64 characters after the space."""

        vocab_size = 64

        def encode(self, text):
            return [ord(c) % 64 for c in text]

        def decode(self, ids):
            return "".join(chr(32 + i) for i in ids)

    run = train(replace(TINY, domains=texts, precision="bfloat16", steps=2), tokenizer=Words())
    assert run.model.vocab_size == 64
    assert all(5 < bits < 7 for bits in run.bits_per_byte.values())


@pytest.mark.slow
def test_a_tokenizer_json_is_read(texts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[UNK]", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([texts[0].partition("=")[2]], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    config = replace(
        TINY, domains=texts[:1], tokenizer=str(tmp_path / "tokenizer.json"), steps=60, lr=1e-2
    )
    run = train(config, output=tmp_path / "run")
    (bits,) = run.bits_per_byte.values()
    bytewise = train(replace(config, tokenizer=None)).bits_per_byte["words"]
    assert bits < bytewise  # a token is a word, so as many tokens hold more text
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TrainError, match="tokenizer: cannot read"):
        train(config)


def test_bytes_survive_the_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve ⟫")) == "naïve ⟫"


def test_a_run_that_diverges_says_so(texts):
    with pytest.raises(TrainError, match=r"not finite at step .*lower lr"):
        train(replace(TINY, domains=texts, lr=1e30, warmup=0, steps=20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"lr": float("nan")}, "lr must be a number >= 0, got nan"),
        ({"schedule": "cosinus"}, "schedule must be one of cosine, wsd, constant, got 'cosinus'"),
        ({"domains": "python"}, "domains must be a tuple, got 'python'"),
        ({"domains": ()}, "there must be at least one"),
        ({"weights": (1.0,)}, "one number >= 0 for each of 2 domains"),
        ({"weights": (0.0, 0.0)}, "not all 0"),
        ({"weights": (1, 2), "curriculum": "phases"}, "curriculum='phases' does not"),
        ({"grow": True, "experts": 0}, "grow needs experts"),
        ({"grow": True, "experts": 8, "max_experts": 2}, "each layer begins with 8"),
        ({"rules": ("PruneIdle",)}, "rules are given, but grow is not"),
        ({"grow": True, "rules": ("PruneIdel",)}, "no rule 'PruneIdel': choose from"),
        ({"grow": True, "paths": True}, "paths grow by themselves"),
        ({"paths": True, "dropout": 0.1}, "paths take no dropout"),
        ({"paths": True, "heads": 3}, "num_heads"),
        ({"router": "topq"}, "no router 'topq': did you mean topk?"),
        ({"k": 4}, "TopK"),
        ({"heads": 3}, "num_heads"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"sequence_length": 10**6}, "its train part has"),
        ({"device": "gpu"}, "device 'gpu' is not to be had"),
        ({"tokenizer": "nowhere.json"}, "tokenizer"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(texts, tmp_path, options, message):
    with pytest.raises(TrainError) as caught:
        train(replace(TINY, **{"domains": texts, **options}), output=tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_losses_bits_and_loads(texts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from growmoe.report.board import Board

    board = Board(tmp_path / "run" / "tensorboard")
    train(replace(TINY, domains=texts), output=tmp_path / "run", listen=board.line)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "lr"} <= set(events.Tags()["scalars"])
    assert any(name.startswith("bits_per_byte/") for name in events.Tags()["scalars"])
    assert any(name.startswith("load/") for name in events.Tags()["histograms"])


def test_rules_for_a_model_that_does_not_grow_are_refused():
    with pytest.raises(TrainError, match="rules are given, but"):
        train(TrainConfig(steps=1), rules=[growmoe.rules.PruneIdle()])
