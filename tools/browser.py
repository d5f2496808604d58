"""Drives headless Chromium through its DevTools pipe: for tests of pages, and for pictures of them.

with Browser(Path("/tmp/profile")) as browser:
    browser.open("http://127.0.0.1:8000/")
    browser.wait("document.body.dataset.done")
    browser.screenshot(Path("page.png"), width=1280, height=900)
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars "
    "--force-color-profile=srgb --remote-debugging-pipe"
)


class Browser:
    """One Chromium with one tab."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900) -> None:
        assert PROGRAM is not None, "Chromium is not installed"
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads commands from descriptor 3 and writes to descriptor 4
        wired = (
            "import fcntl, os, sys\n"
            "ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 100) for n in sys.argv[1:3]]\n"
            "for end, number in zip(ends, (3, 4)): os.dup2(end, number)\n"
            "os.execv(sys.argv[3], sys.argv[3:])\n"
        )
        flags = [*_FLAGS.split(), f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", wired, str(to_read), str(to_write), PROGRAM, *flags],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []  # uncaught errors, refusals of the page's policy, failures
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (reply := self._receive(60.0)).get("id") != self._number:
            pass
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    def open(self, url: str) -> None:
        """Go to `url` and wait until it is loaded."""
        self.send("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href !== {'about:blank'!r}")

    def evaluate(self, expression: str) -> Any:
        """Return the value of JavaScript, awaited if it is a promise."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 120.0) -> Any:
        """Return the value of JavaScript as soon as it is true; of an element: True."""
        expression = f"((found) => found instanceof Node || found)({expression})"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.02)
        raise TimeoutError(f"not true within {seconds:.0f} s: {expression}; {self.complaints}")

    def type(self, query: str, text: str) -> None:
        """Replace what the field `query` holds, as the keyboard would."""
        self.evaluate(f"document.querySelector({json.dumps(query)}).select()")
        self.send("Input.insertText", text=text)

    def click(self, query: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press the mouse on an element, at a share of its width and height, once it rests."""
        find = (
            f"(() => {{ const e = document.querySelector({json.dumps(query)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect();"
            f"return [b.left + b.width * {x}, b.top + b.height * {y}]; }})()"
        )
        place = None
        while place != (place := self.evaluate(find)):  # a frame that loads moves what is below it
            time.sleep(0.05)
        left, top = place
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.send(
                "Input.dispatchMouseEvent", type=kind, x=left, y=top, button=button, clickCount=1
            )

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of this size."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def dark(self, on: bool) -> None:
        """Prefer dark colours, or light ones."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, width: int, height: int | None = None) -> None:
        """Write a picture of the page, from its top; the whole page without a height."""
        self.resize(width, height or 900)
        self.evaluate("window.scrollTo(0, 0)")
        time.sleep(0.5)  # drawings follow the width
        whole = height or self.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": whole, "scale": 1}
        shot = self.send(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def _receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise TimeoutError(f"Chromium gave no answer within {seconds:.0f} s")
            self._buffer += part
        one, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]["exceptionDetails"])[:500])
        if message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] == "error":
                self.complaints.append(f"{entry['text']} {entry.get('url', '')}")
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
