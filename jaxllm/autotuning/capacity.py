"""What an engine would have room for with some arguments, found in milliseconds: nothing is compiled for it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.devices import GPU
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.config.parallel import Grid
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.model import ModelConfig
from jaxllm.parallel.rules import split_sizes
from jaxllm.planning.api import config_path
from jaxllm.planning.estimate import estimated_activations
from jaxllm.runner.compile.target import Target, target_described, target_here
from jaxllm.runner.memory.fit import plan_memory
from jaxllm.runner.memory.plan import MemoryPlan
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.startup.engine_settings import engine_settings
from jaxllm.startup.setup import read_setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """An engine that fits."""

    #: beside the fixed ones
    arguments: Mapping[str, Any]
    args: EngineArgs
    config: RunnerConfig
    plan: MemoryPlan
    settings: EngineSettings


class Planner:
    """Plans engines of one model on one kind of device, with estimated activations (`planning.estimate`).

    Args:
        fixed: engine arguments that all of them have.
        gpu: a device that need not be there; None: those of this machine.
        num_devices: how many there are of it; None: as many as the fixed arguments ask for. Here, as JAX has.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        fixed: Mapping[str, Any],
        *,
        gpu: GPU | None = None,
        num_devices: int | None = None,
    ) -> None:
        self.model, self.fixed, self.gpu = model, dict(fixed), gpu
        self._num_devices = num_devices
        self._here = functools.cache(lambda grid, together: target_here(self._platform, grid, together=together))
        #: what an engine that ran needed for its activations, by what was estimated for it
        self.activation_factor = 1.0
        self._found: dict[tuple[tuple[str, str], ...], Capacity | ValidationError] = {}

    @property
    def _platform(self) -> str:
        return str(self.fixed.get("device") or "auto")

    def capacity(self, arguments: Mapping[str, Any]) -> Capacity:
        """Of an engine with these arguments beside the fixed ones.

        Raises:
            ValidationError: there is no such engine, or it does not fit (`DoesNotFitError`).
        """
        key = tuple(sorted((name, repr(value)) for name, value in arguments.items()))
        found = self._found.get(key)
        if found is None:
            try:
                with quiet():
                    found = self._plan(arguments)
            except ValidationError as error:
                found = error
            self._found[key] = found
        if isinstance(found, ValidationError):
            raise found
        return found

    def hold(self, arguments: Mapping[str, Any]) -> None:
        """Hold more arguments fixed."""
        self.fixed |= arguments
        self._found.clear()

    def learn(self, settings: EngineSettings) -> None:
        """Take what an engine that ran needed beside weights and cache for true; it had the fixed arguments, and the
        parallel sizes of its settings.
        """
        try:
            sizes = {name: getattr(settings, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
            found = self.capacity({name: size for name, size in sizes.items() if size > 1})
        except ValidationError:
            return
        state = found.plan.state_bytes
        estimated = found.plan.activation_bytes / self.activation_factor
        if estimated and settings.other_bytes and settings.other_bytes > state:
            self.activation_factor = (settings.other_bytes - state) / estimated
            self._found.clear()

    @functools.cached_property
    def num_devices(self) -> int:
        """That an engine may be spread over."""
        if self._num_devices is not None:
            return self._num_devices
        if self.gpu is not None:
            return engine_args(self.model, **self.fixed).grid.size
        import jax

        return jax.local_device_count()

    def grids(self) -> list[Grid]:
        """Ways to spread the model over all devices, or fewer: (data, stage, tensor), the simplest first."""
        args = engine_args(self.model, **self.fixed)
        model = self._model_config(args)
        splits = split_sizes(model)
        found = []
        for tensor in splits:
            for stage in range(1, self.num_devices // tensor + 1):
                for data in range(1, self.num_devices // (tensor * stage) + 1):
                    sizes = (tensor, stage, data)
                    if any(size & (size - 1) for size in sizes) or stage > model.num_layers:
                        continue
                    found.append(Grid(data=data, stage=stage, tensor=tensor))
        return sorted(found, key=lambda grid: (grid.size, grid.tensor, grid.stage))

    def longest(self) -> int:
        """Tokens of the longest context that the model knows."""
        return self._model_config(engine_args(self.model, **self.fixed)).max_position_embeddings

    def generates(self) -> bool:
        with config_path(args := engine_args(self.model, **self.fixed)) as path:
            return read_setup(args, path).pooler is None

    def has_latents(self) -> bool:
        model = self._model_config(engine_args(self.model, **self.fixed))
        return isinstance(model, DecoderConfig) and model.latents is not None

    def _model_config(self, args: EngineArgs) -> ModelConfig:
        with quiet(), config_path(args) as path:
            return read_setup(args, path).model

    def _target(self, args: EngineArgs) -> Target:
        if self.gpu is not None:
            return target_described(self.gpu, grid=args.grid)
        return self._here(args.grid, args.steps_together)

    def _plan(self, arguments: Mapping[str, Any]) -> Capacity:
        args = engine_args(self.model, **{**self.fixed, **arguments})
        if args.grid.size > self.num_devices:
            raise ValidationError(f"{args.grid} needs {args.grid.size} devices, and there are {self.num_devices}.")
        with config_path(args) as path:
            setup = read_setup(args, path)
            target = self._target(args)
            config = setup.runner_config(target if args.steps_together else target.replica(0), progress=None)
        config, plan = plan_memory(config, self._activations)
        settings = engine_settings(setup.args, config, config.scheduler, plan, num_devices=self.num_devices)
        return Capacity(arguments=dict(arguments), args=setup.args, config=config, plan=plan, settings=settings)

    def _activations(self, config: RunnerConfig, num_blocks: int) -> tuple[int, ...]:
        return tuple(math.ceil(size * self.activation_factor) for size in estimated_activations(config, num_blocks))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Engines that are only tried log nothing but errors."""
    logger = logging.getLogger("jaxllm")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
