"""Chromium without a window, driven over its debugging pipe: a page at a width, keys pressed on it, its complaints."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium hears on file descriptor 3 and answers on 4.
ON_3_AND_4 = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Tab": 9, "Enter": 13}


class Page:
    """A page in the browser; complaints: its errors and what it wrote to the console."""

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers = commands, answers
        self._numbers, self._session = itertools.count(1), {}
        self._loaded = False
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._commands.write(json.dumps({"id": number, "method": method, "params": params, **self._session}).encode())
        self._commands.write(b"\0")
        self._commands.flush()
        while (answer := self._heard()).get("id") != number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _heard(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._message())
        method, params = answer.get("method"), answer.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(params))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"asks for {params['request']['url']}")
        self._loaded |= method == "Page.loadEventFired"
        return answer

    def _message(self) -> bytes:
        text = b""
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            text += byte
        return text

    def open(self, path: Path, width: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._loaded = False
        self._call("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._heard()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth on the page."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self._call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **about)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A new browser, with its profile in ``folder``; skips the test where there is none."""
    if PROGRAM is None:
        pytest.skip("no Chromium is installed")
    (hears, commands), (answers, says) = os.pipe(), os.pipe()
    words = [PROGRAM, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-gpu",
             *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", ON_3_AND_4, str(hears), str(says), *words],
        pass_fds=(hears, says),
        stderr=subprocess.DEVNULL,
    )
    os.close(hears)
    os.close(says)
    with open(commands, "wb") as to, open(answers, "rb") as of:
        try:
            yield Page(to, of)
        finally:
            process.terminate()
            process.wait(timeout=20)
