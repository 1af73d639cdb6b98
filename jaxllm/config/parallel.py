"""How the model and its requests are spread over devices."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from jaxllm.config.argument import Arguments, argument, switch
from jaxllm.config.argument_checks import at_least, devices, layer_partition


class Grid(NamedTuple):
    """How many devices an engine has along each axis of the mesh, outermost first."""

    #: copies of the model
    data: int = 1
    #: runs of layers, each on devices of its own
    stage: int = 1
    #: devices that share every layer
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self)

    def __str__(self) -> str:
        """The arguments that ask for more than one device."""
        names = ("data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size")
        asked = [f"{name}={count}" for name, count in zip(names, self, strict=True) if count > 1]
        return " x ".join(asked) or "tensor_parallel_size=1"


ONE_DEVICE = Grid()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Arguments):
    """The sizes of the mesh's axes, under vLLM's names."""

    #: a CPU becomes as many devices
    tensor_parallel_size: int = argument(
        1, at_least(1, devices), "devices that share every layer", group="parallel", short="-tp"
    )
    #: stages of layers, each on devices of its own
    pipeline_parallel_size: int = argument(
        1, at_least(1, devices), "stages of layers, each on devices of its own", group="parallel", short="-pp"
    )
    #: vLLM's environment variable VLLM_PP_LAYER_PARTITION, as numbers then; None: as equally as it goes
    pipeline_layer_partition: str | tuple[int, ...] | None = argument(
        None,
        layer_partition,
        "layers of each stage, such as 5,3 (default: as equally as it goes)",
        group="parallel",
        form="N,N,...",
    )
    #: on a CPU, copies of a model that is not split share one copy of its weights
    data_parallel_size: int = argument(
        1, at_least(1, devices), "copies of the model, each with requests of its own", group="parallel", short="-dp"
    )
    #: whether experts are spread over devices as wholes, not each of them split
    enable_expert_parallel: bool = switch(
        False, "devices have experts as wholes, not a part of each of them", group="parallel"
    )
    #: in the metrics and in traces
    record_expert_load: bool = switch(False, "count how many tokens each expert of each layer gets", group="parallel")

    @property
    def steps_together(self) -> bool:
        """Whether copies of the model have its experts between them, so that none takes a step without the others."""
        return self.enable_expert_parallel and self.data_parallel_size > 1

    @property
    def grid(self) -> Grid:
        return Grid(self.data_parallel_size, self.pipeline_parallel_size, self.tensor_parallel_size)
