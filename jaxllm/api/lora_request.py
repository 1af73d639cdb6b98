"""`LoRARequest`: which adapter a request goes through the model with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """An adapter (LoRA, arXiv:2106.09685) of the engine's model, in PEFT's format; vLLM's fields.

    Args:
        lora_name: what outputs and errors call it.
        lora_int_id: at least 1, another one for each adapter.
        lora_path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``; made absolute, ``~`` is
            the user's folder.
        base_model_name: what the model is called; nothing depends on it.
        tensorizer_config_dict: must be None.
        load_inplace: take the place of what has its number, unless that is this adapter and its files are as they were:
            what the old one has left in the prefix cache is not hit any more, and requests that run keep the old one.
        is_3d_lora_weight: must be False: experts have no adapters.

    Raises:
        ValidationError: a number below 1, an empty name or path, or what is not supported.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str | os.PathLike[str] = ""
    base_model_name: str | None = None
    tensorizer_config_dict: Mapping[str, Any] | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValidationError(f"lora_name must be a text that is not empty, got {self.lora_name!r}.")
        if checks.integer("lora_int_id", self.lora_int_id) < 1:
            raise ValidationError(f"lora_int_id must be at least 1, got {self.lora_int_id}.")
        if not isinstance(self.lora_path, (str, os.PathLike)) or not os.fspath(self.lora_path):
            raise ValidationError(f"lora_path must be the folder of an adapter, got {self.lora_path!r}.")
        if self.base_model_name is not None and not isinstance(self.base_model_name, str):
            raise ValidationError(f"base_model_name must be a text or None, got {self.base_model_name!r}.")
        if not isinstance(self.load_inplace, bool):
            raise ValidationError(f"load_inplace must be True or False, got {self.load_inplace!r}.")
        checks.refuse(tensorizer_config_dict=self.tensorizer_config_dict, is_3d_lora_weight=self.is_3d_lora_weight)
        # not later, when the working directory may be another one
        object.__setattr__(self, "lora_path", os.path.abspath(os.path.expanduser(os.fspath(self.lora_path))))

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
