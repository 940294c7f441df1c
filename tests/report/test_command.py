"""`growmoe report` writes a page where it is told; what the user can mend is one line, code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("plotly")
pytest.importorskip("typer")

from bench_runs import write_bench

from growmoe.cli import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["report", *arguments])
    return int(caught.value.code or 0)


def test_a_page_is_written_into_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_bench(tmp_path / "b", seeds=1)
    assert run(str(folder)) == 0
    assert (folder / "report.html").exists()
    assert str(folder / "report.html") in capsys.readouterr().out
    assert run(str(folder), "--output", str(tmp_path / "new" / "p.html")) == 0
    assert (tmp_path / "new" / "p.html").exists()


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path)) == 2
    assert "is no run" in capsys.readouterr().err.strip().splitlines()[0]
    folder = write_bench(tmp_path / "b", seeds=1)
    assert run(str(folder), "--output", str(tmp_path)) == 2
    assert "is a folder: name the page" in capsys.readouterr().err
