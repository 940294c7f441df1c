"""The command `growmoe train-lm`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from growmoe.console import command_line, print_written, printer, table
from growmoe.lm.config import Curriculum, Precision, Schedule, TrainConfig, TrainError
from growmoe.lm.follow import Follower
from growmoe.lm.run import HEADINGS, table_rows
from growmoe.lm.sources import EMBEDDED, name_of
from growmoe.lm.train import DEFAULT_RULES, Run, train
from growmoe.report.terminal import live_view

_DATA, _MODEL, _TRAINING, _GROWTH, _RUN = "Data", "Model", "Training", "Growth", "Run"


def _option(panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **settings)


def train_lm(
    domains: Annotated[
        str,
        _option(
            _DATA,
            "With commas between: "
            + "; ".join(f"{n}: {s.description}" for n, s in EMBEDDED.items()),
            show_default="all, without --text",
        ),
    ] = "",
    text: Annotated[
        list[str] | None,
        _option(
            _DATA,
            "A file, a folder or a pattern as a domain of its own; may be given several times.",
            metavar="[NAME=]PATH",
        ),
    ] = None,
    bytes_per_domain: Annotated[
        int, _option(_DATA, "The most that is read of each.")
    ] = TrainConfig.bytes_per_domain,
    tokenizer: Annotated[
        Path | None,
        _option(_DATA, "A Hugging Face tokenizer.json.", show_default="bytes", metavar="FILE"),
    ] = None,
    curriculum: Annotated[
        str, _option(_DATA, "mixed, or phases: one domain after the other.")
    ] = TrainConfig.curriculum,
    weights: Annotated[
        str, _option(_DATA, "A number for each domain, with commas.", show_default="equal")
    ] = "",
    d_model: Annotated[int, _option(_MODEL, "Width of the model.")] = TrainConfig.d_model,
    layers: Annotated[int, _option(_MODEL, "How many blocks.")] = TrainConfig.layers,
    heads: Annotated[int, _option(_MODEL, "Heads of attention.")] = TrainConfig.heads,
    hidden: Annotated[
        int | None, _option(_MODEL, "Width of an expert.", show_default="as d-model")
    ] = None,
    experts: Annotated[
        int, _option(_MODEL, "Experts per layer; 0: a dense model of the same cost.")
    ] = TrainConfig.experts,
    router: Annotated[str, _option(_MODEL, "How tokens choose.")] = TrainConfig.router,
    k: Annotated[int, _option(_MODEL, "Experts per token.")] = TrainConfig.k,
    shared: Annotated[
        int, _option(_MODEL, "Width of an expert that sees every token.")
    ] = TrainConfig.shared,
    dropout: Annotated[float, _option(_MODEL, "Of the transformer.")] = TrainConfig.dropout,
    balance_loss: Annotated[
        float | None,
        _option(_MODEL, "Coefficient of the balance loss.", show_default="as the router needs"),
    ] = None,
    z_loss: Annotated[
        float, _option(_MODEL, "Coefficient of the router z-loss.")
    ] = TrainConfig.z_loss,
    steps: Annotated[int, _option(_TRAINING, "Optimizer steps.")] = TrainConfig.steps,
    batch_size: Annotated[int, _option(_TRAINING, "Sequences per step.")] = TrainConfig.batch_size,
    sequence_length: Annotated[
        int, _option(_TRAINING, "Tokens per sequence.")
    ] = TrainConfig.sequence_length,
    lr: Annotated[float, _option(_TRAINING, "Highest learning rate.")] = TrainConfig.lr,
    schedule: Annotated[
        str, _option(_TRAINING, "cosine, wsd or constant, after the warm-up.")
    ] = TrainConfig.schedule,
    warmup: Annotated[
        int | None,
        _option(_TRAINING, "Steps over which the rate rises.", show_default="a 20th of the steps"),
    ] = None,
    weight_decay: Annotated[
        float, _option(_TRAINING, "Of matrices alone.")
    ] = TrainConfig.weight_decay,
    clip: Annotated[
        float, _option(_TRAINING, "Largest norm of the gradient; 0: any.")
    ] = TrainConfig.clip,
    precision: Annotated[str, _option(_TRAINING, "float32 or bfloat16.")] = TrainConfig.precision,
    grow: Annotated[
        bool, _option(_GROWTH, "Let experts be born, merged and removed.")
    ] = TrainConfig.grow,
    rules: Annotated[
        str,
        _option(
            _GROWTH,
            "Names of growmoe.rules, with commas.",
            show_default=", ".join(DEFAULT_RULES),
        ),
    ] = "",
    paths: Annotated[
        bool,
        _option(
            _GROWTH,
            "Grow a path, as large as a dense model, for each new kind of text: it forgets none.",
        ),
    ] = TrainConfig.paths,
    max_experts: Annotated[
        int, _option(_GROWTH, "The most in a layer, or of paths.")
    ] = TrainConfig.max_experts,
    organize_every: Annotated[
        int, _option(_GROWTH, "Steps between decisions.")
    ] = TrainConfig.organize_every,
    output: Annotated[Path, _option(_RUN, "A folder for the run.")] = Path("runs/lm"),
    seed: Annotated[int, _option(_RUN, "Decides weights and batches.")] = TrainConfig.seed,
    evaluate_every: Annotated[
        int | None, _option(_RUN, "Steps between evaluations.", show_default="a 10th of the steps")
    ] = None,
    windows: Annotated[
        int, _option(_RUN, "Sequences per domain in an evaluation.")
    ] = TrainConfig.windows,
    log_every: Annotated[
        int, _option(_RUN, "Steps between lines of the log.")
    ] = TrainConfig.log_every,
    save_every: Annotated[
        int | None, _option(_RUN, "Steps between checkpoints.", show_default="as evaluate-every")
    ] = None,
    sample_length: Annotated[
        int, _option(_RUN, "Tokens drawn for each domain in sample.txt.")
    ] = TrainConfig.sample_length,
    time_limit: Annotated[
        float, _option(_RUN, "Seconds after which to stop; 0: none.")
    ] = TrainConfig.time_limit,
    device: Annotated[str, _option(_RUN, "cpu, cuda or auto.")] = TrainConfig.device,
    workers: Annotated[
        int, _option(_RUN, "Workers on Ray to share the experts out among; 0: none.", min=0)
    ] = 0,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            rich_help_panel=_RUN,
            help="Also scalars and histograms for TensorBoard, as the run goes on.",
        ),
    ] = False,
) -> None:
    """Train a small mixture-of-experts language model on text."""
    config = TrainConfig(
        domains=_domains(domains, text or []),
        bytes_per_domain=bytes_per_domain,
        tokenizer=None if tokenizer is None else str(tokenizer),
        curriculum=cast(Curriculum, curriculum),
        weights=_numbers(weights),
        d_model=d_model,
        layers=layers,
        heads=heads,
        hidden=hidden,
        experts=experts,
        router=router,
        k=k,
        shared=shared,
        dropout=dropout,
        balance_loss=balance_loss,
        z_loss=z_loss,
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        lr=lr,
        schedule=cast(Schedule, schedule),
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        grow=grow,
        rules=_names(rules),
        paths=paths,
        max_experts=max_experts,
        organize_every=organize_every,
        evaluate_every=evaluate_every,
        windows=windows,
        log_every=log_every,
        save_every=save_every,
        sample_length=sample_length,
        time_limit=time_limit,
        precision=cast(Precision, precision),
        device=device,
        seed=seed,
    )
    board = None
    if tensorboard:
        from growmoe.report.board import Board

        board = Board(output / "tensorboard")
    with live_view(Console(stderr=True), f"train-lm {output}") as view:
        follower = Follower(config, partial(view.show, ""))

        def listen(line: Mapping[str, Any]) -> None:
            follower.line(line)
            if board is not None:
                board.line(line)

        if workers:
            from growmoe.lm.workers import train_on_workers

            run = train_on_workers(
                config,
                workers,
                output=output,
                command=command_line(),
                progress=view.progress,
                say=view.say,
                listen=listen,
                lived=follower.lived,
            )
        else:
            run = train(
                config,
                output=output,
                command=command_line(),
                progress=view.progress,
                say=view.say,
                listen=listen,
                happened=follower.happened if view.moving else None,
            )
    _print(run, printer())
    print_written([*run.files, *[output / "tensorboard"] * tensorboard])


def _domains(names: str, text: list[str]) -> tuple[str, ...]:
    own = tuple("=".join(name_of(argument)) for argument in text)
    if not names and own:
        return own
    return (_names(names) if names else TrainConfig.domains) + own


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in _names(text))
    except ValueError:
        raise TrainError(f"weights must be numbers with commas between, got {text!r}") from None


def _print(run: Run, console: Console) -> None:
    results = run.results
    drawn = table(*HEADINGS)
    for row in table_rows(results):
        drawn.add_row(*row)
    console.print(drawn)
    active = results.get("active_parameters", results["parameters"])
    print(
        "bits per byte; unigram: of token frequencies alone\n"
        f"{results['parameters']:,} parameters, {active:,} active per token, "
        f"{sum(results['experts'].values())} experts\n"
        f"{results['tokens']:,} tokens in {results['seconds']:.0f} s of training"
    )
    if not run.finished:
        print(f"step {run.steps} of {run.config.steps}: the same command goes on from here")
