"""Adapters of a model that is about to start: what they go with, and what reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.engine.adapters import AdapterStore
from jaxllm.models.adapters import adapter_modules, adapter_tables
from jaxllm.models.bert import BertConfig
from jaxllm.models.model import base_prefix
from jaxllm.weights.peft import PeftReader

if TYPE_CHECKING:
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.runner.compile.target import Target
    from jaxllm.runner.runner_config import RunnerConfig


def check_adapters(args: EngineArgs, model: Any, target: Target) -> None:
    """Raises ValidationError for what adapters do not go with."""
    if not args.enable_lora:
        return
    others = {
        "lora_embeddings=True and a speculative_config": (
            args.lora_embeddings and args.speculative_config is not None,
            "nobody has seen drafts checked by an adapter's head",
        ),
        'load_format="null"': (args.load_format == "null", "there is no model"),
        f"cpu_offload_gb={args.cpu_offload_gb:g}": (bool(args.cpu_offload_gb), "layers on the host have no adapters"),
        f"enable_expert_parallel=True and data_parallel_size={args.data_parallel_size}": (
            args.steps_together,
            "replicas that have the experts between them take the same steps, and adapters would make them differ",
        ),
        f"devices of {target.num_processes} processes": (target.num_processes > 1, "adapters are read by one"),
        "a BERT model": (isinstance(model, BertConfig), "only decoders have adapters"),
    }
    for asked, (is_asked, why) in others.items():
        if is_asked:
            raise ValidationError(f"enable_lora=True with {asked}: {why}. Leave one of them out.")


def adapter_store(config: RunnerConfig) -> AdapterStore | None:
    """The adapters of an engine; None: it has none."""
    lora = config.lora
    if lora is None:
        return None
    specs = config.unquantized_specs
    tables = adapter_tables(specs, head=config.head_name)
    reader = PeftReader(adapter_modules(specs), tables, base_prefix(config.model), lora, config.dtype)
    return AdapterStore(reader.open, max_loras=lora.max_loras, max_cpu_loras=lora.max_cpu_loras)
