"""The compile cache, filled ahead of the first start: for images of containers, and for continuous integration."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm.api.errors import JaxLLMError, ValidationError
from jaxllm.config.engine_args import EngineArgs
from jaxllm.engine.interrupt import StartInterrupt
from jaxllm.runner.build import compiled_plan, make_programs
from jaxllm.runner.compile.programs import KeptProgram
from jaxllm.runner.compile.progress import StartProgress
from jaxllm.runner.compile.target import target_here
from jaxllm.runner.memory.gpu_memory import share_gpu_memory
from jaxllm.startup.setup import compile_cache, read_setup
from jaxllm.startup.tokenizer_files import kept_tokenizers, tokenizer_path
from jaxllm.tokenization.load import load_engine_tokenizer
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.resolve import resolve
from pallas_kernels.cpu_ffi import compiled as cpu_ffi


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmReport:
    """What was done."""

    folder: Path
    seconds: float
    programs: tuple[KeptProgram, ...]

    @property
    def num_compiled(self) -> int:
        """Programs that no earlier start had kept."""
        return sum(program.compiled for program in self.programs)

    @property
    def num_bytes(self) -> int:
        """Of all programs' files."""
        return sum(program.num_bytes or 0 for program in self.programs)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types."""
        return {
            "folder": str(self.folder),
            "seconds": self.seconds,
            "num_compiled": self.num_compiled,
            "num_bytes": self.num_bytes,
            "programs": [program._asdict() for program in self.programs],
        }

    def __str__(self) -> str:
        width = max(len(program.name) for program in self.programs)
        lines = []
        for name, size, compiled in self.programs:
            shown = "      -" if size is None else f"{size / 1e6:7.2f}"
            lines.append(f"{name:<{width}}  {shown} MB  {'compiled' if compiled else 'was there'}")
        total = f"{self.num_compiled} of {len(self.programs)} programs compiled in {self.seconds:.1f} s"
        return "\n".join([*lines, f"{total}; all have {self.num_bytes / 1e6:.1f} MB in {self.folder}"])


def warm(args: EngineArgs) -> WarmReport:
    """Compile what an engine of these arguments runs, as far as no earlier start has, and keep it, and the tokenizer as
    transformers makes it. No weights are read.

    Raises:
        ValidationError: as the engine's start does, and where nothing would be kept.
        JaxLLMError: the folder cannot be written.
    """
    began = time.perf_counter()
    if args.load_format == "null":
        raise ValidationError('load_format="null": there is no model, and nothing to compile. Leave it out.')
    if others := jax.config.values["jax_compilation_cache_dir"]:
        raise ValidationError(
            f"JAX_COMPILATION_CACHE_DIR is set ({others}): then JAX keeps programs, and a start traces them all the "
            "same. Unset it; JAXLLM_CACHE says where jaxllm keeps them."
        )
    folder = compile_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise JaxLLMError(
            f"{folder} cannot be written ({error.strerror}), so nothing would be kept. Set JAXLLM_CACHE to a folder "
            "that can be written."
        ) from None
    path = resolve(args.model, revision=args.revision, token=args.hf_token, load_format=args.load_format)
    setup = read_setup(args, path)
    args = setup.args
    if not args.skip_tokenizer_init:
        with contextlib.suppress(WeightsError):  # a start says what is wrong with it
            load_engine_tokenizer(tokenizer_path(args, path), args.tokenizer_mode, kept=kept_tokenizers())
    share_gpu_memory(args.gpu_memory_utilization)
    setup.check_classifier()
    setup.check_devices()
    setup.pipeline(args.pipeline_parallel_size)
    target = target_here(args.device, args.grid, together=args.steps_together)
    if target.num_processes > 1:
        raise ValidationError(
            f"{args.grid} over {target.num_processes} processes: programs of several processes are compiled at every "
            "start, and none is kept. Warm what one process runs."
        )
    with (
        StartInterrupt() as interrupt,
        contextlib.closing(StartProgress(on_terminal=sys.stderr.isatty(), interrupt=interrupt)) as progress,
    ):
        config = setup.runner_config(target if args.steps_together else target.replica(0), progress=progress)
        config, programs, plan = compiled_plan(config, compiled=lambda seconds: None)
        programs.compile_all()
        # those too that a start loads and no program calls
        cpu_ffi.finish()
        found = programs.kept()
        if target.grid.data > 1 and not args.steps_together and target.replica(0).sharers == 1:
            for number in range(1, target.grid.data):
                own = dataclasses.replace(config, target=target.replica(number))
                programs = make_programs(own, own.params(), plan.num_blocks)
                programs.compile_all()
                found += [kept._replace(name=f"replica {1 + number}: {kept.name}") for kept in programs.kept()]
    report = WarmReport(folder=folder, seconds=time.perf_counter() - began, programs=tuple(found))
    if not found or any(program.compiled and program.num_bytes is None for program in found):
        raise JaxLLMError(
            f"some of {len(found)} programs were not kept in {folder}: a full disk, JAX's compile cache turned off, or "
            "code of the user's (logits_processors), with which every start traces them."
        )
    return report
