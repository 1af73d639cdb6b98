"""An engine is planned for some devices and explained, and when it does not fit, planned again with each argument that
could help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.engine_args import EngineArgs
from jaxllm.config.parallel import Grid
from jaxllm.config.scheduler import SchedulerConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.parallel.collectives import count_collectives, expected_collectives
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.rules import exchanging_layers, layer_sums, split_sizes
from jaxllm.planning.estimate import estimated_activations
from jaxllm.planning.explain import explanation
from jaxllm.planning.explanation import Explanation
from jaxllm.planning.plan import Plan, Remedy
from jaxllm.runner.build import make_programs
from jaxllm.runner.compile.deviceless import lowering_for
from jaxllm.runner.compile.programs import Programs
from jaxllm.runner.compile.target import Target
from jaxllm.runner.heads.pipeline_programs import PipelinePrograms
from jaxllm.runner.heads.sampling_programs import SAMPLE_ROWS_GPU
from jaxllm.runner.memory.fit import DoesNotFitError, plan_memory
from jaxllm.runner.memory.plan import GIB, MemoryPlan
from jaxllm.runner.runner_config import RunnerConfig
from jaxllm.startup.setup import Setup, read_setup

logger = logging.getLogger("jaxllm")

#: more devices than one machine has are not proposed
MOST_DEVICES = 16
#: steps of fewer tokens would make prompts slow
FEWEST_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question is what is to be planned.

    Args:
        args: the engine's; which devices is not among them.
        path: of the model, a directory with a config.json or a .gguf file.
        target: how many devices -> the devices, with the same memory whenever it is asked.
    """

    args: EngineArgs
    path: Path
    target: Callable[[Grid], Target]
    #: the devices are this machine's, which has no more of them
    is_local: bool

    def setup(self) -> Setup:
        return read_setup(self.args, self.path)


def answer(question: Question, *, device: str, basis: str) -> Plan:
    """Return the plan of a question, and the remedies when it does not fit.

    Args:
        device: as the user called it.
        basis: what is said of where the numbers come from.

    Raises:
        ValidationError: what was asked contradicts itself or the model.
    """
    planner = _Planner()
    plan, refusal = _answer(question, planner, device, basis)
    if refusal is None:
        return plan
    return dataclasses.replace(plan, remedies=tuple(_remedies(question, refusal, planner)))


def explain(question: Question, *, device: str, basis: str) -> Explanation:
    """Return how the plan of a question comes about. What would make it fit is not tried.

    Args:
        device: as the user called it.
        basis: what is said of where the numbers come from.

    Raises:
        ValidationError: what was asked contradicts itself or the model.
    """
    planner = _Planner()
    plan, refusal = _answer(question, planner, device, basis)
    if refusal is not None:
        plan = dataclasses.replace(plan, problem=f"{plan.problem} `jaxllm plan` finds what would make it fit.")
    config, programs = planner.planned
    limits = dataclasses.replace(config.scheduler, max_model_len=plan.memory.max_model_len)
    with planner.lowering(config):
        config = dataclasses.replace(config, scheduler=limits)
        return explanation(plan, config, programs, replicas=question.args.data_parallel_size)


def _answer(question: Question, planner: _Planner, device: str, basis: str) -> tuple[Plan, DoesNotFitError | None]:
    """The plan of a question without remedies, and why it does not fit, where it does not."""
    refusal = None
    try:
        memory = planner.plan(question)
    except DoesNotFitError as error:
        refusal, memory = error, error.plan
    plan = Plan(
        model=str(question.args.model),
        device=device,
        memory=memory,
        fits=refusal is None,
        # what would help is tried, and said by the remedies alone
        problem="" if refusal is None else refusal.problem,
        remedies=(),
        collectives=planner.collectives,
        exact=planner.compiled,
        basis=basis,
    )
    return plan, refusal


class _Planner:
    """Plans by compiling where there is something to compile for, by an estimate elsewhere."""

    def __init__(self) -> None:
        #: of what was planned last
        self.collectives: dict[str, int] = {}
        self.dtype = ""
        self.compiled = False
        self._is_local = True
        #: the configuration, and its programs where they can be compiled
        self.planned: tuple[RunnerConfig, Programs | PipelinePrograms | None]
        self._needed: dict[SchedulerConfig, Sequence[int]] = {}

    def plan(self, question: Question) -> MemoryPlan:
        """Plan what is asked; raises DoesNotFitError, whose plan has its activations."""
        target = question.target(question.args.grid)
        target = target if question.args.steps_together else target.replica(0)
        config = question.setup().runner_config(target, progress=None)
        self.dtype = config.dtype
        self.compiled = target.devices is not None
        self._is_local = question.is_local
        self._needed.clear()
        self.planned = config, None
        # on a CPU the slices of a step are as many as it has, on a GPU as many as it may have
        slices = 1 if target.platform == "cpu" else -(-config.scheduler.max_num_seqs // SAMPLE_ROWS_GPU[-1])
        slices = 0 if config.pooler is not None else slices
        self.collectives = expected_collectives(
            config.model.num_layers,
            target.num_devices,
            layer_sums=layer_sums(config.model),
            slices=slices,
            exchanging=exchanging_layers(config.model, target.replicas),
        )
        plan = plan_memory(config, self._compile if self.compiled else estimated_activations, measure_first=True)[1]
        programs = self.planned[1]
        if programs is not None:
            plan = dataclasses.replace(plan, encoder_activation_bytes=programs.encoder_activation_bytes())
        return plan

    def _compile(self, config: RunnerConfig, num_blocks: int) -> Sequence[int]:
        # temporaries do not grow with the cache (tests/compile_cuda), and nothing runs the programs
        if config.scheduler in self._needed:
            return self._needed[config.scheduler]
        if not self._is_local:
            # the cache of compiled programs is for the devices that are here
            config = dataclasses.replace(config, compile_cache=None)
        else:
            limits = config.scheduler
            logger.info(
                "Compiling the engine's largest programs for %s (%d tokens of %d requests a step, max_model_len %d)",
                config.target.kind,
                limits.max_num_batched_tokens,
                limits.max_num_seqs,
                limits.max_model_len,
            )
        programs = make_programs(config, config.params(), num_blocks)
        self.planned = config, programs
        with self.lowering(config):
            found = programs.activation_bytes()
            needed = self._needed[config.scheduler] = (found,) if isinstance(found, int) else found
            if isinstance(programs, Programs) and config.target.replicas * config.target.num_devices > 1:
                texts = programs.step_texts(programs.largest.tokens, programs.largest.seqs)
                self.collectives = dict(sum((Counter(count_collectives(text)) for text in texts), Counter[str]()))
        return needed

    def lowering(self, config: RunnerConfig) -> contextlib.AbstractContextManager[None]:
        """Programs are lowered for the devices of a configuration inside."""
        if self._is_local or config.target.devices is None:
            return contextlib.nullcontext()
        # the devices that a program is compiled for, also where there is but one
        devices = config.target.devices
        return lowering_for(make_mesh(devices[0, 0] if config.target.replicas == 1 else devices[:, 0]))


def _remedies(question: Question, refusal: DoesNotFitError, planner: _Planner) -> Iterator[Remedy]:
    """Yield arguments that make it fit, each planned."""

    def tried(argument: str, value: Any) -> Remedy | None:
        again = dataclasses.replace(question, args=dataclasses.replace(question.args, **{argument: value}))
        try:
            return Remedy(argument=argument, value=value, plan=planner.plan(again))
        except DoesNotFitError as error:
            # shorter requests may need a little more for activations: XLA's temporaries are not monotonic
            shorter = argument == "max_model_len" and 1 <= error.longest < value
            return tried(argument, error.longest) if shorter else None
        except ValidationError:
            return None

    for argument, value in _candidates(question.args, refusal, planner.dtype):
        found = tried(argument, value)
        if found is not None:
            yield found
    for argument, values in _smaller_weights(question.args, refusal):
        found = next(filter(None, (tried(argument, value) for value in values)), None)
        if found is not None:
            yield found
    model = question.setup().model
    if question.is_local or not isinstance(model, DecoderConfig):
        return
    for devices in split_sizes(model, replicas=question.args.data_parallel_size if question.args.steps_together else 1):
        if question.args.tensor_parallel_size < devices <= MOST_DEVICES and not devices & (devices - 1):
            found = tried("tensor_parallel_size", devices)
            if found is not None:
                yield found
                return


def _candidates(args: EngineArgs, refusal: DoesNotFitError, dtype: str) -> Iterator[tuple[str, Any]]:
    """Yield arguments and values that may make it fit on as many devices, where the weights are of `dtype`."""
    plan = refusal.plan
    if refusal.longest >= 1:
        yield "max_model_len", refusal.longest
    if args.num_gpu_blocks_override is not None:
        yield "num_gpu_blocks_override", refusal.enough_blocks
    elif args.kv_cache_memory_bytes is not None:
        yield "kv_cache_memory_bytes", refusal.enough_blocks * plan.kv_cache_bytes // plan.num_blocks
    else:
        share = math.ceil(refusal.share * 1000 + 1) / 1000
        if args.gpu_memory_utilization < share <= 1:
            yield "gpu_memory_utilization", share
        missing = (refusal.share - args.gpu_memory_utilization) * plan.total_bytes
        tokens = plan.max_num_batched_tokens
        while plan.activation_bytes * (1 - tokens / plan.max_num_batched_tokens) < missing and tokens > 0:
            tokens //= 2
        if max(FEWEST_TOKENS, plan.max_num_seqs) <= tokens < plan.max_num_batched_tokens:
            yield "max_num_batched_tokens", tokens
    if dtype == "float32":
        yield "dtype", "bfloat16"


def _smaller_weights(args: EngineArgs, refusal: DoesNotFitError) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield arguments, each with values of which the first that makes it fit costs least."""
    plan = refusal.plan
    if args.quantization is None:
        yield "quantization", ("int8", "int4")
    if plan.platform != "cpu" and not args.cpu_offload_gb and refusal.share > args.gpu_memory_utilization:
        missing = math.ceil((refusal.share - args.gpu_memory_utilization) * plan.total_bytes / GIB)
        # of what lies on the host, layers are on the device while they are used
        yield "cpu_offload_gb", tuple(missing + more for more in (0, 1, 2, 4))
