"""`jaxllm.plan` and `jaxllm.explain` say what an engine is on devices that need not be there."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import CPU, GPUS, device_name
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.config.log import show_log
from jaxllm.planning import answer
from jaxllm.planning.answer import Question
from jaxllm.planning.elsewhere import Answer, CompilerFailedError, answer_elsewhere
from jaxllm.planning.explanation import Explanation
from jaxllm.planning.plan import Plan
from jaxllm.runner.compile.deviceless import find_compiler, install_command, search_places
from jaxllm.runner.compile.target import target_described, target_here
from jaxllm.weights.resolve import resolve

logger = logging.getLogger("jaxllm")

#: whatever this machine has, in the engine's words
HERE = ("auto", CPU, "gpu", "cuda")


def plan(
    model: str | os.PathLike[str],
    /,
    *,
    device: str = "auto",
    compiler: str | os.PathLike[str] | None = None,
    **arguments: Any,
) -> Plan:
    """Say what an engine would need: weights, activations, KV cache, and whether they fit.

    Nothing is loaded and nothing runs; of the model, its configuration is enough. Compiling takes about a minute, which
    the log says. Numbers for GPUs that are not there
    come from compiling the engine's own programs for them, in a process of its own, where JAX's CUDA compiler is found;
    elsewhere they are an estimate, and the plan says so.

    Args:
        model: as the engine takes it, or a config.json, or a directory with nothing else.
        device: a GPU's name (`jaxllm.config.devices`), "cpu", or "auto" or "gpu" for what this machine has.
        compiler: a directory with JAX's CUDA compiler, the only place to look for it.
        **arguments: the engine's. Where they ask for several devices, the plan is of each of them.

    Raises:
        TypeError: an argument does not exist.
        ValidationError: an argument's value cannot be honoured. That the model does not fit is no error.
        FileNotFoundError: there is no such model.
    """
    return _answered(Plan, model, device, compiler, arguments)


def explain(
    model: str | os.PathLike[str],
    /,
    *,
    device: str = "auto",
    compiler: str | os.PathLike[str] | None = None,
    **arguments: Any,
) -> Explanation:
    """Say how a model is split over devices: the plan of each of them, where every array lies, what steps of some sizes
    read, compute and exchange, and how long that takes at least.

    It is made as `plan` is, and takes and raises the same. Exchanges are counted in the compiled programs; where there
    is nothing to compile with they are those of the rules of the split, and it says so. `LLM.explain` explains an
    engine that runs.
    """
    return _answered(Explanation, model, device, compiler, arguments)


def _answered(
    kind: type[Answer],
    model: str | os.PathLike[str],
    device: str,
    compiler: str | os.PathLike[str] | None,
    arguments: Mapping[str, Any],
) -> Answer:
    show_log()
    make: Any = answer.answer if kind is Plan else answer.explain
    local = device.strip().lower() in HERE
    name = device.strip().lower() if local else _gpu(device)
    args = engine_args(model, **arguments)
    if args.load_format == "null":
        raise ValidationError('load_format="null" has no model, so there is no memory to plan.')
    with config_path(args) as path:
        if local:
            question = Question(
                args=args,
                path=path,
                # what is free changes from moment to moment; one plan and its remedies are of one moment
                target=functools.cache(lambda grid: target_here(name, grid, together=args.steps_together)),
                is_local=True,
            )
            return make(question, device=name, basis="Compiled on this machine, for its own devices.")
        found = find_compiler(compiler)
        why = ""
        if found is not None:
            logger.info(
                "Compiling the engine's %s programs for %s, which need not be here (about a minute%s)",
                "largest" if kind is Plan else "smallest and largest",
                GPUS[name].description,
                "; longer if the model does not fit, since what would help is compiled, too" if kind is Plan else "",
            )
            try:
                return answer_elsewhere(kind, found, args, path, arguments, name)
            except CompilerFailedError as error:
                why = f"{found} failed ({error}), so this is an estimate from shapes."
        gpu = GPUS[name]
        question = Question(
            args=args,
            path=path,
            target=lambda grid: target_described(gpu, grid=grid),
            is_local=False,
        )
        return make(question, device=name, basis=why or _no_compiler())


def _gpu(text: str) -> str:
    try:
        return device_name(text)
    except ValidationError as error:
        raise ValidationError(f"{error} Without a name (auto, gpu) the plan is for what this machine has.") from None


def _no_compiler() -> str:
    places = (" ".join(["  ", "this environment" if place is None else str(place)]) for place in search_places())
    return "\n".join(
        [
            "This is an ESTIMATE from shapes. It would be exact with JAX's CUDA compiler, which needs no GPU; there is "
            "none in",
            *places,
            f"To install it: {install_command()}",
        ]
    )


@contextlib.contextmanager
def config_path(args: EngineArgs) -> Iterator[Path]:
    """Return the model's directory or .gguf file; of a config.json by itself, a directory with nothing else."""
    path = Path(os.fspath(args.model)).expanduser()
    if path.suffix.lower() != ".json" or not path.is_file():
        yield resolve(args.model, revision=args.revision, token=args.hf_token, part="config")
        return
    try:
        json.loads(path.read_text())
    except ValueError as error:
        raise ValidationError(f"{path} is not JSON: {error}.") from error
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "config.json")
        yield Path(folder)
