"""Headless Chromium, steered by the Chrome DevTools Protocol over a pipe: what a person sees of a page, and does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

#: Debian's `chromium-headless-shell` and `chromium`, and what others call it
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
#: Chromium reads commands from descriptor 3 and writes answers to 4
_LAUNCH = (
    "import os, sys; given = [os.dup(int(number)) for number in sys.argv[1:3]]; "
    "high = [os.dup2(one, 20 + i) for i, one in enumerate(given)]; "
    "[os.dup2(one, 3 + i) for i, one in enumerate(high)]; os.execvp(sys.argv[3], sys.argv[3:])"
)
#: seconds that a page has to become what a test waits for
PATIENCE = 60


def find() -> str | None:
    """The browser's path; None: there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a browser.

    Args:
        commands, answers: descriptors of the pipes.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._number, self._rest, self._session = 0, b"", None
        #: exceptions, and what the browser logged as errors
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load a page."""
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is, as JSON has it."""
        told = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def text(self, selector: str) -> str:
        """What is to be read in the last element that a selector finds; nothing where there is none."""
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''")

    def wait(self, expression: str) -> None:
        """Wait until an expression holds."""
        end = time.monotonic() + PATIENCE
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"), self.errors)
            time.sleep(0.02)

    def fill(self, name: str, text: str) -> None:
        """Write into a field, in place of what it has."""
        self.value(f"document.getElementById({json.dumps(name)}).focus()")
        self.value(f"document.getElementById({json.dumps(name)}).select()")
        self._call("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press and release the key."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **key)

    def click(self, name: str) -> None:
        """Click in the middle of an element."""
        place = self.value(
            f"(() => {{ const e = document.getElementById({json.dumps(name)}); e.scrollIntoView(); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            x, y = place
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._commands, json.dumps(asked).encode() + b"\0")
        while (told := self._read()).get("id") != self._number:
            self._note(told)
        assert "error" not in told, (method, told)
        return told["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._answers, 2**16)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, told: dict[str, Any]) -> None:
        params = told.get("params", {})
        if told.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if told.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])


@contextlib.contextmanager
def browsing(path: str) -> Iterator[Page]:
    """A page of a browser of its own, which ends with the block."""
    with contextlib.ExitStack() as stack:
        # it may write to its folder until it has ended
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        (theirs_in, commands), (answers, theirs_out) = os.pipe(), os.pipe()
        stack.callback(os.close, commands)
        stack.callback(os.close, answers)
        # tests run as root as well, in containers without what the sandbox needs; the page is our own
        command = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        os.close(theirs_in)
        os.close(theirs_out)
        yield Page(commands, answers)
