"""Adapters (LoRA) as PEFT saves them: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder.

What a file has is what is loaded: `target_modules`, `exclude_modules` and `layers_to_transform` say how it came to have
it. A matrix's scale is ``alpha / r``, with rslora ``alpha / sqrt(r)`` (arXiv:2312.03732), of the ranks and alphas that
`rank_pattern` and `alpha_pattern` give it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.config.lora import LoRAConfig
from jaxllm.models.adapters import Module
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats.safetensors import SafetensorsReader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: of each of an adapter's files, its inode, size and time of change; None: it is not there
_State = tuple[tuple[int, int, int] | None, ...]
#: what is not plain LoRA, each with what asks for nothing
_OTHERS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (),
    "fan_in_fan_out": (False,),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": (),
    "alora_invocation_tokens": (),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    "arrow_config": (),
    "megatron_config": (),
}
_WRAPPER = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
#: what stands in front of a layer's modules, where a model is a part of another one
_OUTER = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


class PeftReader:
    """Reads adapters of one model.

    Args:
        modules: the matrices that can have one, by their names in the model's checkpoint.
        prefix: what these names begin with; checkpoints of the bare model leave it out.
        config: what there is room for.
    """

    def __init__(self, modules: Mapping[str, Module], prefix: str, config: LoRAConfig):
        self._modules, self._config = modules, config
        inner = {name.removeprefix(prefix): name for name in modules}
        self._names = {outer + name: own for outer in (*_OUTER, prefix) for name, own in inner.items()}
        self._kinds = sorted({name.rpartition(".")[2] for name in modules})

    def open(self, request: LoRARequest) -> PeftFiles:
        """Check all of an adapter but its numbers, which the result reads.

        Raises:
            ValidationError: it is not there, is not of this model, or is not plain LoRA.
        """
        folder = Path(request.path).expanduser()
        name = f"LoRA adapter {request.lora_name!r} ({folder})"
        # what changes from here on is not what is checked
        state = _state(folder)
        config = self._read_config(folder, name)
        try:
            with SafetensorsReader(_weights_file(folder, name)) as reader:
                matrices = self._matrices({tensor: reader.shape(tensor) for tensor in reader.names()}, config, name)
        except WeightsError as error:
            raise ValidationError(f"{name} cannot be read: {error}") from None
        return PeftFiles(folder, name, state, matrices)

    def _read_config(self, folder: Path, name: str) -> dict[str, Any]:
        file = folder / CONFIG
        if not file.is_file():
            what = "has no adapter_config.json" if folder.is_dir() else "is not there"
            raise ValidationError(f"Loading {name} failed: the folder {what}. Pass the folder that PEFT has saved.")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValidationError(f"{name}: {CONFIG} cannot be read: {error}") from None
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else config
            raise ValidationError(f"{name}: peft_type must be 'LORA', got {kind!r}.")
        for field, accepted in _OTHERS.items():
            value = config.get(field)
            if value is not None and value not in accepted and value not in ({}, []):
                why = "DoRA's magnitudes" if field == "use_dora" else "this kind of adapter"
                raise ValidationError(f"{name}: {field}={value!r} is not supported: {why} cannot be served as LoRA.")
        return config

    def _matrices(
        self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], name: str
    ) -> dict[str, tuple[str, str, float]]:
        """Of each of the model's modules that has one, the names of A and B, and the scale."""
        pairs: dict[str, dict[str, str]] = {}
        for tensor in shapes:
            match = _MATRIX.fullmatch(tensor)
            if match is None:
                raise ValidationError(
                    f"{name}: the tensor {tensor!r} is not supported: only lora_A and lora_B of linear layers are."
                )
            pairs.setdefault(match[1].removeprefix(_WRAPPER), {})[match[2]] = tensor
        if not pairs:
            raise ValidationError(f"{name} has no tensors.")
        found = {}
        for given, pair in pairs.items():
            own = self._names.get(given)
            if own is None:
                raise ValidationError(
                    f"{name}: the model has no module {given!r} that could have an adapter; those that could: "
                    f"{', '.join(self._kinds)}."
                )
            wanted = self._config.target_modules
            if wanted and not own.endswith(tuple("." + target for target in wanted)):
                raise ValidationError(
                    f"{name}: {given!r} is not among lora_target_modules={list(wanted)}. Add it, or leave "
                    "lora_target_modules out."
                )
            if len(pair) < 2:
                raise ValidationError(f"{name}: {given!r} has one of lora_A and lora_B, and not the other.")
            a, b = pair["A"], pair["B"]
            rank = self._check_shapes(shapes[a], shapes[b], self._modules[own], f"{name}: {given!r}")
            if rank > self._config.max_lora_rank:
                raise ValidationError(
                    f"{name}: LoRA rank {rank} of {given!r} is greater than max_lora_rank "
                    f"{self._config.max_lora_rank}. Set max_lora_rank to at least {rank}."
                )
            found[own] = a, b, _scale(config, given, rank, name)
        return found

    def _check_shapes(self, a: tuple[int, ...], b: tuple[int, ...], module: Module, of: str) -> int:
        """The rank."""
        expected = module.out_features, module.in_features
        if len(a) != 2 or len(b) != 2 or not a[0] or b[1] != a[0] or (b[0], a[1]) != expected:
            raise ValidationError(
                f"{of} has lora_A {list(a)} and lora_B {list(b)}; the model's matrix is {list(expected)}, so they must "
                f"be [r, {expected[1]}] and [{expected[0]}, r], r at least 1. Is it an adapter of another model?"
            )
        return a[0]


class PeftFiles:
    """An adapter's files, of which all but the numbers has been checked.

    Args:
        name: what errors call it.
        state: of the files, before they were checked.
        matrices: of each of the model's modules that has one, the names of A and B, and the scale.
    """

    def __init__(self, folder: Path, name: str, state: _State, matrices: Mapping[str, tuple[str, str, float]]):
        self._folder, self._name, self._state, self._matrices = folder, name, state, matrices

    def have_changed(self) -> bool:
        """Whether they are no longer those that were checked, or not there."""
        return _state(self._folder) != self._state

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each module A [r, in], and B [out, r] with the scale in it.

        Raises:
            ValidationError: the files have changed, or B has numbers that are not finite.
            WeightsError: they cannot be read.
        """
        self._check_unchanged()
        found = {}
        with SafetensorsReader(self._folder / WEIGHTS) as reader:
            for module, (a, b, scale) in self._matrices.items():
                up = reader.read(b).astype(np.float32) * np.float32(scale)
                # products by all slots' matrices at once would carry them into other requests' sums
                if not np.isfinite(up).all():
                    raise ValidationError(f"{self._name}: lora_B of {module!r} has numbers that are not finite.")
                found[module] = reader.read(a), up
        self._check_unchanged()
        return found

    def _check_unchanged(self) -> None:
        if self.have_changed():
            raise ValidationError(
                f"{self._name} has changed since it was loaded. Ask for it with load_inplace=True, or under another "
                "lora_int_id, to have what is there now."
            )


def _state(folder: Path) -> _State:
    """What tells an adapter's files from later ones."""
    found = []
    for file in (folder / CONFIG, folder / WEIGHTS):
        try:
            stat = file.stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def _weights_file(folder: Path, name: str) -> Path:
    """The file with the weights, which is there."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise ValidationError(
            f"{name} has adapter_model.bin, a pickle that could run code. Save it with PEFT's safe_serialization=True."
        )
    raise ValidationError(f"{name} has no {WEIGHTS}.")


def _scale(config: Mapping[str, Any], module: str, rank: int, name: str) -> float:
    """The factor on ``B @ A``, as PEFT computes it of a module."""
    alpha = _of_module(config, "alpha_pattern", module, config.get("lora_alpha", 8), name)
    said = _of_module(config, "rank_pattern", module, config.get("r", rank), name)
    if said != rank:
        raise ValidationError(f"{name}: {module!r} has rank {rank}, and {CONFIG} says {said!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValidationError(f"{name}: lora_alpha of {module!r} must be a number, got {alpha!r}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], field: str, module: str, default: Any, name: str) -> Any:
    """The value of the first pattern that a module's name ends in (`peft.utils.other.get_pattern_key`)."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ValidationError(f"{name}: {field} must be an object, got {patterns!r:.200}.")
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise ValidationError(f"{name}: {field} has {key!r}, which is no regular expression: {error}.") from None
    return default
