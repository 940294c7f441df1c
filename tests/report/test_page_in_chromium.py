"""The page in a real browser: it loads, opens, filters, fits a phone, and is accessible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")

from bench_runs import write_bench
from browser import axe, chromium, draw_all, visit, wait_for

from growmoe.report import write_report

pytestmark = pytest.mark.slow


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]


def requests(browser: Any) -> list[str]:
    """The addresses of the network that the page asked for."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return [url for url in found if not url.startswith(("file:", "data:", "blob:"))]


def show(browser: Any, run: int) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", "run-choice")).select_by_index(run)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    one = write_bench(folder / "one")
    two = write_bench(folder / "two", experts=20, seeds=1)
    return write_report([one, two], folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def desktop() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def test_it_draws_everything_without_errors_and_asks_the_network_for_nothing(
    desktop: Any, page: str
) -> None:
    browser = desktop
    visit(browser, page)
    draw_all(browser)
    assert browser.title.startswith("2 runs compared")
    for i in range(3):
        show(browser, i)
        assert not browser.find_element("id", f"run-{i}").get_attribute("hidden")
        draw_all(browser)
        shown = browser.find_elements("css selector", f"#run-{i} .plot svg.main-svg")
        assert len(shown) >= (4 if i else 1)
    assert errors(browser) == []
    assert requests(browser) == []


def test_the_family_tree_opens_closes_and_obeys_the_keyboard(desktop: Any, page: str) -> None:
    browser = desktop
    from selenium.webdriver.common.keys import Keys

    visit(browser, page)
    show(browser, 1)
    tree = browser.find_element("css selector", "#run-1 [role=tree]")

    def items() -> list[Any]:
        return tree.find_elements("css selector", "[role=treeitem]")

    everything = len(items())
    assert everything == 12
    buttons = {b.text: b for b in browser.find_elements("css selector", "#run-1 button")}
    buttons["Close all"].click()
    roots = [item.get_attribute("data-id") for item in items()]
    assert roots == ["0", "1"]
    parent = next(i for i in items() if i.get_attribute("aria-expanded") == "false")
    name = parent.get_attribute("data-id")
    parent.click()
    assert len(items()) > len(roots)
    active = browser.switch_to.active_element
    assert active.get_attribute("data-id") == name
    assert active.get_attribute("aria-expanded") == "true"
    active.send_keys(Keys.ARROW_RIGHT)  # to the first child
    child = browser.switch_to.active_element
    assert child.get_attribute("aria-level") == "2"
    card = browser.find_element("css selector", "#run-1 .card")
    assert f"Expert {child.get_attribute('data-id')}" in card.text and "why" in card.text
    child.send_keys(Keys.ARROW_LEFT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert [item.get_attribute("data-id") for item in items()] == roots
    buttons["Open all"].click()
    assert len(items()) == everything
    buttons["Close all"].click()
    find = browser.find_element("css selector", "#run-1 input[size='8']")
    find.send_keys("9")
    selected = tree.find_element("css selector", "[aria-selected=true]")
    assert selected.get_attribute("data-id") == "9"
    assert errors(browser) == []


def test_the_filters_of_decisions_and_curves_work(desktop: Any, page: str) -> None:
    browser = desktop
    from selenium.webdriver.support.ui import Select

    visit(browser, page)
    show(browser, 1)
    place = browser.find_element("css selector", "#run-1 .decisions")

    def rows() -> list[str]:
        return [row.text for row in place.find_elements("css selector", "tbody tr")]

    everything = rows()
    assert any("refused" in row for row in everything)
    Select(place.find_element("tag name", "select")).select_by_value("refused")
    assert rows() and all("refused" in row for row in rows())
    assert f"{len(rows())} of {len(everything)} decisions" in place.text
    Select(place.find_element("tag name", "select")).select_by_value("all")
    spawn = place.find_element("css selector", "input[value=spawn]")
    spawn.click()
    assert rows() and not any(" spawn " in row for row in rows())
    spawn.click()
    place.find_element("css selector", "input[type=search]").send_keys("SETTLED <&>")
    assert rows() and all("settled <&> done" in row for row in rows())

    draw_all(browser)
    count = "return document.querySelector('#run-1 .plot').data.length"
    before = browser.execute_script(count)
    browser.find_element("css selector", "#run-1 fieldset input").click()
    assert browser.execute_script(count) == before - 2  # the line and its band
    details = browser.find_element("css selector", "#run-1 figure details")
    details.find_element("tag name", "summary").click()
    wait_for(browser, "return !!document.querySelector('#run-1 figure details table')")
    assert "±" in details.text
    assert errors(browser) == []


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (390, "dark")])
def test_axe_finds_nothing_serious_and_nothing_runs_over_the_edge(
    page: str, width: int, theme: str
) -> None:
    script = axe()
    if script is None:
        pytest.skip("no axe-core: pip install axe-core-python")
    with chromium(width, theme) as browser:
        visit(browser, page)
        for run in range(3):
            show(browser, run)
            draw_all(browser)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            browser.execute_script(script.read_text())
            found = browser.execute_async_script(
                "const done = arguments[0]; axe.run().then(r => done(r.violations))"
            )
            assert [
                (v["id"], v["impact"], [n["html"][:120] for n in v["nodes"]]) for v in found
            ] == []
        background = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        assert (background == "rgb(255, 255, 255)") == (theme == "light")
        browser.find_element("id", "theme").click()
        other = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert other != background


def test_fifty_experiences_and_five_hundred_experts_stay_fluid_and_small(
    desktop: Any, tmp_path: Path
) -> None:
    browser = desktop
    big = write_bench(tmp_path / "big", experiences=50, experts=500, seeds=3, rival=False)
    path = write_report([big], tmp_path / "report.html")
    assert path.stat().st_size < 5_000_000
    visit(browser, path.as_uri())
    draw_all(browser)
    # each thing a reader does, measured in the page: it must not stall
    for act in (
        "document.querySelector('.decisions input[type=checkbox]').click()",
        "document.querySelector('.growth .tools button').click()",
        "document.querySelector('.choice select').dispatchEvent(new Event('change'))",
        "document.getElementById('theme').click()",
    ):
        spent = browser.execute_script(
            f"const t = performance.now(); {act}; return performance.now() - t"
        )
        assert spent < 3000, act
    assert errors(browser) == []


def test_a_language_model_shows_which_expert_takes_which_domain(
    desktop: Any, tmp_path: Path
) -> None:
    from growmoe.lm import TrainConfig, train

    for name in ("abc", "123"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 2000)
    texts = tuple(f"{name}={tmp_path / name}.txt" for name in ("abc", "123"))
    config = TrainConfig(
        domains=texts, steps=2, d_model=16, layers=1, heads=2, experts=3, batch_size=2,
        sequence_length=16, windows=2, device="cpu",
    )  # fmt: skip
    train(config, output=tmp_path / "run")
    visit(desktop, write_report([tmp_path / "run"], tmp_path / "run.html").as_uri())
    draw_all(desktop)
    named = "return [...document.querySelectorAll('figure')].map(f => f.textContent)"
    (map,) = [text for text in desktop.execute_script(named) if "Who takes what" in text]
    assert "by domain" in map and "abc" in map and "123" in map
    assert errors(desktop) == []
