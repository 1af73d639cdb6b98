"""Arguments that contradict each other, the model or the device; each names the value that would work.

What depends on numbers that are only decided later stands where these are decided: the limits of a step in
`jaxllm.config.resolve`, how a model splits in `jaxllm.parallel.rules`, what fits into memory in `jaxllm.runner.memory`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.api.logits_processor import hosts
from jaxllm.config.lora import check_lora
from jaxllm.config.refusals import host_blocks, several_decode_steps, stepping_together

if TYPE_CHECKING:
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.config.speculative import SpeculativeConfig

logger = logging.getLogger("jaxllm")


def check_together(args: EngineArgs) -> None:
    """Raise ValidationError for arguments that contradict each other, whatever the model and the device."""
    if args.pooler_config is not None and args.override_pooler_config is not None:
        raise ValidationError("pooler_config and override_pooler_config are two names of one thing; set one.")
    tokens, seqs = args.max_num_batched_tokens, args.max_num_seqs
    if tokens is not None and seqs is not None and tokens < seqs:
        raise ValidationError(
            f"max_num_batched_tokens ({tokens}) must be greater than or equal to max_num_seqs ({seqs}): a step gives "
            "every running request at least one token."
        )
    if args.record_expert_load and args.load_format == "null":
        raise ValidationError('record_expert_load=True with load_format="null": there is no model. Leave it out.')
    if args.cpu_offload_gb and args.load_format == "null":
        raise ValidationError(
            f'cpu_offload_gb={args.cpu_offload_gb:g} with load_format="null": there are no weights. Leave it out.'
        )
    check_lora(args)
    if on_host := hosts(args.logits_processors):
        _check_on_host(args, on_host[0].name)
    if args.speculative_config is not None:
        _check_drafts(args)
    if args.steps_together:
        _check_stepping_together(args)
    check_host_blocks(args)
    steps = args.num_decode_steps
    if steps is not None and steps > 1 and (refusal := several_decode_steps(args)):
        raise ValidationError(f"{refusal.asked} and num_decode_steps={steps}: {refusal.why}")


def check_host_blocks(args: EngineArgs, *, num_processes: int = 1) -> None:
    """Raise ValidationError where blocks are to be kept in the host's memory, and cannot be (`host_blocks`)."""
    if args.kv_offloading_size and (refusal := host_blocks(args, num_processes=num_processes)):
        raise ValidationError(f"{refusal.asked} and kv_offloading_size={args.kv_offloading_size:g}: {refusal.why}")


def _check_on_host(args: EngineArgs, name: str) -> None:
    """Raise ValidationError for what does not go with a logits processor that is a class of vLLM's."""
    remedy = f"or write {name} as a jax function (jaxllm.LogitsProcessor)"
    if args.speculative_config is not None:
        raise ValidationError(
            f"Custom logits processors are not supported when speculative decoding is enabled: {name} is told of "
            f"tokens, and drafts are none yet. Leave speculative_config out, {remedy}."
        )
    if args.grid.size > 1:
        raise ValidationError(
            f"{args.grid} with the logits processor {name}, a class for torch: several devices would call it at once. "
            f"Use one device, {remedy}."
        )


def _check_drafts(args: EngineArgs) -> None:
    """Raise ValidationError for what does not go with drafts."""
    asked = "speculative_config"
    if args.steps_together:
        raise ValidationError(
            f"{asked} with enable_expert_parallel=True and data_parallel_size={args.data_parallel_size}: replicas that "
            "have the experts between them take the same steps, and drafts make them differ. Leave one of them out."
        )
    if args.enforce_eager:
        raise ValidationError(
            f"{asked} with enforce_eager=True: programs that check drafts are not among the few that it compiles. "
            "Leave one of them out."
        )
    config = args.speculative_config
    assert config is not None
    if config.has_layers:
        _check_draft_model(args, config)


def _check_draft_model(args: EngineArgs, config: SpeculativeConfig) -> None:
    """Raise ValidationError for what does not go with a model that drafts."""
    asked, devices = f"speculative_config.method={config.method!r}", config.draft_tensor_parallel_size
    if devices not in (None, args.tensor_parallel_size):
        raise ValidationError(
            f"speculative_config.draft_tensor_parallel_size={devices} with tensor_parallel_size="
            f"{args.tensor_parallel_size}: what drafts is split over the same devices. Leave it out, or set "
            f"it to {args.tensor_parallel_size}."
        )
    if args.enable_prompt_embeds:
        raise ValidationError(
            f"{asked} and enable_prompt_embeds=True: vectors of prompts are of the large model, and what drafts "
            "reads tokens. Leave one of them out, or take method='ngram'."
        )


def _check_stepping_together(args: EngineArgs) -> None:
    """Raise ValidationError for what replicas that have a model's experts between them cannot do."""
    asked, stages = stepping_together(args), args.pipeline_parallel_size
    if stages > 1:
        raise ValidationError(
            f"{asked} and pipeline_parallel_size={stages}: replicas that have the experts between them take each step "
            f"in one program, and stages have programs of their own. Set pipeline_parallel_size=1 and "
            f"tensor_parallel_size={stages * args.tensor_parallel_size}, or leave enable_expert_parallel out."
        )


def check_pooling(args: EngineArgs) -> None:
    """Raise ValidationError for arguments that an engine which pools cannot honour."""
    if args.speculative_config is not None:
        raise ValidationError("speculative_config drafts what is sampled, and a pooling engine samples nothing.")
    if args.load_format == "null":
        raise ValidationError('load_format="null" generates only; it has no vectors to pool.')
    if args.logits_processors:
        raise ValidationError("logits_processors change what is sampled, and a pooling engine samples nothing.")
    if args.num_decode_steps is not None and args.num_decode_steps > 1:
        logger.warning("num_decode_steps=%d has no effect: a pooling engine samples nothing.", args.num_decode_steps)


def check_whole_prompts(args: EngineArgs) -> None:
    """Raise ValidationError for arguments that a model which sees whole prompts cannot honour."""
    tokens, longest = args.max_num_batched_tokens, args.max_model_len or 0
    if tokens is not None and longest > tokens:
        raise ValidationError(
            f"max_num_batched_tokens ({tokens}) is smaller than max_model_len ({longest}), and a model that sees whole "
            f"prompts computes each in one step. Set max_num_batched_tokens to at least {longest}, or max_model_len to "
            f"at most {tokens}."
        )


def check_deterministic(platform: str, *, pools: bool, latents: bool = False) -> None:
    """Raise ValidationError where `EngineArgs.deterministic` cannot be kept."""
    if platform != "cpu":
        raise ValidationError(
            "deterministic=True is only available on a CPU so far: on a GPU, the order in which numbers are added up "
            "depends on what else is in a step. Leave it out, or pass device='cpu'."
        )
    if pools:
        raise ValidationError("deterministic=True is only available for models that generate. Leave it out.")
    if latents:
        raise ValidationError(
            "deterministic=True is not available for models with latent attention: the products of their heads are "
            "added up in an order that depends on how many tokens a step has. Leave it out."
        )


def check_pipeline(stages: int, *, pools: bool, drafts: bool) -> None:
    """Raise ValidationError for what an engine of several pipeline stages cannot do."""
    refused = f"pipeline_parallel_size={stages}"
    if pools:
        raise ValidationError(
            f"{refused} is only available for models that generate. Set pipeline_parallel_size=1; "
            "tensor_parallel_size spreads a pooling model over devices."
        )
    if drafts:
        raise ValidationError(
            f"{refused} with speculative_config: drafts are made where tokens are sampled, and a pipeline begins at "
            "another device. Leave speculative_config out, or set pipeline_parallel_size=1; tensor_parallel_size "
            "spreads the model over devices, too."
        )
