"""Engine arguments whose values are searched."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.autotuning.capacity import Planner
from jaxllm.config.resolve import CPU_LIMITS
from jaxllm.runner.memory.fit import DoesNotFitError
from jaxllm.tuning.simulation.workload import Workload, WorkloadRequest

#: a length that is asked for is a multiple of so many tokens, so that the next workload's longest request fits, too
LENGTH_STEP = 128
#: steps of more tokens bring nothing more (`config.resolve`, vLLM's guides)
MOST_CPU_TOKENS, MOST_GPU_TOKENS = 2048, 32768
FEWEST_TOKENS, FEWEST_SEQS = 32, 2
#: arguments that decide how the model is spread over devices
GRID = TENSOR, STAGES, DATA = "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"
#: the knob of `TENSOR` and `DATA`, whose values are mappings
SPLIT = "parallelism"
#: what drafts are measured with, where a workload has real prompts
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3}
_HOLDS = "the KV cache holds the whole workload at once; more of it would stay empty"
#: requests that take longer to come than this come one by one, in seconds
AT_ONCE = 1.0
#: those that decide how large the KV cache is, of which one is enough
CACHE_SIZES = ("kv_cache_memory_bytes", "num_gpu_blocks_override")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """One argument, or several that only have values together."""

    #: the argument's; `SPLIT` stands for two
    name: str
    #: in an order in which neighbours are alike; of several arguments, a mapping each
    values: tuple[Any, ...]
    #: the engine's own, one of `values`
    default: Any
    #: what it trades for what
    why: str
    #: whether the simulator knows what it does; else it is measured, with the best of the rest
    is_simulated: bool = True

    def arguments(self, value: Any) -> dict[str, Any]:
        """The engine arguments of a value; {}: the default needs none."""
        if value == self.default:
            return {}
        return dict(value) if self.name == SPLIT else {self.name: value}

    def shown(self, value: Any) -> str:
        if self.name == SPLIT:
            return ", ".join(f"{name}={number}" for name, number in value.items()) or "one device"
        return str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Everything that is searched, and why the rest is not."""

    knobs: tuple[Knob, ...]
    #: argument -> why it is left as it is
    left: Mapping[str, str]
    #: those that are measured alone
    measured: tuple[Knob, ...] = ()

    @property
    def all_knobs(self) -> tuple[Knob, ...]:
        return (*self.knobs, *self.measured)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The engine arguments of a value for each knob; those that are the default are left out."""
        found: dict[str, Any] = {}
        for knob in self.all_knobs:
            found |= knob.arguments(values.get(knob.name, knob.default))
        return found

    def values(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs' values of such arguments."""
        found = {}
        for knob in self.all_knobs:
            if knob.name == SPLIT:
                own = {name: value for name, value in arguments.items() if name in (TENSOR, DATA)}
                found[knob.name] = own if own else knob.default
            else:
                found[knob.name] = arguments.get(knob.name, knob.default)
        return found

    @property
    def size(self) -> int:
        """How many combinations there are."""
        number = 1
        for knob in self.knobs:
            number *= len(knob.values)
        return number

    @classmethod
    def of(cls, planner: Planner, workload: Workload) -> Space:
        """What a platform can have, for a workload; what is held fixed is not searched.

        Raises:
            ValidationError: the fixed arguments contradict each other, the model or the workload.
        """
        left: dict[str, str] = {}
        knobs = []
        for name, found in _candidates(planner, workload):
            if name in planner.fixed or (name == SPLIT and any(each in planner.fixed for each in GRID)):
                left[name] = "you hold it fixed"
            elif isinstance(found, str):
                left[name] = found
            elif len(found.values) < 2:
                left[name] = "there is but one value that this workload and this device can have"
            else:
                knobs.append(found)
        return cls(
            knobs=tuple(knob for knob in knobs if knob.is_simulated),
            left=left,
            measured=tuple(knob for knob in knobs if not knob.is_simulated),
        )


def _candidates(planner: Planner, workload: Workload) -> Iterator[tuple[str, Knob | str]]:
    """Each argument with its knob, or with the reason why there is none."""
    plan = planner.capacity(fitting_grid(planner, {})).plan
    on_cpu = plan.platform == "cpu"
    longest_prompt = max(request.num_prompt_tokens for request in workload.requests)
    holds = holds_all(planner, workload)
    most_seqs = max(plan.max_num_seqs, CPU_LIMITS[1])
    seqs = _powers(FEWEST_SEQS, min(_power(len(workload)), most_seqs))
    yield (
        "max_num_seqs",
        Knob(
            name="max_num_seqs",
            values=_with(seqs, plan.max_num_seqs),
            default=plan.max_num_seqs,
            why="more requests at once share each reading of the weights; fewer leave more KV cache to each, are "
            "preempted less, and make each token come sooner",
        ),
    )
    most = MOST_CPU_TOKENS if on_cpu else MOST_GPU_TOKENS
    budgets = _powers(FEWEST_TOKENS, max(min(most, _power(workload.num_prompt_tokens)), FEWEST_TOKENS))
    yield (
        "max_num_batched_tokens",
        Knob(
            name="max_num_batched_tokens",
            values=_with(budgets, plan.max_num_batched_tokens),
            default=plan.max_num_batched_tokens,
            why="larger steps bring prompts in sooner and at a better rate; smaller ones keep the time between the "
            "tokens of others short",
        ),
    )
    yield "max_model_len", _length(planner, workload, plan.max_model_len)
    if on_cpu:
        yield "gpu_memory_utilization", "on a CPU the KV cache stops at 2 GiB, far below the machine's memory"
    elif any(name in planner.fixed for name in CACHE_SIZES):
        yield "gpu_memory_utilization", "the size of the KV cache is held fixed"
    elif holds:
        yield "gpu_memory_utilization", _HOLDS
    else:
        yield (
            "gpu_memory_utilization",
            Knob(
                name="gpu_memory_utilization",
                values=_with((0.8, 0.85, 0.9, 0.93, 0.95), plan.gpu_memory_utilization),
                default=plan.gpu_memory_utilization,
                why="what weights and activations leave of it is KV cache; nothing else may need the rest",
            ),
        )
    yield (
        "block_size",
        Knob(
            name="block_size",
            values=_with((16, 32, 64, 128) if on_cpu else (16, 32, 64), plan.block_size),
            default=plan.block_size,
            why="prefixes are shared, and the cache is handed out, in whole blocks: small ones waste less, large ones "
            "have shorter tables",
        ),
    )
    if planner.has_latents():
        yield "kv_cache_dtype", "pages of models with latent attention have no scales"
    elif holds:
        yield "kv_cache_dtype", f"{_HOLDS}, and would lose precision for nothing"
    else:
        yield (
            "kv_cache_dtype",
            Knob(
                name="kv_cache_dtype",
                values=("auto", "int8"),
                default="auto",
                why="int8 keeps twice the tokens in the same memory, and what is generated differs a little",
            ),
        )
    thresholds = tuple(size for size in (64, 128, 256, 512, 1024, 2048, 4096) if size < longest_prompt)
    yield (
        "long_prefill_token_threshold",
        Knob(
            name="long_prefill_token_threshold",
            values=(0, *thresholds),
            default=0,
            why="a long prompt leaves a part of each step to others; 0: it may take all of it",
        ),
    )
    yield "max_num_partial_prefills", "jaxllm computes parts of any number of prompts in a step, within its tokens"
    if streams(workload):
        yield "num_decode_steps", "requests that come one by one are streamed, and streams get each token by itself"
    else:
        yield (
            "num_decode_steps",
            Knob(
                name="num_decode_steps",
                values=(1, 4, 8, 16),
                default=plan_steps(planner),
                why="several tokens of each request in one launch save the host's time, where nobody waits",
            ),
        )
    yield SPLIT, _grid(planner)
    yield STAGES, _stages(planner)
    if planner.gpu is not None or not all(known_tokens(request) is not None for request in workload.requests):
        where = "nothing is measured" if planner.gpu is not None else "the workload has lengths and no prompts"
        yield "speculative_config", f"how many drafts would be right is not known: {where}"
    else:
        yield (
            "speculative_config",
            Knob(
                name="speculative_config",
                values=(None, DRAFTS),
                default=None,
                why="several tokens a step where outputs repeat what was there before; drafts that are wrong cost time",
                is_simulated=False,
            ),
        )


def fitting_grid(planner: Planner, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest devices over which a model is split that fits with the arguments; {}: it fits as it is.

    Raises:
        DoesNotFitError: it fits nowhere.
    """
    try:
        planner.capacity(arguments)
    except DoesNotFitError:
        if any(name in planner.fixed for name in GRID):
            raise
        for grid in planner.grids():
            found = {TENSOR: grid.tensor}
            try:
                if grid.size == grid.tensor > 1:
                    planner.capacity({**arguments, **found})
                    return found
            except ValidationError:
                continue
        raise
    return {}


def needed_length(planner: Planner, workload: Workload) -> int:
    """The shortest `max_model_len` that is searched."""
    return min(-(-workload.longest // LENGTH_STEP) * LENGTH_STEP, planner.longest())


def plan_steps(planner: Planner) -> int:
    return int(planner.fixed.get("num_decode_steps") or 1)


def _length(planner: Planner, workload: Workload, default: int) -> Knob | str:
    needed = needed_length(planner, workload)
    lengths = sorted({needed, default}) if needed < default else [default]
    return Knob(
        name="max_model_len",
        values=tuple(lengths),
        default=default,
        why=f"the longest request of the workload has {workload.longest} tokens; room for longer ones is kept in "
        "tables, and one of them has to fit into the KV cache",
    )


def _grid(planner: Planner) -> Knob | str:
    if planner.num_devices == 1:
        return "there is one device"
    grids = [grid for grid in planner.grids() if grid.stage == 1]
    sizes = ({TENSOR: grid.tensor, DATA: grid.data} for grid in grids)
    values = tuple({name: size for name, size in each.items() if size > 1} for each in sizes)
    if len(values) < 2:
        return "the model cannot be split over the devices that there are"
    return Knob(
        name=SPLIT,
        values=values,
        default=values[0],
        why="tensor parallelism shortens every step and exchanges within it; replicas exchange nothing, and each has "
        "all the weights",
    )


def _stages(planner: Planner) -> Knob | str:
    if planner.num_devices == 1:
        return "there is one device"
    if planner.gpu is not None:
        return "pipelines are not simulated, and nothing is measured"
    sizes = sorted({grid.stage for grid in planner.grids() if grid.tensor == grid.data == 1})
    return Knob(
        name=STAGES,
        values=tuple(sizes),
        default=1,
        why="stages exchange less than a split of every layer, and fill where several requests run",
        is_simulated=False,
    )


def _powers(least: int, most: int) -> tuple[int, ...]:
    return tuple(1 << power for power in range(least.bit_length() - 1, most.bit_length()) if 1 << power >= least)


def _power(number: int) -> int:
    """The power of two that is not below it."""
    return 1 << max(number - 1, 0).bit_length()


def _with(values: Sequence[Any], default: Any) -> tuple[Any, ...]:
    return tuple(sorted({*values, default}))


def known_tokens(request: WorkloadRequest) -> list[int] | None:
    """The tokens of a prompt, where the workload was made of prompts; None: only lengths are known."""
    if not request.piece_ids or not all(isinstance(piece, tuple) for piece in request.piece_ids):
        return None
    tokens = [token for piece in request.piece_ids if isinstance(piece, tuple) for token in piece]
    return tokens if len(tokens) == request.num_prompt_tokens else None


def streams(workload: Workload) -> bool:
    """Whether somebody waits for each token: requests come one by one."""
    return workload.seconds > AT_ONCE


def holds_all(planner: Planner, workload: Workload) -> bool:
    """Whether the KV cache has room for all that may want it, with the defaults and as many requests at once as there
    are: the longest of them, or all where prompts share something, which is worth keeping.
    """
    most = {} if "max_num_seqs" in planner.fixed else {"max_num_seqs": _power(len(workload))}
    try:
        plan = planner.capacity({**fitting_grid(planner, {}), **most}).plan
    except ValidationError:
        return False
    lengths = (each.num_prompt_tokens + each.num_output_tokens for each in workload.requests)
    sizes = sorted((-(-length // plan.block_size) for length in lengths), reverse=True)
    return sum(sizes if workload.shared else sizes[: plan.max_num_seqs]) < plan.num_blocks
