"""A real Chromium for the tests of pages; those that need it are skipped where it is not."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium(width: int = 1200, theme: str = "light") -> Iterator[Any]:
    """A headless browser of that width; skips the test with a message where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
                     "no-proxy-server", f"window-size={max(width, 600)},900"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.set_page_load_timeout(60)
        emulate = browser.execute_cdp_cmd
        wishes = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        emulate("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        emulate("Emulation.setDeviceMetricsOverride", screen)
        yield browser
    finally:
        browser.quit()


def visit(browser: Any, address: str) -> float:
    """Open a report and wait until it is drawn; gives the seconds it took."""
    begin = time.monotonic()
    browser.get(address)
    wait_for(browser, "return document.documentElement.dataset.ready === 'true'")
    return time.monotonic() - begin


def wait_for(browser: Any, condition: str, seconds: float = 60) -> None:
    """Wait until the script returns something true."""
    end = time.monotonic() + seconds
    while not browser.execute_script(condition):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {condition}")
        time.sleep(0.05)


def draw_all(browser: Any) -> None:
    """Draw every chart that is shown, as if it had come near the window."""
    browser.execute_script("document.querySelectorAll('.plot').forEach(p => p.near(true))")
    wait_for(browser, "return [...document.querySelectorAll('.plot')].every("
             "p => !p.offsetParent || p.querySelector('svg'))")  # fmt: skip


def axe() -> Path | None:
    """The newest axe-core that an installed package brings."""
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            if (Path(place) / "axe.min.js").exists():
                return Path(place) / "axe.min.js"
    return None
