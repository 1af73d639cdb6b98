"""Steps are padded to the size of a compiled program, and on a CPU padding costs what tokens cost."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.tuning.advice.advice import Advice, Setting
from jaxllm.tuning.advice.load import Load

KIND = "padding"
FEWEST_STEPS = 8
#: of what was computed: with the few sizes of ``enforce_eager``, and of steps that only decode
EAGER_SHARE, SHARE = 0.5, 0.25


def advise(load: Load) -> Iterator[Advice]:
    """All sizes; or as many requests at once as fill one."""
    if load.settings.platform != "cpu":
        return
    tokens, computed = load.count("jaxllm:step_tokens"), load.count("jaxllm:step_bucket_tokens")
    if load.settings.enforce_eager and load.count("jaxllm:steps") >= FEWEST_STEPS:
        if computed and 1 - tokens / computed >= EAGER_SHARE:
            yield _advice(computed - tokens, computed, "all steps", Setting("enforce_eager", False, "a longer start"))
            return
    if load.steps is None:
        return
    steps = load.steps
    decoding = (steps["num_prefill_tokens"] == 0) & (steps["num_drafted_tokens"] == 0) & (steps["bucket_tokens"] > 0)
    # launches of several steps are padded to other sizes
    decoding &= steps["num_decode_tokens"] == steps["num_seqs"]
    if decoding.sum() < FEWEST_STEPS:
        return
    computed = float(steps["bucket_tokens"][decoding].sum())
    unused = computed - float(steps["num_seqs"][decoding].sum())
    most = int(steps["num_seqs"][decoding].max())
    value = 1 << (most.bit_length() - 1)
    if unused < SHARE * computed or value == most or value < 8:
        return
    setting = Setting("max_num_seqs", value, "others wait meanwhile")
    yield _advice(unused, computed, f"steps that decode up to {most} requests", setting)


def _advice(unused: float, computed: float, what: str, setting: Setting) -> Advice:
    return Advice(
        kind=KIND,
        evidence=f"{unused:.0f} of {computed:.0f} tokens of {what} were padding ({unused / computed:.0%})",
        numbers={"padding": unused, "computed": computed},
        setting=setting,
    )
