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
#: of `init_lora_weights`, what changes the model's own matrices, which the adapter then goes with
_CHANGES_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
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
        try:
            # what changes from here on is not what is checked
            state = _state(folder)
            config = self._read_config(folder, name)
            with SafetensorsReader(_weights_file(folder, name)) as reader:
                shapes = {tensor: reader.shape(tensor) for tensor in reader.names()}
            matrices = self._matrices(shapes, config, name)
        except ValidationError:
            raise
        except Exception as error:  # whatever it is, it is this adapter's, and no fault of the call's other prompts
            raise ValidationError(f"{name} cannot be read: {error}") from None
        return PeftFiles(folder, name, state, shapes, matrices, np.dtype(self._config.dtype))

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
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_MODEL):
            raise ValidationError(
                f"{name}: init_lora_weights={init!r} is not supported: it has changed the model that the adapter is "
                "of. Save it as plain LoRA, by PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion="
                "...)."
            )
        for field in ("rank_pattern", "alpha_pattern"):
            _check_patterns(field, config.get(field) or {}, name)
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
        shapes: of the tensors.
        matrices: of each of the model's modules that has one, the names of A and B, and the scale.
        dtype: that they are to have on the device.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        state: _State,
        shapes: Mapping[str, tuple[int, ...]],
        matrices: Mapping[str, tuple[str, str, float]],
        dtype: np.dtype,
    ):
        self._folder, self._name, self._state, self._shapes = folder, name, state, shapes
        self._matrices, self._dtype = matrices, dtype

    def have_changed(self) -> bool:
        """Whether they are no longer those that were checked, or not there."""
        return _state(self._folder) != self._state

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each module A [r, in], and B [out, r] with the scale in it.

        Raises:
            ValidationError: the files have changed, or have numbers that are not finite, or not on the device.
            WeightsError: they cannot be read.
        """
        self._check(is_unchanged=not self.have_changed())
        found = {}
        with SafetensorsReader(self._folder / WEIGHTS) as reader, np.errstate(over="ignore", invalid="ignore"):
            # a copy may have its original's time
            self._check(is_unchanged={tensor: reader.shape(tensor) for tensor in reader.names()} == self._shapes)
            for module, (a, b, scale) in self._matrices.items():
                down, up = reader.read(a), reader.read(b).astype(np.float32) * np.float32(scale)
                for half, matrix in (("A", down), ("B", up)):
                    # products by all slots' matrices at once would carry them into other requests' sums
                    if not np.isfinite(matrix.astype(self._dtype)).all():
                        raise ValidationError(
                            f"{self._name}: lora_{half} of {module!r} has numbers that are not finite, or not in "
                            f"{self._dtype.name}, as which it is stored (lora_dtype)."
                        )
                found[module] = down, up
        self._check(is_unchanged=not self.have_changed())
        return found

    def _check(self, *, is_unchanged: bool) -> None:
        if not is_unchanged:
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
    alpha = _of_module(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    said = _of_module(config.get("rank_pattern") or {}, module, config.get("r", rank))
    if said != rank:
        raise ValidationError(f"{name}: {module!r} has rank {rank}, and {CONFIG} says {said!r}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValidationError(f"{name}: lora_alpha of {module!r} must be a number, got {alpha!r}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_patterns(field: str, patterns: Any, name: str) -> None:
    """Raises ValidationError for what is no object of regular expressions and numbers."""
    if not isinstance(patterns, dict):
        raise ValidationError(f"{name}: {field} must be an object, got {patterns!r:.200}.")
    for pattern, value in patterns.items():
        try:
            re.compile(_ended(pattern))
        except re.error as error:
            raise ValidationError(
                f"{name}: {field} has {pattern!r}, which is no regular expression: {error}."
            ) from None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValidationError(f"{name}: {field} of {pattern!r} must be a number, got {value!r:.200}.")


def _of_module(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends in (`peft.utils.other.get_pattern_key`)."""
    return next((value for pattern, value in patterns.items() if re.match(_ended(pattern), module)), default)


def _ended(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
