"""A real Chromium, headless, that tests drive with playwright."""

import contextlib
import os
from collections.abc import Iterator

import install_browser
import pytest


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator:
    """playwright's `Browser`. Skips the test, and says why, where there is no browser or no playwright."""
    path = install_browser.find()
    if path is None:
        pytest.skip(
            f"no browser: none of {', '.join(install_browser.NAMES)} is installed; as root on Debian: apt-get install chromium"
        )
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    with playwright.sync_playwright() as p:
        one = p.chromium.launch(executable_path=path, args=[*sandbox, *arguments])
        yield one
        one.close()
