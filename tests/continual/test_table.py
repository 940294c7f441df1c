"""What was measured on the way stands in a second table, and only where it was measured."""

import io

import pytest
from rich.console import Console

from growmoe.continual import store
from growmoe.continual.cell import Cell, Memory
from growmoe.continual.summary import summarize
from growmoe.continual.table import csv_table, latex_table, markdown_table, print_table

PLAIN = Cell([[0.9, 0.1], [0.5, 0.7]], seconds=1.0, parameters=10, memory=Memory(model=40))
FULL = Cell(
    [[0.9, 0.1], [0.7, 0.7]],
    seconds=1.0,
    parameters=10,
    memory=Memory(model=40),
    prediction_flops=2.5e6,
    anytime=[[50, 0.4], [100, 0.8]],
    prequential=[[60, 0.5], [90, 0.7]],
    memory_history=[[50, 3e6], [100, 2e6]],
    detections=[55.0, 70.0],
    drifts=[50.0],
    routing=[[5, 0], [0, 5]],
    class_routing=[[5, 0], [5, 0]],
)


def results(**cells):
    records = [
        store.cell_record(
            cell,
            stream="tiny",
            method=name,
            seed=seed,
            settings={},
            needs=[],
            test_counts=[10, 10],
        )
        for name, cell in cells.items()
        for seed in (0, 1)
    ]
    return summarize(records, order=list(cells))


def row(text, name, table):
    lines = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")] if lines[table:] else None


def test_what_was_measured_on_the_way_is_summed_up():
    entry = results(full=FULL)["methods"]["full"]
    expected = {
        "anytime_accuracy": 0.6,
        "prequential_accuracy": 0.6,
        "prediction_flops": 2.5e6,
        "peak_memory_bytes": 3e6,
        "specialisation": 1.0,
        "class_specialisation": None,  # a single class: there is nothing to say
        "drifts_found": 1,
        "drifts_missed": 0,
        "drifts_false_alarms": 1,
        "detection_delay": 5,
    }
    for name, value in expected.items():
        if value is None:
            assert name not in entry
        else:
            assert entry[name]["mean"] == pytest.approx(value)


def test_a_second_table_shows_it_and_the_main_one_stays_as_it_was():
    alone, both = markdown_table(results(plain=PLAIN)), results(plain=PLAIN, full=FULL)
    text = markdown_table(both)
    assert row(alone, "plain", 0) == row(text, "plain", 0) and "any-time" not in alone
    assert row(text, "full", 1)[1:5] == ["60.0 ± 0.0", "60.0 ± 0.0", "2.5 ± 0.0", "3.0 ± 0.0"]
    assert row(text, "full", 1)[-3:] == ["1.0 ± 0.0", "5.0 ± 0.0", "1.0 ± 0.0"]
    assert row(text, "plain", 1) is None
    assert latex_table(both).count(r"\begin{tabular}") == 2
    assert "tiny,full,2,anytime_accuracy,0.6" in csv_table(both)


def test_both_tables_fit_a_terminal_of_eighty_columns():
    file = io.StringIO()
    print_table(results(plain=PLAIN, **{"ridge-wide": FULL}), Console(file=file, width=80))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in file.getvalue()
    assert any("any-time" in line and "false" in line for line in lines)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_what_does_not_fit_goes_on_below_and_no_figure_is_cut(width):
    slow = Cell(
        [[0.9, 0.1], [0.5, 0.7]], seconds=123456.7, parameters=123_456, memory=Memory(model=10**11)
    )
    found = results(**{"a-method-of-long-name": slow, "full": FULL})
    file = io.StringIO()
    print_table(found, Console(file=file, width=width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for part in ("60.0±0.0", "100000.00", "123457", "any-time", "domains"):
        assert part in text, part
    headings = [line for line in text.splitlines() if line.startswith(" method ")]
    assert len(headings) == 2 if width == 200 else len(headings) > 2
    assert "needs" not in text  # of which the terminal has no column


def test_a_bench_of_many_hours_still_fits_in_one_table_of_eighty_columns():
    slow = Cell([[0.9, 0.1], [0.5, 0.7]], 1029.9, 478_000, Memory(model=21_050_000))
    file = io.StringIO()
    print_table(results(**{"replay-2000": slow}), Console(file=file, width=80))
    assert file.getvalue().count(" method ") == 1 and "1030" in file.getvalue()
