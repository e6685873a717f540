"""A real Chromium, headless, that tests drive with playwright."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator:
    """playwright's `Browser`. Skips the test, and says why, where there is no browser or no playwright."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed; as root on Debian: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    with playwright.sync_playwright() as p:
        one = p.chromium.launch(executable_path=path, args=[*sandbox, *arguments])
        yield one
        one.close()
