"""The panel shows what runs in any width; where nothing may move there are plain lines."""

from __future__ import annotations

import io
import re

import pytest

pytest.importorskip("rich")

from rich.console import Console

from growmoe.console import printer
from growmoe.glimpse import Glimpse
from growmoe.report import terminal
from growmoe.report.terminal import View, live_view, sparkline

SEEN = Glimpse(
    0.5,
    "experience 2 of 4",
    {"accuracy (%)": [20.0, 40.0, 91.25], "loss": []},
    {"blocks.0.feed_forward": 3, "blocks.1.feed_forward": 4},
    ["step 5: a spawned 3 from 1: novel inputs 53% > 25%", "step 6: a pruned 2: idle"],
)


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def screen(width: int = 80, height: int = 24, **options) -> Console:
    return Console(file=Screen(), force_terminal=True, width=width, height=height, **options)


def drawn(view: View) -> list[str]:
    with view.console.capture() as capture:
        view.console.print(view)
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()


def test_the_panel_shows_figures_experts_events_and_what_is_left(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    view = View(screen(), "bench digits")
    clock[0] = 10.0
    view.progress(0.25, "1 of 4 cells")
    clock[0] = 70.0
    view.progress(0.5, "2 of 4 cells")
    view.show("growmoe seed 1", SEEN)
    text = "\n".join(drawn(view))
    for part in (
        "bench digits", "growmoe seed 1", "experience 2 of 4", "accuracy (%)  91.25", "▁▃█",
        "7  blocks.0: 3, blocks.1: 4", "pruned 2: idle", "novel inputs 53% > 25%",
        "2 of 4 cells", "1:10 gone, about 2:00 left", "50%",
    ):  # fmt: skip
        assert part in text, part
    assert "loss" not in text  # nothing was measured of it
    view.show("growmoe seed 1", None)
    assert "accuracy" not in "\n".join(drawn(view))


def test_an_event_is_shown_once_and_the_last_stay() -> None:
    view = View(screen(), "t")
    view.show("a", Glimpse(events=["e1", "e2"]))
    view.show("a", Glimpse(events=["e1", "e2", "e3", "e4", "e5"]))
    view.show("a", Glimpse(events=["e2", "e3", "e4", "e5", "e6"]))
    shown = re.findall(r"e\d", "\n".join(drawn(view)))
    assert shown == ["e3", "e4", "e5", "e6"]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("cells", [0, 1, 2, 12])
def test_it_stays_within_the_screen(width: int, cells: int) -> None:
    view = View(screen(width), "a title that is longer than forty columns are wide, surely")
    for i in range(cells):
        view.show(f"method-{i} seed {i}", SEEN)
    lines = drawn(view)
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert len(lines) <= 24
        assert all(any(f"method-{i} seed {i}" in line for line in lines) for i in range(cells))


def test_without_unicode_there_are_figures_alone() -> None:
    class Ascii(Screen):
        encoding = "ascii"

    console = Console(file=Ascii(), force_terminal=True, width=80, height=24)
    view = View(console, "t")
    view.show("", SEEN)
    assert "91.25" in "\n".join(drawn(view))
    assert not set("\n".join(drawn(view))) & set("▁▂▃▄▅▆▇█")


def test_bars_run_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▁▁" and sparkline([]) == "" == sparkline([float("nan")])
    assert len(sparkline(list(range(1000)))) == 24


@pytest.mark.parametrize("reason", ["a pipe", "NO_COLOR", "TERM=dumb", "FORCE_COLOR"])
def test_where_nothing_may_move_lines_are_plain_and_fit(reason: str) -> None:
    file = io.StringIO() if reason in ("a pipe", "FORCE_COLOR") else Screen()
    environment = {
        "NO_COLOR": {"NO_COLOR": "1"}, "TERM=dumb": {"TERM": "dumb"},
        "FORCE_COLOR": {"FORCE_COLOR": "1"},
    }.get(reason, {})  # fmt: skip
    console = Console(file=file, width=80, _environ={"TERM": "xterm", **environment})
    with live_view(console, "t") as view:
        view.progress(0.5, "half")
        view.show("cell", SEEN)
        view.say("step 1200/1200: " + "python 2.703, " * 9)
    text = file.getvalue()
    assert "\x1b" not in text and text.startswith("step 1200/1200: python 2.703")
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[1].startswith("  2.703, python")


def test_on_a_terminal_lines_stay_above_the_panel_which_goes() -> None:
    console = screen()
    with live_view(console, "t") as view:
        view.show("", SEEN)
        view.say("a line [that] stays")
    text = console.file.getvalue()
    assert "a line [that] stays" in text and "91.25" in text
    assert text.endswith("\x1b[?25h") or "\x1b[2K" in text  # erased, and the cursor is back


def test_no_color_leaves_bold_and_dim_out_of_tables_too(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = printer()
    console.file, console._force_terminal = Screen(), True
    console.print("[bold]words[/bold] [dim]dim[/dim]")
    assert console.file.getvalue() == "words dim\n"


def test_what_is_being_drawn_is_not_changed_by_what_happens_meanwhile() -> None:
    view = View(screen(), "t")
    view.show("a", SEEN)
    view.show("b", SEEN)
    drawing = iter(view._seen.items())  # as the thread that draws does
    next(drawing)
    view.show("a", None)
    view.show("c", SEEN)
    assert next(drawing)[0] == "b"
    assert "a" not in view._seen
