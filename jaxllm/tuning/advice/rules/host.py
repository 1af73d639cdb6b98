"""The device waited for the host."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.config.resolve import CPU_DECODE_STEPS_SEQS, GPU_DECODE_STEPS_SEQS
from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load

KIND = "host time"
FEWEST_STEPS, FEWEST_SECONDS = 32, 0.02
#: of the time, the host's, where steps follow each other without overlap
SHARE = 0.2
#: of the host's work, what it has to wait for the device, if that is busy all the time
WAITS = 0.1
#: decode steps of a launch: at first, and at most
FIRST, MOST = 8, 32


def advise(load: Load) -> Iterator[Advice]:
    """The host's work beside the device's, or several steps for each turn of the host."""
    settings, steps = load.settings, load.count("jaxllm:steps")
    host, waited = load.count("jaxllm:host_seconds"), load.count("jaxllm:device_wait_seconds")
    if steps < FEWEST_STEPS or host < FEWEST_SECONDS:
        return
    setting, single_steps = None, settings.one_step_at_a_time or settings.num_speculative_tokens
    if not settings.async_scheduling:
        if host >= SHARE * (host + waited):
            setting = Setting("async_scheduling", True)
    elif waited < WAITS * host and settings.num_decode_steps < MOST and not single_steps:
        most = CPU_DECODE_STEPS_SEQS if settings.platform == "cpu" else GPU_DECODE_STEPS_SEQS
        if load.gauge("jaxllm:most_running") <= most:
            value = max(FIRST, 2 * settings.num_decode_steps)
            setting = Setting("num_decode_steps", value, "where nobody waits and nothing is streamed")
    if setting is None:
        return
    yield Advice(
        kind=KIND,
        evidence=f"of {steps:.0f} steps, the host worked {host:.2f} s and waited {waited:.2f} s for the device",
        numbers={"steps": steps, "host_seconds": host, "device_wait_seconds": waited},
        setting=setting,
    )
