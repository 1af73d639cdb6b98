"""The same answer comes from another process, which has JAX's CUDA compiler in its environment.

It runs as ``python -m jaxllm.planning.elsewhere``: standard input is one JSON object, and so is the last line of
standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.config.devices import GPUS
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.planning.answer import Question, answer, explain
from jaxllm.planning.explanation import Explanation
from jaxllm.planning.plan import Plan
from jaxllm.runner.compile.deviceless import CudaCompiler, devices
from jaxllm.runner.compile.target import target_described

Answer = TypeVar("Answer", Plan, Explanation)

_LOG_LINE = re.compile(r"[EIW]\d{4} |WARNING: All log messages")


class CompilerFailedError(JaxLLMError):
    """The process with the compiler died, or gave no answer; the text is what it said last."""


def answer_elsewhere(
    kind: type[Answer],
    compiler: CudaCompiler,
    args: EngineArgs,
    path: Path,
    arguments: Mapping[str, Any],
    device: str,
) -> Answer:
    """Answer for GPUs that are not there, by their compiler.

    Args:
        kind: of the answer.
        args: the engine's, checked.
        path: of the model.
        arguments: those of the engine that were given.

    Raises:
        CompilerFailedError: no answer.
        ValidationError: what `answer` raises, or arguments that cannot be told another process.
    """
    try:
        question = json.dumps(
            {
                "kind": kind.__name__,
                "model": str(args.model),
                "path": str(path),
                "arguments": {**arguments, **({"dtype": args.dtype} if "dtype" in arguments else {})},
                "device": device,
                "cuda": compiler.cuda,
                "basis": f"Compiled for {GPUS[device].description} by {compiler}.",
            },
            default=_plain,
        )
    except TypeError as error:
        raise ValidationError(
            f"A plan for {device} is made in another process, which cannot be told this argument: {error}. Give logits "
            "processors as 'module:name'."
        ) from None
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.planning.elsewhere"],
        input=question,
        env=compiler.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        # XLA's log lines begin with a letter and the date
        said = [line for line in done.stderr.splitlines() if line.strip() and not _LOG_LINE.match(line)]
        told = f": {said[-1].strip()[:300]}" if said else ""
        raise CompilerFailedError(f"exit status {done.returncode}{told}")
    found = json.loads(lines[-1])
    if "refused" in found:
        raise ValidationError(found["refused"])
    return kind.from_dict(found["answer"])


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def main() -> None:
    """Answer the question on standard input."""
    asked = json.loads(sys.stdin.read())
    gpu, cuda = GPUS[asked["device"]], asked["cuda"]
    try:
        question = Question(
            args=engine_args(asked["model"], **asked["arguments"]),
            path=Path(asked["path"]),
            target=lambda grid: target_described(gpu, devices(gpu, grid.size, cuda=cuda), grid=grid),
            is_local=False,
        )
        make = answer if asked["kind"] == Plan.__name__ else explain
        reply = {"answer": make(question, device=asked["device"], basis=asked["basis"]).to_dict()}
    except ValidationError as error:
        reply = {"refused": str(error)}
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
