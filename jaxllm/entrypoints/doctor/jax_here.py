"""What JAX says of itself on this machine, asked in another process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from jaxllm.entrypoints.doctor import probe

#: a driver that does not answer is given up after so many seconds
_PATIENCE = 120
_LAST_LINES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device, under JAX's names; its memory in bytes, where JAX tells it."""

    platform: str
    kind: str
    memory: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxHere:
    """JAX as a process finds it."""

    #: why it cannot be used, or has no devices; "": it can
    error: str = ""
    #: "": it does not import
    jax: str = ""
    jaxlib: str = ""
    devices: tuple[Device, ...] = ()
    #: JAX's own, where the user configured one
    compile_cache: str | None = None


def jax_here() -> JaxHere:
    """Import JAX in another process, and return what it says."""
    # -P: a file of the current folder that is called jax.py is not meant; JAX is not to take all of a GPU for this
    command = [sys.executable, "-P", str(Path(probe.__file__))]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return JaxHere(error=f"JAX has not found its devices in {_PATIENCE} seconds, and was given up")
    except OSError as error:
        return JaxHere(error=f"{sys.executable} cannot be started: {error}")
    if result.returncode != 0:
        return JaxHere(error=_why(result.returncode, result.stderr))
    found = json.loads(result.stdout.splitlines()[-1])
    devices = tuple(Device(**device) for device in found.pop("devices", ()))
    return JaxHere(**found, devices=devices)


def _why(status: int, stderr: str) -> str:
    last = " ".join(stderr.strip().splitlines()[-_LAST_LINES:]) or "it said nothing"
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        return f"Python was ended by {name} while it imported JAX: {last}"
    return stderr.strip().splitlines()[-1] if stderr.strip() else f"Python ended with status {status}"
