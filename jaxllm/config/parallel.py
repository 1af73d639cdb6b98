"""How the model and its requests are spread over devices."""

from __future__ import annotations

import dataclasses

from jaxllm.config.argument import Arguments, argument, not_yet
from jaxllm.config.argument_checks import at_least, layer_partition

_CAPABILITY = "parallelism"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Arguments):
    """The sizes of the mesh's axes, under vLLM's names."""

    #: a CPU becomes as many devices
    tensor_parallel_size: int = argument(
        1, at_least(1), "devices that share every layer", group="parallel", short="-tp"
    )
    #: stages of layers, each on devices of its own
    pipeline_parallel_size: int = argument(
        1, at_least(1), "stages of layers, each on devices of its own", group="parallel", short="-pp"
    )
    #: vLLM's environment variable VLLM_PP_LAYER_PARTITION; None: as equally as it goes
    pipeline_layer_partition: tuple[int, ...] | None = argument(
        None,
        layer_partition,
        "layers of each stage, such as 5,3 (default: as equally as it goes)",
        group="parallel",
        form="N,N,...",
    )
    #: copies of the model, each with requests of its own
    data_parallel_size: int = not_yet(1, _CAPABILITY, short="-dp")
    #: whether experts are spread over devices as wholes, not each of them split
    enable_expert_parallel: bool = not_yet(False, _CAPABILITY)
