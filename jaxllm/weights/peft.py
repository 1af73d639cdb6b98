"""Adapters (LoRA) as PEFT saves them: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder.

What a file has is what is loaded: `target_modules`, `exclude_modules` and `layers_to_transform` say how it came to have
it. A matrix's scale is ``alpha / r``, with rslora ``alpha / sqrt(r)`` (arXiv:2312.03732), of the ranks and alphas that
`rank_pattern` and `alpha_pattern` give it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.config.lora import LoRAConfig
from jaxllm.models.adapters import EMBEDDING, Module, Table
from jaxllm.weights.formats.tensor_files import TensorFiles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: of each of an adapter's files, its inode, size and time of change; None: it is not there
_State = tuple[tuple[int, int, int] | None, ...]
#: what is not plain LoRA, each with what asks for nothing
_OTHERS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
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
#: of an embedding, A [r, tokens] and B [d, r]; and a whole table, which PEFT also saves of those that have them
_OF_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.\w+)?)?\.weight")
#: what stands in front of a layer's modules, where a model is a part of another one
_OUTER = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


@dataclasses.dataclass(frozen=True)
class OwnTable:
    """An embedding, or a head, that an adapter has: what is whole, or the model's, and a change of it."""

    whole: np.ndarray | None  # [tokens, d]
    rows: np.ndarray | None  # [tokens, r], the scale in it
    columns: np.ndarray | None  # [r, d]


class _TableTensors(NamedTuple):
    """The names of what a file has of a table."""

    kind: str
    whole: str | None
    #: names of A and B, and the scale
    change: tuple[str, str, float] | None


class PeftReader:
    """Reads adapters of one model.

    Args:
        modules: the matrices that can have one, by their names in the model's checkpoint.
        tables: embedding and head, likewise.
        prefix: what these names begin with; checkpoints of the bare model leave it out.
        config: what there is room for.
        dtype: that tables are stored as.
    """

    def __init__(
        self, modules: Mapping[str, Module], tables: Mapping[str, Table], prefix: str, config: LoRAConfig, dtype: str
    ):
        self._modules, self._tables, self._config, self._dtype = modules, tables, config, np.dtype(dtype)
        inner = {name.removeprefix(prefix): name for name in (*modules, *tables)}
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
            with TensorFiles(_weights_file(folder, name)) as reader:
                shapes = {tensor: reader.shape(tensor) for tensor in reader.names()}
            tables = self._own_tables(shapes, config, name)
            matrices = self._matrices(shapes, config, name, has_tables=bool(tables))
        except ValidationError:
            raise
        except Exception as error:  # whatever it is, it is this adapter's, and no fault of the call's other prompts
            raise ValidationError(f"{name} cannot be read: {error}") from None
        dtypes = np.dtype(self._config.dtype), self._dtype
        return PeftFiles(folder, name, state, shapes, matrices, tables, dtypes)

    def _table(self, given: str) -> str | None:
        """The model's table that a file calls so."""
        own = self._names.get(given.removeprefix(_WRAPPER))
        return own if own in self._tables else None

    def _own_tables(
        self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], name: str
    ) -> dict[str, _TableTensors]:
        """Of each table of its own, what the file has of it."""
        whole: dict[str, str] = {}
        pairs: dict[str, dict[str, str]] = {}
        #: by which patterns of ranks and alphas go
        given: dict[str, str] = {}
        for tensor in shapes:
            match = _MATRIX.fullmatch(tensor) or _OF_EMBEDDING.fullmatch(tensor)
            if match is not None and (own := self._table(match[1])) is not None:
                pairs.setdefault(own, {})[match[2]] = tensor
                given[own] = match[1].removeprefix(_WRAPPER)
            elif match is None and (match := _WHOLE.fullmatch(tensor)) and (own := self._table(match[1])) is not None:
                whole[own] = tensor
        saved = config.get("modules_to_save") or []
        ends = {own.rpartition(".")[2] for own in self._tables}
        if others := [module for module in saved if module.rpartition(".")[2] not in ends]:
            raise ValidationError(
                f"{name}: modules_to_save={saved!r} has {others[0]!r}, which is not supported: of whole modules an "
                f"adapter may have {' and '.join(sorted(ends))} (lora_embeddings=True)."
            )
        owned = [own for own in self._tables if own in whole or own in pairs]
        if (owned or saved) and not self._config.has_tables:
            raise ValidationError(
                f"{name} has {' and '.join(owned or saved)}, whole or changed, which takes a table for each "
                "adapter. Set lora_embeddings=True to have room for them."
            )
        there = {own.rpartition(".")[2] for own in whole}
        if absent := [module for module in saved if module.rpartition(".")[2] not in there]:
            raise ValidationError(f"{name}: modules_to_save={saved!r}, and the file has no {absent[0]!r}.")
        found = {}
        for own in owned:
            kind, shape = self._tables[own]
            change = None
            if own in pairs:
                self._check_wanted(own, own, name)
                if len(pairs[own]) < 2:
                    raise ValidationError(f"{name}: {own!r} has one of lora_A and lora_B, and not the other.")
                a, b = pairs[own]["A"], pairs[own]["B"]
                rows, columns = (shapes[a][::-1], shapes[b][::-1]) if kind == EMBEDDING else (shapes[b], shapes[a])
                _check_table(own, (rows[0], columns[-1]), shape, name)
                if rows[1:] != columns[:1] or not columns[0]:
                    raise ValidationError(f"{name}: {own!r} has lora_A {shapes[a]} and lora_B {shapes[b]}.")
                change = a, b, _scale(config, given[own], columns[0], name)
            if own in whole:
                _check_table(own, shapes[whole[own]], shape, name)
            found[own] = _TableTensors(kind, whole.get(own), change)
        return found

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
        self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], name: str, *, has_tables: bool
    ) -> dict[str, tuple[str, str, float]]:
        """Of each of the model's modules that has one, the names of A and B, and the scale."""
        pairs: dict[str, dict[str, str]] = {}
        for tensor in shapes:
            match = _MATRIX.fullmatch(tensor)
            of_table = match or _OF_EMBEDDING.fullmatch(tensor) or _WHOLE.fullmatch(tensor)
            if of_table is not None and self._table(of_table[1]) is not None:
                continue
            if match is None:
                raise ValidationError(
                    f"{name}: the tensor {tensor!r} is not supported: only lora_A and lora_B of linear layers are, of "
                    "embedding and head, and these whole."
                )
            pairs.setdefault(match[1].removeprefix(_WRAPPER), {})[match[2]] = tensor
        if not pairs and not has_tables:
            raise ValidationError(f"{name} has no tensors.")
        found = {}
        for given, pair in pairs.items():
            own = self._names.get(given)
            if own is None:
                raise ValidationError(
                    f"{name}: the model has no module {given!r} that could have an adapter; those that could: "
                    f"{', '.join(self._kinds)}."
                )
            self._check_wanted(own, given, name)
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

    def _check_wanted(self, own: str, given: str, name: str) -> None:
        wanted = self._config.target_modules
        if wanted and not f".{own}".endswith(tuple("." + target for target in wanted)):
            raise ValidationError(
                f"{name}: {given!r} is not among lora_target_modules={list(wanted)}. Add it, or leave "
                "lora_target_modules out."
            )

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
        tables: of each table of its own, the tensors.
        dtypes: that matrices and tables are to have on the device.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        state: _State,
        shapes: Mapping[str, tuple[int, ...]],
        matrices: Mapping[str, tuple[str, str, float]],
        tables: Mapping[str, _TableTensors],
        dtypes: tuple[np.dtype, np.dtype],
    ):
        self._folder, self._name, self._state, self._shapes = folder, name, state, shapes
        self._matrices, self._tables, (self._dtype, self._table_dtype) = matrices, tables, dtypes

    def have_changed(self) -> bool:
        """Whether they are no longer those that were checked, or not there."""
        return _state(self._folder) != self._state

    def read(self) -> dict[str, tuple[np.ndarray, np.ndarray] | OwnTable]:
        """Of each module A [r, in], and B [out, r] with the scale in it; of each table what it has of its own.

        Raises:
            ValidationError: the files have changed, or have numbers that are not finite, or not on the device.
            WeightsError: they cannot be read.
        """
        self._check(is_unchanged=not self.have_changed())
        found: dict[str, tuple[np.ndarray, np.ndarray] | OwnTable] = {}
        with TensorFiles(self._folder / WEIGHTS) as reader, np.errstate(over="ignore", invalid="ignore"):
            # a copy may have its original's time
            self._check(is_unchanged={tensor: reader.shape(tensor) for tensor in reader.names()} == self._shapes)
            for module, (a, b, scale) in self._matrices.items():
                down, up = reader.read(a), reader.read(b).astype(np.float32) * np.float32(scale)
                for half, matrix in (("A", down), ("B", up)):
                    # products by all slots' matrices at once would carry them into other requests' sums
                    self._check_finite(matrix, self._dtype, f"lora_{half} of {module!r}", "lora_dtype")
                found[module] = down, up
            for module, tensors in self._tables.items():
                table = self._table(reader, tensors)
                for part in (table.whole, table.rows, table.columns):
                    if part is not None:
                        self._check_finite(part, self._table_dtype, f"what it has of {module!r}", "dtype")
                found[module] = table
        self._check(is_unchanged=not self.have_changed())
        return found

    def _table(self, reader: TensorFiles, tensors: _TableTensors) -> OwnTable:
        whole = None if tensors.whole is None else reader.read(tensors.whole)
        if tensors.change is None:
            return OwnTable(whole, None, None)
        a, b, scale = tensors.change
        down, up = reader.read(a).astype(np.float32), reader.read(b).astype(np.float32)
        rows, columns = (down.T, up.T) if tensors.kind == EMBEDDING else (up, down)
        return OwnTable(whole, rows * np.float32(scale), columns)

    def _check_finite(self, numbers: np.ndarray, dtype: np.dtype, what: str, argument: str) -> None:
        if not np.isfinite(numbers.astype(dtype)).all():
            raise ValidationError(
                f"{self._name}: {what} has numbers that are not finite, or not in {dtype.name}, as which it is stored "
                f"({argument})."
            )

    def _check(self, *, is_unchanged: bool) -> None:
        if not is_unchanged:
            raise ValidationError(
                f"{self._name} has changed since it was loaded. Ask for it with load_inplace=True, or under another "
                "lora_int_id, to have what is there now."
            )


def _check_table(own: str, found: tuple[int, ...], shape: tuple[int, int], name: str) -> None:
    """Raises ValidationError where a table, or what changes it, is of other tokens or another width."""
    if tuple(found) == shape:
        return
    why = "Is it an adapter of another model?"
    if len(found) == 2 and found[0] > shape[0] and found[1] == shape[1]:
        why = f"Its {found[0] - shape[0]} added tokens are not supported: train it with the model's own vocabulary."
    raise ValidationError(f"{name}: {own!r} is of {list(found)}, and the model's is {list(shape)}. {why}")


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
