"""How much room adapters (LoRA) have."""

from __future__ import annotations

import dataclasses
import logging

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.config.argument import Arguments, argument, switch
from jaxllm.config.argument_checks import at_least, dtype

logger = logging.getLogger("jaxllm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAArguments(Arguments):
    """vLLM's arguments of these names; all others have no effect without `enable_lora`."""

    enable_lora: bool = switch(False, "take requests with adapters (LoRA)", group="model")
    max_loras: int = argument(1, at_least(1), "adapters that the device has at once", group="model")
    max_lora_rank: int = argument(16, at_least(1), "the highest rank of an adapter's matrix", group="model")
    max_cpu_loras: int | None = argument(
        None, at_least(1), "adapters that the host's memory has at once (default: max_loras)", group="model"
    )
    lora_dtype: str = argument(
        "auto", dtype, "what adapters are stored as; auto: as the model, on CPUs float32", group="model", form="DTYPE"
    )
    lora_embeddings: bool = switch(
        False, "let adapters have embeddings and heads: a table of each, for all that the device has", group="model"
    )
    lora_target_modules: tuple[str, ...] = argument(
        (),
        lambda name, value: tuple(checks.strings(name, value)),
        'the only modules that adapters may have, ["q_proj"]; none named: all that can have one',
        group="model",
        form="JSON",
    )


def check_lora(args: LoRAArguments) -> None:
    """Raise ValidationError for numbers that contradict each other; say which have no effect."""
    if not args.enable_lora:
        defaults = {field.name: field.default for field in dataclasses.fields(LoRAArguments)}
        given = [name for name, default in defaults.items() if getattr(args, name) not in (default, None)]
        if given:
            logger.warning("%s has no effect without enable_lora=True.", ", ".join(given))
        return
    if args.max_cpu_loras is not None and args.max_cpu_loras < args.max_loras:
        raise ValidationError(
            f"max_cpu_loras ({args.max_cpu_loras}) must be greater than or equal to max_loras ({args.max_loras}): "
            "adapters come to the device from there."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What the arguments ask for, with nothing left open."""

    #: adapters that the device has at once
    max_loras: int
    #: the highest rank of an adapter's matrix
    max_lora_rank: int
    #: adapters that the host's memory has at once
    max_cpu_loras: int
    #: numpy's name of what adapters are stored as on the device
    dtype: str
    #: the only modules that adapters may have, by the ends of their names; (): all that can have one
    target_modules: tuple[str, ...] = ()
    #: whether adapters may have embeddings and heads of their own
    has_tables: bool = False

    @classmethod
    def of(cls, args: LoRAArguments, model_dtype: str, platform: str) -> LoRAConfig | None:
        """None: there are no adapters."""
        # XLA:CPU widens bfloat16 slices of the stacks in every step, which takes longer than multiplying by them
        auto = "float32" if platform == "cpu" else model_dtype
        if not args.enable_lora:
            return None
        return cls(
            max_loras=args.max_loras,
            max_lora_rank=args.max_lora_rank,
            max_cpu_loras=args.max_cpu_loras or args.max_loras,
            dtype=auto if args.lora_dtype == "auto" else args.lora_dtype,
            target_modules=args.lora_target_modules,
            has_tables=args.lora_embeddings,
        )
