"""The quantized weights of an engine, as the tensors of a checkpoint that is read as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.layers.weight import is_spec
from jaxllm.layers.weight_storage import MARK, Layout
from jaxllm.weights.formats.hugging_face import Tensor
from jaxllm.weights.formats.shards import ShardWriter
from jaxllm.weights.quantization.compressed_tensors import CompressedTensors
from jaxllm.weights.quantization.detect import Quantization
from jaxllm.weights.quantization.method import Found, Method
from jaxllm.weights.quantization.written_schemes import configuration


class SavedQuantization:
    """How the quantized weights of a model are written: as the checkpoint had them, where their format is written, and
    else as compressed-tensors.

    Args:
        specs: of the model, with those of the quantized matrices' arrays.

    Raises:
        ValidationError: no format that is written can hold them; the text says what to do.
    """

    def __init__(self, quantization: Quantization, specs: Any):
        names = [name for spec in jax.tree.leaves(specs, is_leaf=is_spec) for name, _ in spec.tensors()]
        matrices = dict.fromkeys(name.partition(MARK)[0] for name in names if MARK in name)
        self._layouts: Mapping[str, Layout] = {
            name: layout for name in matrices if (layout := quantization.layout(name)) is not None
        }
        self._method: Method = quantization.method
        #: quantization_config; None: it stays
        self._config: dict[str, Any] | None = None
        if self._method.writes:
            return
        kept = [name for name in names if name.endswith(".weight") and name not in matrices]
        try:
            self._config = configuration(
                {name.removesuffix(".weight"): layout for name, layout in self._layouts.items()},
                [name.removesuffix(".weight") for name in kept if not name.endswith("norm.weight")],
            )
        except ValidationError as error:
            raise ValidationError(
                f"The weights are quantized as {self._method.name!r}, which no format that is written holds. ({error}) "
                "Copy the checkpoint that they are from; or quantize the one in 16 bits: jaxllm quantize."
            ) from None
        stacked = next((name for name in self._layouts if quantization.matrices[name].stacked), None)
        if stacked is not None:
            raise ValidationError(
                f"{stacked} has all experts of a layer, which no format that is written holds as "
                f"{self._method.name!r}: save with format='orbax'."
            )
        self._method = CompressedTensors(self._config)

    def config(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a model with these weights."""
        return dict(model) if self._config is None else {**model, "quantization_config": self._config}

    def write(self, directory: Path, found: Sequence[Tensor], name_of: Callable[[str], str] = str) -> None:
        """Write all tensors of a model.

        Args:
            found: the model's arrays; a quantized matrix's are several.
            name_of: what the checkpoint calls a tensor.

        Raises:
            WeightsError: there is no room for them, or the system cannot write.
        """
        writer = ShardWriter(directory, sum(tensor.nbytes for tensor in found))
        of_matrix: dict[str, dict[str, Tensor]] = {}
        for tensor in found:
            name, _, kind = tensor.name.partition(MARK)
            of_matrix.setdefault(name, {})[kind] = tensor
        for name, tensors in of_matrix.items():
            arrays = {kind: tensor.value() for kind, tensor in tensors.items()}
            written: Mapping[str, np.ndarray] = {name: arrays[""]} if "" in arrays else self._written(name, arrays)
            writer.add({name_of(tensor): array for tensor, array in written.items()})
        writer.close()

    def _written(self, name: str, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        layout, rows = self._layouts[name], len(arrays["packed" if "packed" in arrays else "values"])
        columns = arrays["packed"].shape[1] * 2 if "packed" in arrays else arrays["values"].shape[1]
        return self._method.written(name, Found(layout, (rows, columns)), arrays)
