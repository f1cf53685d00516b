"""A headless Chromium over a pipe, with the standard library: what a page says, asks for and looks like."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.reporting.images import browser_command

PATIENCE = 60


@dataclass(eq=False)
class Browser:
    """A page in a browser, over the Chrome DevTools Protocol.

    Attributes:
        events: everything the browser told so far, (method, parameters).
    """

    read: int
    write: int
    session: str = ""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _count: int = 0
    _rest: bytes = b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result."""
        self._count += 1
        number = self._count
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str) -> None:
        """Loads a page and waits until it is there."""
        before = len(self.events)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + PATIENCE
        while not any(name == "Page.loadEventFired" for name, _ in self.events[before:]):
            assert time.monotonic() < deadline, "the page did not load"
            self._next()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def look(self, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Sets the size of the window and the colour scheme of the surroundings."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def photograph(self, path: Path, **clip: float) -> None:
        """Writes a PNG of the whole page, or of a part."""
        area = {"clip": {**clip, "scale": 1}} if clip else {}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, **area)["data"]
        path.write_bytes(base64.b64decode(data))

    def heard(self, *names: str) -> list[dict[str, Any]]:
        """Parameters of the events with these names."""
        return [parameters for name, parameters in self.events if name in names]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self.read, 1 << 20)
            assert data, "the browser has gone"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


@contextmanager
def open_browser(executable: str) -> Iterator[Browser]:
    """A browser with an empty page whose console, errors and requests are listened to."""
    to_browser, mine = os.pipe()
    theirs, from_browser = os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [*browser_command(executable, profile), "--remote-debugging-pipe", "about:blank"]
        script = (
            f"import os, sys; os.dup2({to_browser}, 3); os.dup2({from_browser}, 4); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            browser = Browser(theirs, mine)
            target = browser.call("Target.createTarget", url="about:blank")["targetId"]
            attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
            browser.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.call(f"{domain}.enable")
            yield browser
        finally:
            process.terminate()
            process.wait(timeout=PATIENCE)
            os.close(mine)
            os.close(theirs)
