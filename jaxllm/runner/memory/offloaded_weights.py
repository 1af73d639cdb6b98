"""How much of the weights lies in the host's memory (`cpu_offload_gb`)."""

from __future__ import annotations

import dataclasses
import logging
import math

from jaxllm.api.errors import ValidationError
from jaxllm.runner.runner_config import RunnerConfig

logger = logging.getLogger("jaxllm")


def with_offloaded_weights(config: RunnerConfig, gibibytes: float) -> RunnerConfig:
    """A configuration with up to so many GiB of each device's weights in the host's memory.

    Raises:
        ValidationError: they are not as much as a layer has, or the machine does not have them.
    """
    config = dataclasses.replace(config, cpu_offload_bytes=int(gibibytes * 2**30))
    asked, target = f"cpu_offload_gb={gibibytes:g}", config.target
    if target.num_processes > 1:
        raise ValidationError(
            f"{asked} with devices of {target.num_processes} processes: weights are copied from the host on devices "
            "of one process so far. Leave it out."
        )
    least = max(min(stage.layer_bytes) for stage in config.stages)
    if least > config.cpu_offload_bytes:
        raise ValidationError(
            f"{asked} holds no layer: one has {least / 2**30:.3g} GiB on each device. Set it to at least "
            f"{math.ceil(least / 2**30 * 1000) / 1000:g}, or leave it out."
        )
    each = [stage.host_weight_bytes for stage in config.stages]
    whole, left = sum(each) * target.replicas * target.num_devices * config.data_parallel_size, target.host_bytes
    if config.platform == "cpu":
        logger.warning(
            "%s has no use on a CPU, whose own memory is the host's: each step copies these layers, and nothing is "
            "saved.",
            asked,
        )
    elif left is not None and whole > left:
        raise ValidationError(
            f"{asked} does not fit: the weights of all devices would take {whole / 2**30:.3f} GiB of the machine's "
            f"memory, and it has {left / 2**30:.3f} GiB available. Set it to at most "
            f"{gibibytes * left / whole:.3f}."
        )
    logger.info(
        "%s: the weights of %d of %d layers, %.3f GiB of each device, lie in the host's memory, and each step "
        "copies them to the device.",
        asked,
        len(config.offloaded),
        config.model.num_layers,
        max(each) / 2**30,
    )
    return config
