"""`LoRARequest`: which adapter a request goes through the model with."""

from __future__ import annotations

import dataclasses
import os

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """An adapter (LoRA, arXiv:2106.09685) of the engine's model, in PEFT's format; vLLM's fields.

    Args:
        lora_name: what outputs and errors call it.
        lora_int_id: at least 1, another one for each adapter.
        lora_path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        load_inplace: take the place of what has its number, unless that is this adapter and its files are as they were:
            what the old one has left in the prefix cache is not hit any more, and requests that run keep the old one.

    Raises:
        ValidationError: a number below 1, an empty name or path.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | os.PathLike[str] = ""
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValidationError(f"lora_name must be a text that is not empty, got {self.lora_name!r}.")
        if checks.integer("lora_int_id", self.lora_int_id) < 1:
            raise ValidationError(f"lora_int_id must be at least 1, got {self.lora_int_id}.")
        if not isinstance(self.lora_path, (str, os.PathLike)) or not os.fspath(self.lora_path):
            raise ValidationError(f"lora_path must be the folder of an adapter, got {self.lora_path!r}.")
        object.__setattr__(self, "lora_path", os.fspath(self.lora_path))

    # vLLM's other names of these fields

    @property
    def name(self) -> str:
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        return self.lora_int_id

    @property
    def path(self) -> str:
        return str(self.lora_path)
