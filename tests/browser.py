"""A headless Chromium through chromedriver's WebDriver protocol; the standard library is enough."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1",
    "--force-prefers-reduced-motion",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing() -> str:
    """Why there is no browser here, or ""."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"needs {' and '.join(absent)}" if absent else ""


class Browser:
    """One window; a context manager.

    Args:
      profile: a new folder for the browser's own files.
      size: of the window, in pixels.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900)):
        # A session of its own, so that what the driver starts can be ended with it.
        self._driver = subprocess.Popen(
            [shutil.which("chromedriver") or "", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            self._session = self._start(profile, size)
        except BaseException:
            self._end()
            raise

    def _start(self, profile: Path, size: tuple[int, int]) -> str:
        assert self._driver.stdout is not None
        started = (re.search(r"started successfully on port (\d+)", s) for s in self._driver.stdout)
        port = next(match[1] for match in started if match)
        flags = [*_FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._root = f"http://127.0.0.1:{port}/session"
        body = {"capabilities": {"alwaysMatch": {"browserName": "chrome", **wanted}}}
        return self._call("POST", "", body)["sessionId"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", f"/{self._session}")
        finally:
            self._end()

    def _end(self) -> None:
        os.killpg(self._driver.pid, signal.SIGTERM)
        self._driver.wait()
        if self._driver.stdout:
            self._driver.stdout.close()

    def _call(self, verb: str, path: str, body: Any = None) -> Any:
        data = None if verb != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._root + path, data, method=verb)
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=90) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            said = json.load(error)["value"]
            error.close()
            raise AssertionError(f"{path}: {said['error']}: {said['message']}") from None

    def do(self, verb: str, path: str, body: Any = None) -> Any:
        """A command of the session."""
        return self._call(verb, f"/{self._session}{path}", body)

    def open(self, path: Path) -> None:
        """Show a file, and wait until its scripts have run."""
        self.do("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns in the page."""
        return self.do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        """The first element that fits, by the driver's name for it."""
        body = {"using": "css selector", "value": selector}
        return self.do("POST", "/element", body)[_ELEMENT]

    def text(self, selector: str) -> str:
        """The text of an element as it is seen."""
        return self.do("GET", f"/element/{self.find(selector)}/text")

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a user does."""
        self.do("POST", f"/element/{self.find(selector)}/click")

    def press(self, selector: str, keys: str) -> None:
        """Type into an element."""
        self.do("POST", f"/element/{self.find(selector)}/value", {"text": keys})

    def hover(self, selector: str) -> None:
        """Move the pointer over an element."""
        origin = {_ELEMENT: self.find(selector)}
        moves = [{"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}]
        pointer = {"type": "pointer", "id": "mouse", "actions": moves}
        self.do("POST", "/actions", {"actions": [pointer]})

    def media(self, **features: str) -> None:
        """Media features that the page sees, as in `media(**{"prefers-color-scheme": "dark"})`."""
        known = [{"name": name, "value": value} for name, value in features.items()]
        body = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": known}}
        self.do("POST", "/goog/cdp/execute", body)

    def resize(self, width: int, height: int) -> None:
        """The window's size in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        body = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.do("POST", "/goog/cdp/execute", body)

    def screenshot(self, path: Path) -> Path:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.do("GET", "/screenshot")))
        return path

    def complaints(self) -> Sequence[str]:
        """Warnings and errors of the console since it was last asked."""
        found = self.do("POST", "/se/log", {"type": "browser"})
        return [one["message"] for one in found if one["level"] in ("WARNING", "SEVERE")]
