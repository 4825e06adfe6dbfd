"""A real headless Chromium for tests and pictures: what a page logs, asks the network for, and looks like."""

import base64
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

# Debian's packages `chromium` and `chromium-driver`. The path of the driver is given to selenium, which would look for
# one in the network otherwise.
BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
_PATIENCE_S = 60


class Browser:
    """One window. `open` loads a file and waits until its charts are drawn, or it has said that they cannot be."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, wait_for="document.documentElement.dataset.ready"):
        self.read_log()
        self.driver.get(Path(path).absolute().as_uri())
        self.wait(wait_for)

    def wait(self, condition):
        """Until a JavaScript expression is true."""
        WebDriverWait(self.driver, _PATIENCE_S, 0.05).until(lambda driver: driver.execute_script(f"return {condition}"))

    def run(self, script, *arguments):
        """A function's body in the page; returns what it returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def resize(self, width, height, scale=1, is_phone=False):
        """The page's own size in CSS pixels, which a window's is not."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone},
        )

    def prefer(self, scheme):
        """`dark` or `light`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, path, clip=None, whole=False):
        """A PNG of what is seen, of a box in the page (x, y, width, height), or of the whole page."""
        values = {"format": "png", "captureBeyondViewport": whole or clip is not None}
        if clip is not None:
            values["clip"] = dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", values)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path):
        """What the printer gets, on A4."""
        values = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        found = self.driver.execute_cdp_cmd("Page.printToPDF", values)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def read_log(self):
        """(console messages, addresses asked for) since the last call; a file and what is inside it ask for none."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    asked.append(url)
        return console, asked


@contextmanager
def browser():
    """A browser of its own, with an empty profile.

    Raises:
        RuntimeError: there is none on this machine.
    """
    binary, driver = (next(filter(None, map(shutil.which, names)), None) for names in (BROWSERS, DRIVERS))
    if binary is None or driver is None:
        raise RuntimeError("no chromium or no chromedriver: apt-get install chromium chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = binary
        for option in (*_OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        window = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield Browser(window)
        finally:
            window.quit()
