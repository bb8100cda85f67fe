"""A browser without a window, for tests of the page: Debian's chromium, driven by selenium. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HEIGHT = 900


@contextmanager
def browser(width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A driver whose window is so many CSS pixels wide, and whose user likes that colour scheme."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    assert not missing, f"install {missing}: ./dev test does, as root on Debian"
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"] or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"):
        options.add_argument(argument)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(prefix="edgeadapt-browser-", ignore_cleanup_errors=True) as folder:
        options.add_argument(f"--user-data-dir={folder}")
        # the driver starts the browser with our own environment, so that a proxy there would be asked for 127.0.0.1 too
        service = Service(programs["chromedriver"], env={**os.environ, "no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.set_page_load_timeout(120)
            driver.set_script_timeout(60)
            metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            yield driver
        finally:
            driver.quit()


def until(driver: Any, what: Callable[[Any], Any], seconds: float = 60.0) -> Any:
    """What it gives as soon as that is true. Where the page puts something else in the place of what is being looked at, it is looked at again."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.1, ignored_exceptions=(StaleElementReferenceException,)).until(what)
