"""A model on disk, whatever its form: its config, its weights, its tokenizer's place."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxllm.api.errors import ValidationError
from jaxllm.weights import loader
from jaxllm.weights.classifier_rows import ClassifierRows, WithClassifier
from jaxllm.weights.dense_modules import with_dense_modules
from jaxllm.weights.errors import WeightsError
from jaxllm.weights.formats import mistral, orbax
from jaxllm.weights.formats.gguf import GGUFReader
from jaxllm.weights.formats.tensor_files import TensorFiles, has_pickled, has_safetensors, is_pickled
from jaxllm.weights.naming import TOWERS, CommonNames
from jaxllm.weights.quantization.detect import Quantization, quantization_method
from jaxllm.weights.quantization.kept import read_kept
from jaxllm.weights.quantization.kv_cache import wanted_kv_cache
from jaxllm.weights.quantization.method import Found
from jaxllm.weights.quantization.reader import QuantizedTensors

logger = logging.getLogger("jaxllm")

#: a model's weights, or something else of each
Tree = TypeVar("Tree")

#: threads that read weights onto a CPU: numpy leaves the interpreter to others while it converts them. Elsewhere each
#: would hold an array of the host's memory on its way to the device, and all layers' gates are tens of gigabytes.
READERS = 2
FORMATS = ("gguf", "safetensors", "pt", "mistral", "orbax", "dummy", "null")
#: whose tensors can be looked at one by one; pt: what torch.save wrote
_WITH_TENSORS = ("gguf", "safetensors", "pt", "mistral")
#: these need only the config
_WITHOUT_WEIGHTS = ("dummy", "null")
_JSON_NAMES = {dict: "object", list: "list"}
#: fields of older configs, with their names in `rope_parameters`; "": these are all but the model's own
_OLDER_ROPE = {
    **{"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rope_scaling": ""},
    **{"partial_rotary_factor": "partial_rotary_factor", "rotary_pct": "partial_rotary_factor"},
    **dict.fromkeys(("global_rope_theta", "local_rope_theta", "rope_local_base_freq"), ""),
}


class Checkpoint:
    """A .gguf file, or a directory with config.json and safetensors, what ``torch.save`` wrote, or an orbax tree; or
    one in Mistral's own form (`formats.mistral`).

    Args:
        path: the file or directory.
        load_format: "auto" takes what is there; "dummy" and "null" (no model at all) need only the config.
        overrides: replace fields of the config.
        config_format: "hf" reads config.json, "mistral" params.json, "auto" the first where it exists.

    Raises:
        WeightsError: the config cannot be read.
        ValidationError: the format does not fit the path.
    """

    def __init__(
        self,
        path: Path,
        load_format: str = "auto",
        overrides: Mapping[str, Any] | None = None,
        *,
        config_format: str = "auto",
    ):
        self.path = path
        self.is_gguf = path.is_file()
        self._config_format = config_format
        self.use_format(load_format)
        self.config: dict[str, Any] = _overridden(self._config(), overrides or {})
        #: what a classification head is made of that the weights have not got; None: nothing
        self.classifier: ClassifierRows | None = None
        #: folders of layers that embeddings go through (`dense_modules`)
        self.dense_modules: tuple[str, ...] = ()
        #: None: the weights are read as they are
        self.quantization: Quantization | None = None

    def use_format(self, load_format: str) -> None:
        """Read weights from this form of them from now on. Raises ValidationError as the constructor does."""
        found = self._found()
        if load_format == "auto":
            load_format = found
        elif load_format not in FORMATS:
            raise ValidationError(f"load_format must be auto, {', '.join(FORMATS)}; got {load_format!r}.")
        elif load_format == "pt" and found in ("safetensors", "mistral") and has_pickled(self.path):
            pass
        elif load_format == "mistral" and found == "safetensors" and mistral.has_consolidated(self.path):
            pass
        elif load_format == "safetensors" and found == "mistral" and has_safetensors(self.path):
            pass
        elif load_format not in _WITHOUT_WEIGHTS and load_format != found:
            raise ValidationError(f"load_format={load_format!r}, but {self.path} holds {found} weights.")
        self.load_format = load_format

    def _found(self) -> str:
        if self.is_gguf:
            return "gguf"
        if (self.path / orbax.FOLDER).is_dir():
            return "orbax"
        if is_pickled(self.path):
            return "pt"
        wants_own = self._config_format == "mistral" or not has_safetensors(self.path)
        return "mistral" if wants_own and mistral.has_consolidated(self.path) else "safetensors"

    def _config(self) -> dict[str, Any]:
        if self.is_gguf:
            with GGUFReader(self.path) as reader:
                return reader.config()
        config = read_json(self.path / "config.json")
        own = read_json(self.path / mistral.CONFIG) if config is None or self._config_format == "mistral" else None
        if own is not None and self._config_format != "hf":
            return mistral.mistral_config(self.path, own, config or {})
        if self._config_format == "mistral":
            raise WeightsError(f"{self.path}: there is no {mistral.CONFIG}, which config_format='mistral' reads")
        if config is None:
            raise WeightsError(f"{self.path}: there is no config.json")
        return config

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or {}."""
        return {} if self.is_gguf else self.read_generation_config(self.path)

    @staticmethod
    def read_generation_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
        """A directory's generation_config.json; {} when it has none."""
        return read_json(Path(directory) / "generation_config.json") or {}

    def quantize(
        self,
        asked: str | None,
        matrices: Iterable[tuple[str, tuple[int, int], int]],
        *,
        prefix: str,
        sees: bool = False,
    ) -> None:
        """Find out which matrices are quantized, or are to be while they are read.

        Args:
            asked: the engine's `quantization`.
            matrices: the names and shapes of the model's, and how many each name stands for (`models.matrices`).
            prefix: see `naming.CommonNames`.
            sees: whether the tower that sees images is read, too.

        Raises:
            ValidationError: see `quantization_method`. Or the tower is quantized.
            WeightsError: quantized tensors do not fit together.
        """
        if self.load_format == "orbax" and (kept := read_kept(self.path, asked)) is not None:
            self.quantization = kept
            return
        stored = None if self.is_gguf else self.quantization_config
        method = quantization_method(asked, stored, is_gguf=self.is_gguf)
        if method is None:
            return
        if self.load_format == "orbax":
            asked = asked or method.name
            raise ValidationError(
                f"quantization={asked!r}, but {self.path} holds orbax arrays, which are read as they are. Take the "
                f"model that they are of: LLM(model, quantization={asked!r}).save(directory, format='orbax') keeps it."
            )
        found: dict[str, Found] = {}
        # a plan needs the config alone
        has_files = self.is_gguf or any(self.path.glob("*.safetensors")) or has_pickled(self.path)
        if method.in_files and has_files and self.load_format in _WITH_TENSORS:
            with self._reader() as reader:
                found = method.find(CommonNames(reader, prefix))
            tower = next((name for name in found if name.startswith(TOWERS)), None)
            if sees and tower is not None:
                raise ValidationError(
                    f"The checkpoint has {tower} quantized, and what sees images is read in 16 bits or 32: take one "
                    "that leaves it out (ignore, modules_to_not_convert), or the text alone: "
                    "limit_mm_per_prompt={'image': 0, 'video': 0}."
                )
            if method.markers and not found:
                raise WeightsError(
                    f"config.json says that the weights are quantized by {method.name!r}, and no tensor's name ends in "
                    f"{' or '.join(method.markers)}. If they are not, take quantization_config out of it."
                )
        else:
            for name, shape, stacked in matrices:
                if method.only_experts and not stacked and ".experts." not in name:
                    continue
                layout = method.planned(name, shape)
                if layout is not None:
                    found[name] = Found(layout, shape, stacked)
            if asked is not None and not found:
                logger.warning("quantization=%r has no effect: the model has no matrix that it quantizes.", asked)
        self.quantization = Quantization(method, found)

    @property
    def kv_cache(self) -> tuple[str | None, str | None]:
        """What its quantization says of the KV cache (`wanted_kv_cache`)."""
        if self.is_gguf:
            return None, None
        own = self.quantization_config or {}
        return wanted_kv_cache({**self._of_modelopt(), **own, **(own.get("quantization") or {})})

    def _of_modelopt(self) -> dict[str, Any]:
        """What ModelOpt says in a file of its own."""
        return (read_json(self.path / "hf_quant_config.json") or {}).get("quantization") or {}

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """Of config.json, or of the file of its own that older tools write."""
        own = self.config.get("quantization_config") or self.config.get("compression_config")
        if isinstance(own, dict) and not own.get("quant_method") and self.config.get("quantization") == own:
            # mlx-lm writes it under both names
            return {**own, "quant_method": "mlx"}
        own = own or read_json(self.path / "quant_config.json") or read_json(self.path / "quantize_config.json")
        if own:
            return own
        modelopt = self._of_modelopt()
        # without an algorithm it is of the KV cache alone
        return modelopt if modelopt.get("quant_algo") else None

    @property
    def dtype(self) -> str:
        """The dtype that the weights were trained or stored in, "" when the config does not say."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "")

    def load(
        self,
        specs: Tree,
        dtype: jnp.dtype,
        sharding: Any,
        *,
        prefix: str = "model.",
        seed: int,
        progress: bool,
        stop: threading.Event | None = None,
    ) -> Tree:
        """The model's weights on its devices. Raises WeightsError (see `loader.load`).

        Args:
            specs: a tree of `WeightSpec`s.
            sharding: see `loader.load`.
            prefix: see `naming.CommonNames`.
            stop: see `loader.load`.
        """
        if self.load_format == "dummy":
            return loader.dummy(specs, dtype, sharding, seed, stop=stop)
        if self.load_format == "orbax":
            return orbax.load(self.path, specs, dtype, sharding)
        with self._reader() as reader:
            named = CommonNames(reader, prefix)
            tensors = self._with_classifier(self._as_stored(named))
            with with_dense_modules(tensors, self.path, self.dense_modules) as tensors:
                # what is quantized may be kept by its reader from one read to the next
                threads = READERS if isinstance(tensors, CommonNames) and _on_cpu(sharding) else 1
                return loader.load(tensors, specs, dtype, sharding, progress=progress, stop=stop, num_threads=threads)

    def check(self, specs: object, *, prefix: str = "model.") -> None:
        """Compare the tensors' names and shapes with what the model needs, where that is quick: not of orbax's files.

        Raises:
            WeightsError: they differ, or the weights cannot be opened.
        """
        if self.load_format in _WITH_TENSORS:
            with self._reader() as reader:
                tensors = self._with_classifier(self._as_stored(CommonNames(reader, prefix)))
                with with_dense_modules(tensors, self.path, self.dense_modules) as tensors:
                    loader.check(tensors, specs)

    def _as_stored(self, named: CommonNames) -> CommonNames | QuantizedTensors:
        quantization = self.quantization
        return named if quantization is None else QuantizedTensors(named, quantization.method, quantization.matrices)

    def _with_classifier(
        self, named: CommonNames | QuantizedTensors
    ) -> CommonNames | QuantizedTensors | WithClassifier:
        return named if self.classifier is None else WithClassifier(named, self.classifier)

    def has(self, name: str, *, prefix: str = "model.") -> bool:
        """Whether it has a tensor of this name; True where that is not quickly known: of orbax's files and no files.

        Raises WeightsError when the weights cannot be opened.
        """
        if self.load_format not in _WITH_TENSORS:
            return True
        with self._reader() as reader:
            return name in self._with_classifier(CommonNames(reader, prefix)).names()

    @contextlib.contextmanager
    def tensors(self, *, prefix: str = "model.") -> Iterator[CommonNames]:
        """The tensors as they are stored, of any form but orbax's.

        Args:
            prefix: see `naming.CommonNames`.

        Raises:
            WeightsError: they cannot be opened.
        """
        with self._reader() as reader:
            yield CommonNames(reader, prefix)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[GGUFReader | TensorFiles | mistral.MistralTensors]:
        if self.is_gguf:
            reader = GGUFReader(self.path)
        elif self.load_format == "mistral":
            reader = mistral.MistralTensors(self.path, self.config)
        else:
            reader = TensorFiles(self.path, pickled=True if self.load_format == "pt" else None)
        with reader:
            yield reader


def _overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with some fields replaced. What is said of rotary embeddings stands where transformers 5 writes it,
    in `rope_parameters`, or in fields of older names, and is replaced under either.

    Raises ValidationError where `rope_parameters` has one for each kind of layer and an older name says not which.
    """
    new = {**config, **overrides}
    if "rope_parameters" in overrides:
        if "rope_scaling" not in overrides:
            new.pop("rope_scaling", None)
        return new
    parameters, asked = config.get("rope_parameters"), [name for name in _OLDER_ROPE if overrides.get(name)]
    if not isinstance(parameters, Mapping) or not asked:
        return new
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValidationError(
            f"hf_overrides has {asked[0]!r}, and config.json says in rope_parameters what each kind of layer has "
            f"({', '.join(parameters)}): give all of rope_parameters in its place."
        )
    replaced = {_OLDER_ROPE[name] for name in asked}
    kept = {name: value for name, value in parameters.items() if name not in replaced}
    if isinstance(scaling := overrides.get("rope_scaling"), Mapping):
        # a scaling changes neither the base nor how much of a head turns
        of_model = {name: kept[name] for name in ("rope_theta", "partial_rotary_factor") if name in kept}
        new["rope_scaling"] = {**of_model, **scaling}
    return {**new, "rope_parameters": kept}


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds, None when there is no such file.

    Raises:
        WeightsError: it is not readable, or holds something else than a `kind`.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, kind):
        raise WeightsError(f"{path}: expected a JSON {_JSON_NAMES[kind]}, found {type(value).__name__}")
    return value


def _on_cpu(sharding: Any) -> bool:
    devices = jax.tree.leaves(sharding)[0].device_set
    return all(device.platform == "cpu" for device in devices)
