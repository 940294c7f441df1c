"""The commands `growmoe prune`, `merge` and `inspect`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from growmoe.compress.act import act_on
from growmoe.compress.api import inspect
from growmoe.compress.choose import Progress
from growmoe.compress.criteria import CRITERIA
from growmoe.compress.layer import CompressError
from growmoe.compress.measure import Change
from growmoe.compress.merging import METHODS
from growmoe.compress.options import Options
from growmoe.compress.output import writing
from growmoe.compress.plan import PerLayer
from growmoe.compress.report import Inspection, Report
from growmoe.compress.runs import is_hugging_face, load_run, save_run, texts_of
from growmoe.console import command_line, print_written, printer, progress_bar, say_plainly, table

_BUDGET, _CHOICE, _DATA, _AFTER = "Budget", "Choice", "Data", "Afterwards"


def _option(panel: str, help: str, **settings: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, **settings)


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A run of growmoe train-lm, its checkpoint, or a Hugging Face folder."
    ),
]
Output = Annotated[Path, typer.Option(help="A new folder for the model and the report.")]
Ratio = Annotated[float | None, _option(_BUDGET, "The share of experts that goes.")]
Keep = Annotated[int | None, _option(_BUDGET, "How many experts a layer keeps.")]
Calibration = Annotated[
    Path | None,
    _option(
        _DATA,
        "A text, or .jsonl with a field text.",
        metavar="FILE",
        show_default="a run's own training text",
    ),
]
Evaluation = Annotated[
    list[str] | None,
    typer.Option(
        "--eval",
        rich_help_panel=_DATA,
        help="A text to measure on; several times for several domains.",
        metavar="[NAME=]FILE",
        show_default="a run's own test texts",
    ),
]
Samples = Annotated[int, _option(_DATA, "Sequences of calibration.")]
Length = Annotated[
    int | None, _option(_DATA, "Tokens per sequence.", show_default="as in training")
]
BatchSize = Annotated[int, _option(_DATA, "Sequences at a time.")]
Match = Annotated[
    bool, _option(_AFTER, "Fit the survivors to what the whole layers gave, by least squares.")
]
Recover = Annotated[int, _option(_AFTER, "Steps of training of all parameters.")]
RouterSteps = Annotated[
    int, _option(_AFTER, "Steps of the routers alone before them, distilling the whole model.")
]
Control = Annotated[
    bool, _option(_AFTER, "Train the whole model as long and compare with that, not with its past.")
]
Seed = Annotated[int, typer.Option(help="Decides the samples, and what goes by `random`.")]
Streaming = Annotated[
    bool | None,
    _option(
        _DATA,
        "Read a Hugging Face folder tensor by tensor, or whole.",
        show_default="as memory allows",
    ),
]
Own = Annotated[
    bool,
    typer.Option(
        "--own-format",
        help="Write what transformers cannot load, in a form that growmoe.hf.load can.",
    ),
]


def prune_command(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    keep: Keep = None,
    max_loss: Annotated[
        float | None, _option(_BUDGET, "The most that the mean loss may rise, in nats per token.")
    ] = None,
    saliency: Annotated[str, _option(_CHOICE, "One of " + ", ".join(CRITERIA) + ".")] = "reap",
    per_layer: Annotated[
        str,
        _option(
            _CHOICE,
            "uniform: as many from each layer; global: one threshold; searched: by the loss.",
        ),
    ] = "uniform",
    guard: Annotated[bool, _option(_CHOICE, "Never remove super experts.")] = True,
    reference: Annotated[
        Path | None, _option(_CHOICE, "The model before fine-tuning, for router-norm.")
    ] = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    samples: Samples = Options.samples,
    sequence_length: Length = None,
    batch_size: BatchSize = Options.batch_size,
    match: Match = False,
    recover: Recover = 0,
    router_steps: RouterSteps = 0,
    control: Control = True,
    streaming: Streaming = None,
    own_format: Own = False,
    seed: Seed = 0,
) -> None:
    """Remove the experts of a trained model that matter least."""
    run_command(
        Options(
            act="prune",
            model=model,
            output=output,
            ratio=ratio,
            keep=keep,
            max_loss=max_loss,
            saliency=saliency,
            per_layer=cast(PerLayer, per_layer),
            guard=guard,
            reference=reference,
            calibration=calibration,
            evaluation=_named(evaluation),
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            match=match,
            recover=recover,
            router_steps=router_steps,
            control=control,
            streaming=streaming,
            trust=own_format,
            seed=seed,
            command=command_line(),
        )
    )


def merge_command(
    model: Model,
    output: Output,
    ratio: Ratio = None,
    keep: Keep = None,
    method: Annotated[str, _option(_CHOICE, "One of " + ", ".join(METHODS) + ".")] = Options.method,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    samples: Samples = Options.samples,
    sequence_length: Length = None,
    batch_size: BatchSize = Options.batch_size,
    match: Match = False,
    recover: Recover = 0,
    router_steps: RouterSteps = 0,
    control: Control = True,
    own_format: Own = False,
    seed: Seed = 0,
) -> None:
    """Merge the experts of a trained model into fewer."""
    run_command(
        Options(
            act="merge",
            model=model,
            output=output,
            ratio=ratio,
            keep=keep,
            method=method,
            calibration=calibration,
            evaluation=_named(evaluation),
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            match=match,
            recover=recover,
            router_steps=router_steps,
            control=control,
            trust=own_format,
            seed=seed,
            command=command_line(),
        )
    )


def inspect_command(
    model: Model,
    output: Annotated[
        Path | None, typer.Option(help="A new folder for inspect.json and a picture.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = Options.samples,
    sequence_length: Length = None,
    batch_size: BatchSize = Options.batch_size,
    seed: Seed = 0,
) -> None:
    """Show the layers and experts of a trained model: load, saliency, similarity."""
    options = Options(
        act="inspect",
        model=model,
        output=output,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    with progress_bar(Console(stderr=True)) as (progress, say):
        if is_hugging_face(options.model):
            from growmoe.hf import command as hf

            found = hf.inspect_folder(options, progress, say)
        else:
            run = load_run(options.model)
            found = inspect(
                run.model, texts_of(run, options).calibration, seed=seed, progress=progress
            )
    print_inspection(found, printer())
    if output is not None:
        with writing(output) as folder:
            files = found.write(folder)
        print_written(output / path.name for path in files)


def run_command(options: Options) -> None:
    """Do what was asked for, and tell."""
    with progress_bar(Console(stderr=True)) as (progress, say):
        if is_hugging_face(options.model):
            from growmoe.hf import command as hf

            act = hf.prune_folder if options.act == "prune" else hf.merge_folder
            report = act(options, progress, say)
        else:
            report = compress_run(options, progress, say)
    print_report(report, printer())
    assert options.output is not None
    print_written(sorted(options.output.iterdir()))


def compress_run(options: Options, progress: Progress, say: Any) -> Report:
    """Prune or merge a run of growmoe's into a new folder.

    Raises:
        CompressError: it cannot be done; there is no new folder then.
    """
    assert options.output is not None
    clock = time.perf_counter()
    progress(0.0, "reading")
    run = load_run(options.model)
    texts = texts_of(run, options)
    reference = None if options.reference is None else load_run(options.reference).model
    with writing(options.output) as folder:
        report = act_on(run.model, texts, options, reference, progress, say)
        report.model = {"path": str(options.model), "kind": "growmoe", "command": options.command}
        report.seconds = time.perf_counter() - clock
        save_run(run, folder, report.to_json()["settings"] | {"act": report.act})
        report.write(folder)
    return report


def print_report(report: Report, console: Console) -> None:
    drawn = table("domain", "before", "after", "change", "95% interval", "samples")
    for name, change in report.domains.items():
        drawn.add_row(name, *_cells(change))
    for label, found in (report.recovery or {}).get("tables", {}).items():
        drawn.add_section()
        drawn.add_row(f"{label}:")
        for name, change in found.items():
            drawn.add_row(name, *_cells(Change(**change)))
    console.print(drawn)
    share = 1 - report.experts_after / report.experts_before
    for line in (
        "nats per token",
        f"{report.experts_before} experts -> {report.experts_after} ({share:.1%} fewer), "
        f"{report.parameters_before:,} parameters -> {report.parameters_after:,}",
        f"{report.seconds:.0f} s, at most {report.peak_memory / 2**20:,.0f} MiB of memory",
    ):
        say_plainly(console, line)
    for layer in report.layers:
        went = ", ".join(map(str, sorted(layer.removed))) if layer.removed else ""
        joined = ", ".join("+".join(map(str, group)) for group in layer.merged)
        what = f"removed {went}" if went else f"merged {joined}" if joined else "nothing went"
        counts = f"{layer.experts_before} -> {layer.experts_after}"
        say_plainly(console, f"{layer.name}: {counts}: {what}")


def _cells(change: Change) -> list[str]:
    bounds = f"[{change.low:+.4f}, {change.high:+.4f}]" if change.samples > 1 else "-"
    return [
        f"{change.before:.4f}",
        f"{change.after:.4f}",
        f"{change.change:+.4f}",
        bounds,
        str(change.samples),
    ]


def print_inspection(found: Inspection, console: Console) -> None:
    for layer in found.layers:
        console.print(
            f"{layer['name']}: {len(layer['ids'])} experts, {layer['k']} or more per token, "
            f"{layer['parameters']:,} parameters each",
            highlight=False,
        )
        names = list(layer["saliency"])
        drawn = table("expert", "load", *names, "most like", "cosine")
        for e, id in enumerate(layer["ids"]):
            cells = [str(id), "-" if layer["load"] is None else f"{layer['load'][e]:.2%}"]
            cells += [f"{layer['saliency'][name][e]:.4g}" for name in names]
            if layer["similarity"] is None or len(layer["ids"]) < 2:
                cells += ["-", "-"]
            else:
                row = [(v, o) for o, v in enumerate(layer["similarity"][e]) if o != e]
                value, other = max(row)
                cells += [str(layer["ids"][other]), f"{value:.2f}"]
            drawn.add_row(*cells)
        console.print(drawn)


def _named(evaluation: list[str] | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for argument in evaluation or []:
        name, equals, path = argument.partition("=")
        key, place = (name, path) if equals and name else (Path(argument).stem, argument)
        if key in found:
            raise CompressError(f"two texts to evaluate on are called {key!r}: name one NAME=FILE")
        found[key] = Path(place)
    return found
