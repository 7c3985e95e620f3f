"""Drives a headless Chromium through its DevTools pipe: real keys and clicks, no dependency.

https://chromedevtools.github.io/devtools-protocol/ ; messages are JSON, each ended by a NUL byte.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_SECONDS = 60
KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
KEY_CODES |= {"Enter": 13, "Escape": 27, "/": 191}


class Page:
    """A tab: `complaints` has what its console and exceptions said, `requests` what it loaded."""

    def __init__(self, read: int, write: int):
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._read, self._write = read, write
        self._unread = b""
        self._id = 0
        self._session = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(1280, 800)

    def open(self, address: str) -> None:
        """Goes to an address and waits until the gallery has loaded all its records."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")
        self.wait("job && images.length === job.made + job.failed")

    def run(self, script: str):
        """The value of a JavaScript expression, which may be a promise."""
        said = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        until = time.monotonic() + TIMEOUT_SECONDS
        while not self.run(f"(() => {{ try {{ return !!({condition}) }} catch {{}} }})()"):
            assert time.monotonic() < until, f"never: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Presses keys one after another, by the names that KeyboardEvent.key has."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"key": key, "windowsVirtualKeyCode": KEY_CODES.get(key, ord(key[0].upper()))}
            self._call("Input.dispatchKeyEvent", type="keyDown", text=text, **code)
            self._call("Input.dispatchKeyEvent", type="keyUp", **code)

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element."""
        script = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()"
        box = self.run(script)
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Sets the window's size in CSS pixels, and the theme that the system prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])

    def screenshot(self, path: Path) -> None:
        """Writes what is in sight as a PNG file."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **params) -> dict:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (said := self._next()).get("id") != self._id:
            self._note(said)
        assert "error" not in said, f"{method}: {said['error']}"
        return said["result"]

    def _next(self) -> dict:
        while b"\0" not in self._unread:
            assert select.select([self._read], [], [], TIMEOUT_SECONDS)[0], "Chromium is silent"
            self._unread += os.read(self._read, 2**16)
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(event["params"]))
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event["method"] == "Log.entryAdded":
            self.complaints.append(event["params"]["entry"]["text"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Starts Chromium, without a network, and ends it; yields its page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "the browser tests need chromium (apt-get install chromium)"
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += ["--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    arguments += ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
    pipes = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'  # the numbers that Chromium uses
    process = subprocess.Popen(
        ["bash", "-c", pipes, program, *arguments],
        pass_fds=(to_browser, from_browser),
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(read, write)
    finally:
        os.close(write)  # at which it ends
        os.close(read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
