"""MLflow's page in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote

from playwright.sync_api import Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 300_000  # rendering is slow on a busy machine
METHODS = "tags.level = 'method'"


@contextmanager
def browser_page(width: int = 1600, height: int = 900) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(TIMEOUT_MS)
            expect.set_options(timeout=TIMEOUT_MS)
            yield page
        finally:
            browser.close()


def open_runs(page: Page, server: str, experiment: str, search: str = METHODS, charts: bool = False) -> None:
    """Open the experiment's list of runs, or its charts."""
    mode = "&compareRunsMode=CHART" if charts else ""
    page.goto(f"{server}/#/experiments/{experiment}/runs?searchFilter={quote(search)}{mode}")
    page.get_by_text("matching run").wait_for()
    if (assistant := page.get_by_role("button", name="Close")).count():  # a pane that covers a quarter of the page
        assistant.last.click()


def open_comparison(page: Page, server: str, experiment: str, runs: Sequence[str]) -> None:
    page.goto(f"{server}/#/compare-runs?runs={json.dumps(list(runs))}&experiments={json.dumps([experiment])}")
    page.get_by_text("Run details").wait_for()


def open_run(page: Page, server: str, experiment: str, run: str, tab: str) -> None:
    """Open a tab of a run, named as in the URL: `system-metrics`, `artifacts/report/accuracy.png`."""
    page.goto("about:blank")  # else the page would stay at the previous artifact
    page.goto(f"{server}/#/experiments/{experiment}/runs/{run}/{tab}")
