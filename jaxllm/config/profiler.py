"""Where profiles go: vLLM's `ProfilerConfig`, as far as it has a meaning here."""

from __future__ import annotations

import dataclasses
import os

from jaxllm.api.errors import ValidationError

PROFILERS = ("torch", "jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """What `LLM.start_profile` does.

    Raises:
        ValidationError: another profiler, a folder that is no path, or vLLM's counts of steps, which are not there.
    """

    #: "torch" stands for the only profiler that there is, JAX's
    profiler: str | None = None
    #: where traces go; empty: a folder that `start_profile` is told
    torch_profiler_dir: str = ""
    delay_iterations: int = 0
    max_iterations: int = 0

    def __post_init__(self) -> None:
        if self.profiler is not None and self.profiler not in PROFILERS:
            raise ValidationError(
                f"profiler_config['profiler'] must be one of {', '.join(PROFILERS)}; got {self.profiler!r}."
            )
        folder = self.torch_profiler_dir
        if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
            raise ValidationError(f"profiler_config['torch_profiler_dir'] must be a path, got {folder!r}.")
        object.__setattr__(self, "torch_profiler_dir", os.fspath(folder))
        for name in ("delay_iterations", "max_iterations"):
            if getattr(self, name):
                raise ValidationError(
                    "profiler_config takes 'torch_profiler_dir' (where traces go) and 'profiler' ('jax', or 'torch', "
                    f"which means the same here); start_profile and stop_profile say when; got {name!r}."
                )
