"""instructor asks the server, from an environment of its own: it wants other versions of what jaxllm is tested with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: where `make test-clients` installs it
PYTHON = Path(sys.prefix, "instructor", "bin", "python")
CLIENT = Path(__file__).parents[2] / "support" / "instructor_client.py"

if not PYTHON.exists():
    pytest.skip("instructor is not installed: `make test-clients` installs it", allow_module_level=True)

pytestmark = pytest.mark.clients


def test_instructor_gets_objects(url: str):
    """By a tool that it names and by a schema, whole and in pieces."""
    command = [PYTHON, CLIENT, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"TOOLS", "JSON_SCHEMA"}
    for whole, last in found.values():
        assert whole == last and whole["city"] in ("Paris", "Rome") and isinstance(whole["windy"], bool)
