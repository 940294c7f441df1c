"""The command line: learning streams, training language models, and pruning what was trained."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from growmoe.continual import require

require("typer")
require("rich")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from growmoe.compress.command import inspect_command, merge_command, prune_command  # noqa: E402
from growmoe.compress.layer import CompressError  # noqa: E402
from growmoe.console import command_line, print_written, printer  # noqa: E402
from growmoe.continual.bench import BenchError, Outcome, run_bench  # noqa: E402
from growmoe.continual.methods import METHODS, Method  # noqa: E402
from growmoe.continual.methods import controls as growmoe_controls  # noqa: E402
from growmoe.continual.methods import online as run_online  # noqa: E402
from growmoe.continual.store import write_atomically  # noqa: E402
from growmoe.continual.streams import STREAMS, DataError, Options, full_name, nearest  # noqa: E402
from growmoe.continual.suite import SUITES, judge, read_targets, targets_table  # noqa: E402
from growmoe.continual.table import print_table  # noqa: E402
from growmoe.lm import TrainError  # noqa: E402
from growmoe.lm.command import train_lm  # noqa: E402
from growmoe.report.command import report, watch  # noqa: E402
from growmoe.report.run import ReportError  # noqa: E402
from growmoe.report.terminal import live_view  # noqa: E402

app = typer.Typer(
    help="Grow mixtures of experts, and measure what they remember.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class UserError(Exception):
    """What the user can mend; shown as one line, exit code 2."""


def _version(value: bool) -> None:
    if value:
        print(f"growmoe {importlib.metadata.version('growmoe')}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Each method and seed is written when finished: the same command goes on where it was "
    "stopped, and more methods or seeds can be added to the same folder."
)
def bench(
    stream: Annotated[
        str, typer.Argument(metavar="STREAM", help="See `growmoe streams`; none for a suite.")
    ] = "",
    methods: Annotated[
        str,
        typer.Option(help="See `growmoe methods`; with commas between.", show_default="all"),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="A folder for the results.", show_default="runs/STREAM")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where the data lies, as torchvision lays it out.")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="class, domain or task.")] = None,
    drift: Annotated[str | None, typer.Option(help="sharp, fuzzy, recurring or none.")] = None,
    experiences: Annotated[int | None, typer.Option(help="How many domains.")] = None,
    examples: Annotated[int | None, typer.Option(help="Train examples of each domain.")] = None,
    tests: Annotated[int | None, typer.Option(help="Test examples of each domain.")] = None,
    suite: Annotated[str, typer.Option(help="paper: every table of the README.")] = "",
    targets: Annotated[
        Path, typer.Option(help="Published numbers that a suite is compared with.")
    ] = Path("benchmarks/targets.toml"),
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time, on Ray if above 1.")] = 1,
    resources: Annotated[
        str,
        typer.Option(
            help="What each cell takes with several workers, as CPU=2,GPU=0.5,memory=2e9.",
            show_default="CPU=1",
        ),
    ] = "",
    controls: Annotated[
        bool, typer.Option("--controls", help="Add growmoe's controls to the methods.")
    ] = False,
    online: Annotated[
        int | None, typer.Option(min=1, help="One pass, in mini-batches of this size.")
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Also scalars and histograms for TensorBoard, of each cell when it is finished.",
        ),
    ] = False,
) -> None:
    """Run methods on a stream with several seeds, and compare them."""
    options = Options(scenario, drift, experiences, examples, tests)
    if not stream and not suite:
        raise UserError(
            "name a STREAM, as split-digits (`growmoe streams` lists them), or a --suite"
        )
    if stream and suite:
        raise UserError(f"a suite has its own streams: leave out {stream!r} or --suite")
    if suite and suite not in SUITES:
        raise UserError(f"no suite {suite!r}{nearest(suite, SUITES)}")
    try:
        names = [full_name(name, options) for name in SUITES.get(suite, (stream,))]
    except (KeyError, ValueError) as error:
        raise UserError(error.args[0]) from error
    published = read_targets(targets) if suite else []
    amounts = _amounts(resources)
    chosen = _choose(methods)
    if controls:
        chosen = {**chosen, **growmoe_controls()}
    if online is not None:
        chosen = run_online(online, chosen)
    if importlib.util.find_spec("avalanche") is None:
        require("avalanche")
    tables: dict[str, Any] = {}
    failed = False
    for name in names:
        folder = re.sub("[:,=]", "-", name) + ("" if online is None else f"-online-{online}")
        if suite:
            place = (output or Path("runs") / suite) / folder
        else:
            place = output or Path("runs") / folder
        try:
            outcome = _bench_one(name, chosen, range(first_seed, first_seed + seeds), place,
                                 data_dir, workers, amounts, tensorboard)  # fmt: skip
        except (DataError, ImportError) as error:
            if not suite:
                raise
            # the other tables do not need this data
            print(f"growmoe: {name} was not run: {error}", file=sys.stderr)
            failed = True
            continue
        tables[name] = outcome.results
        failed = failed or bool(outcome.failures)
    if suite:
        path = (output or Path("runs") / suite) / "targets.md"
        write_atomically(path, targets_table(judge(published, tables)))
        print(f"\n{path.read_text()}\nwritten:\n  {path}")
    if failed:
        raise typer.Exit(1)


def _bench_one(
    stream: str,
    methods: Mapping[str, Method],
    seeds: range,
    output: Path,
    data_dir: Path | None,
    workers: int,
    resources: Mapping[str, float],
    tensorboard: bool,
) -> Outcome:
    """Run and print the table of one stream."""
    board = None
    if tensorboard:
        from growmoe.report.board import BenchBoard

        board = BenchBoard(output / "tensorboard")
    with live_view(Console(stderr=True), f"bench {stream}") as view:
        outcome = run_bench(
            stream,
            methods,
            seeds,
            output,
            data_dir,
            command=command_line(),
            progress=view.progress,
            say=view.say,
            workers=workers,
            show=view.show if view.moving else None,
            listen=(lambda record: None) if board is None else board.cell,
            resources=resources,
        )
    print_table(outcome.results, printer())
    print_written([*outcome.files, *[output / "tensorboard"] * tensorboard])
    if outcome.failures:
        for failure in outcome.failures:
            print(f"growmoe: {failure}", file=sys.stderr)
        print(f"growmoe: the tracebacks are in {output / 'errors'}", file=sys.stderr)
    return outcome


def _amounts(text: str) -> dict[str, float]:
    """What "CPU=2,GPU=0.5" says."""
    try:
        pairs = [part.split("=") for part in text.split(",") if part.strip()]
        amounts = {name.strip(): float(amount) for name, amount in pairs}
    except ValueError:
        amounts = {"": 0.0}
    if not all(name and 0 < amount < math.inf for name, amount in amounts.items()):
        raise UserError(f"--resources must be like CPU=2,GPU=0.5, got {text!r}")
    return amounts


def _choose(names: str) -> Mapping[str, Method]:
    known = {**METHODS, **growmoe_controls()}
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(METHODS)
    for name in wanted:
        if name not in known:
            raise UserError(f"no method {name!r}{nearest(name, known)}")
    return {name: known[name] for name in wanted}


app.command(
    "train-lm",
    epilog="The same command goes on where it was stopped, exactly. Bits per byte are the mean of "
    "-log2 p over the bytes of windows of --sequence-length.",
)(train_lm)


app.command("prune")(prune_command)
app.command("merge")(merge_command)
app.command("inspect")(inspect_command)


app.command("report")(report)
app.command("watch")(watch)


@app.command("streams")
def list_streams() -> None:
    """List the streams that can be learned."""
    _list({name: source.description for name, source in STREAMS.items()})


@app.command("methods")
def list_methods() -> None:
    """List the methods that can be compared, growmoe's controls last."""
    known = {**METHODS, **growmoe_controls()}
    _list({name: method.description for name, method in known.items()})


def _list(descriptions: Mapping[str, str]) -> None:
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        print(f"{name:<{width}}  {description}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; errors of the user are one line on standard error, code 2."""
    try:
        code: Any = app(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("growmoe: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (
        UserError, BenchError, DataError, TrainError, CompressError, ReportError, ImportError,
    ) as error:  # fmt: skip
        _fail(str(error))
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        # Usage errors; their base class moved between versions of typer, this method did not.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    else:
        if code == 130:  # typer turns Ctrl-C into an exit code
            print("growmoe: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    if message.strip():  # help was asked for, and shown
        print("growmoe: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
