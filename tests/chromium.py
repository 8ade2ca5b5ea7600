"""Headless Chromium for tests, driven over the WebDriver protocol by the standard library alone.

Needs Debian's packages `chromium` and `chromium-driver`; where they are missing the tests are skipped.
"""

import base64
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_PATIENCE = 3_600_000  # ms: a busy machine is slow; the suite has a time limit of its own


def require_chromium() -> tuple[str, str]:
    """The paths of Chromium and its driver; skips the test where there are none."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("Chromium isn't installed (apt-get install chromium chromium-driver)")
    return browser, driver


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._address, self._session = address, session

    def call(self, method: str, path: str, **body: Any) -> Any:
        return _request(method, f"{self._address}/session/{self._session}{path}", body if method == "POST" else None)

    def open(self, path: Path) -> None:
        self.call("POST", "/url", url=path.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page, and return what it returns."""
        return self.call("POST", "/execute/sync", script=script, args=list(arguments))

    def find(self, selector: str) -> str:
        found: str = self.call("POST", "/element", using="css selector", value=selector)[_ELEMENT]
        return found

    def click(self, selector: str) -> None:
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", {_ELEMENT: element})
        self.call("POST", f"/element/{element}/click")

    def type(self, selector: str, text: str) -> None:
        """Send keys to an element, as a user of the keyboard would."""
        self.call("POST", f"/element/{self.find(selector)}/value", text=text)

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def view(self, width: int, height: int, *, theme: str = "light", phone: bool = False) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def screenshot(self, *, whole: bool = False) -> bytes:
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            options |= {"captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.devtools("Page.captureScreenshot", **options)["data"])

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What came since the last call: of "browser" (the console) or "performance" (events of the devtools)."""
        entries: list[dict[str, Any]] = self.call("POST", "/se/log", type=kind)
        return entries

    def requests(self) -> list[str]:
        """Addresses that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in ``folder``."""
    browser, driver = require_chromium()
    with (folder / "chromedriver.log").open("w") as log:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            address = f"http://127.0.0.1:{_port(process)}"
            arguments = ["--headless=new", f"--user-data-dir={folder / 'profile'}", "--disable-gpu", "--no-first-run"]
            arguments += ["--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"]
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                arguments.append("--no-sandbox")
            wanted = {
                "goog:chromeOptions": {"binary": browser, "args": arguments},
                "timeouts": {"script": _PATIENCE, "pageLoad": _PATIENCE},
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            session = _request("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            window = Browser(address, session)
            try:
                yield window
            finally:
                _request("DELETE", f"{address}/session/{session}", None)
        finally:
            process.terminate()
            process.wait()


def _port(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    for line in process.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip().rstrip(".").rsplit(" ", 1)[1])
    raise RuntimeError("chromedriver didn't start")


def _request(method: str, url: str, body: Any) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error
