"""Benchmarks measure other processes: an engine that answers messages, and a job with one answer."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from jaxllm.api.errors import JaxLLMError

#: characters of a log that are shown when its process fails
_LAST_CHARACTERS = 2000
_SECONDS_TO_END = 20


def answer_of(what: str, command: Sequence[str], job: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """Run a process that reads `job`, a JSON object, from standard input; returns the one that is its last line.

    Raises `JaxLLMError` when it fails: the text begins with `what`, and has its last words.
    """
    done = subprocess.run(command, input=json.dumps(job), env=env, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        end = done.stderr[-_LAST_CHARACTERS:].strip()
        raise JaxLLMError(f"{what}, exit status {done.returncode}:\n{end}")
    return json.loads(done.stdout.splitlines()[-1])


class EngineProcess:
    """A process that speaks `peers.protocol`. What else it prints goes to a log, whose end is shown when it fails.

    Raises (each method) `JaxLLMError` when the engine fails or its process ends.
    """

    def __init__(self, name: str, command: list[str], env: dict[str, str]):
        self.name = name
        self._log = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True
            )
        except OSError as error:
            self._log.close()
            raise JaxLLMError(f"{name} cannot be started: {error}") from None

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its reply, however long that takes."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": None}
        if "error" not in reply:
            return reply
        # A process that ends closes its output before it writes its last words.
        status = None if line else self._process.wait()
        self._log.seek(0)
        end = self._log.read().decode(errors="replace")[-_LAST_CHARACTERS:].strip()
        if not line:
            raise JaxLLMError(f"{self.name} ended with exit status {status}.\n{end}")
        raise JaxLLMError(f"{self.name} failed: {reply['error']}\n{end}")

    def cpu_seconds(self) -> float:
        """Return processor time that the process has used until now, on all cores together."""
        used = psutil.Process(self._process.pid).cpu_times()
        return used.user + used.system

    def close(self) -> None:
        """End the process; idempotent."""
        if self._process.stdin and not self._process.stdin.closed:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()
