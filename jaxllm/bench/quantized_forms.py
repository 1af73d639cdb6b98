"""One model's weights in every form that this machine can write, for `perplexity` to compare.

AWQ and GPTQ are written by `jaxllm quantize`, whose int8, fp8 and int4 are those that an engine makes while it reads;
NF4 and W8A8 are rounded to the nearest here, in numpy; the types of GGUF files by ggml's own code, which the package
xllamacpp has (extra `peers`), under the metadata that the package gguf writes. As llama.cpp does, a matrix whose rows
do not divide into a type's blocks takes another.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.quantizing.api import quantize
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.formats.gguf import GGUFReader
from jaxllm.weights.formats.shards import ShardWriter
from jaxllm.weights.new_folder import appearing
from jaxllm.weights.quantization.bitsandbytes import NF4
from jaxllm.weights.saved_model import write_files

#: llama.cpp's table (`tensor_type_fallback`): the type of rows that blocks of 256 do not divide
FALLBACKS = {
    "Q2_K": "IQ4_NL",
    "Q3_K": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}
#: the type of rows that blocks of 32 do not divide
UNQUANTIZED = "F16"
GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", *FALLBACKS)
#: form -> arguments of `quantize`
_METHODS = {
    "awq": {"method": "awq"},
    "gptq": {"method": "gptq"},
    "gptq 3 bits": {"method": "gptq", "bits": 3},
}
#: numbers of NF4 that share a scale
_BLOCK = 64
_W8A8 = {"num_bits": 8, "type": "int", "symmetric": True}


@dataclasses.dataclass(frozen=True)
class WrittenForm:
    """A model in a form, and what writes it where it is not there yet."""

    path: Path
    write: Callable[[Path], None]

    def written(self) -> Path:
        """Where it is, now in any case."""
        if not self.path.exists():
            print(f"writing {self.path}", flush=True)
            self.write(self.path)
        return self.path


def written_forms(source: Path, folder: Path, calibration: str) -> dict[str, WrittenForm]:
    """All forms that can be written here, by their names.

    Args:
        source: a GGUF file, of which all forms are made.
        folder: where they are, and stay.
        calibration: text for the forms that look at some; not what is measured.

    Raises:
        ValidationError: `source` is no GGUF file.
    """
    if source.suffix != ".gguf":
        raise ValidationError(f"--every-form makes forms of a .gguf file; {source} is none.")
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "calibration.txt"
    text.write_text(calibration, encoding="utf-8")
    found = {
        "nf4": WrittenForm(folder / "nf4", _writer(source, _nf4)),
        "w8a8": WrittenForm(folder / "w8a8", _writer(source, _w8a8)),
    }
    for form, asked in _METHODS.items():
        write = functools.partial(_quantize, source, asked=asked, text=text)
        found[form] = WrittenForm(folder / form.replace(" ", "-"), write)
    for kind in GGUF_TYPES if importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("gguf") else ():
        found[kind] = WrittenForm(folder / f"{kind}.gguf", functools.partial(write_gguf, source, kind=kind))
    return found


def _quantize(source: Path, path: Path, *, asked: dict[str, Any], text: Path) -> None:
    few = {"num_samples": 32, "calibration": text} if asked["method"] in ("awq", "gptq") else {}
    quantize(source, path, perplexity=False, dtype="bfloat16", **asked, **few)


def _writer(source: Path, form: Callable[[str, np.ndarray, dict[str, np.ndarray]], dict[str, Any]]) -> Any:
    """What writes a directory whose projections `form` has put into tensors: (name, matrix, tensors) -> the
    quantization_config of all.
    """

    def write(path: Path) -> None:
        tensors: dict[str, np.ndarray] = {}
        quantization: dict[str, Any] = {}
        with GGUFReader(source) as reader:
            config = reader.config()
            for name in reader.names():
                values = np.asarray(reader.read(name), np.float32)
                if name.endswith("_proj.weight"):
                    quantization = form(name, values, tensors)
                else:
                    tensors[name] = values.astype(ml_dtypes.bfloat16)
        with appearing(path) as unfinished:
            shards = ShardWriter(unfinished, sum(array.nbytes for array in tensors.values()))
            shards.add(tensors)
            shards.close()
            written = {**config, "dtype": "bfloat16", "quantization_config": quantization}
            write_files(unfinished, written, {}, load_tokenizer(source))

    return write


def _nf4(name: str, values: np.ndarray, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """bitsandbytes' four bits, scales in float32 (quantized once)."""
    table = np.asarray(NF4, np.float32)
    blocks = values.reshape(-1, _BLOCK)
    largest = np.abs(blocks).max(axis=1)
    scaled = blocks / np.where(largest == 0, 1, largest)[:, None]
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, scaled).astype(np.uint8).reshape(-1)
    state = {"quant_type": "nf4", "blocksize": _BLOCK, "shape": list(values.shape), "dtype": "bfloat16"}
    tensors[name] = (codes[::2] << 4 | codes[1::2]).reshape(-1, 1)
    tensors[f"{name}.absmax"] = largest
    tensors[f"{name}.quant_map"] = table
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, **kind}


def _w8a8(name: str, values: np.ndarray, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """compressed-tensors' int-quantized: a scale a row, and inputs in eight bits, a scale a token."""
    scales = (np.abs(values).max(axis=1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    wide = scales.astype(np.float32)
    tensors[name] = np.clip(np.rint(values / np.where(wide == 0, 1, wide)), -127, 127).astype(np.int8)
    tensors[f"{name}_scale"] = scales
    weights = {**_W8A8, "strategy": "channel", "dynamic": False}
    inputs = {**_W8A8, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    return {**how, "config_groups": {"group_0": group}}


def write_gguf(source: Path, path: Path, *, kind: str) -> None:
    """A GGUF file whose matrices have a type, as ggml rounds to it; embeddings are in Q8_0, as llama.cpp's are."""
    import gguf

    reader = gguf.GGUFReader(source)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, str(reader.fields["general.architecture"].contents()))
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name not in own and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        own = type_of_rows("Q8_0" if "token_embd" in tensor.name else kind, values.shape[1])
        wanted = gguf.GGMLQuantizationType[own]
        stored = values.astype(np.float16) if own == UNQUANTIZED else _rounded(values, wanted)
        writer.add_tensor(tensor.name, stored, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def type_of_rows(kind: str, columns: int) -> str:
    """The type that rows of so many numbers take where `kind` is wanted, as llama.cpp falls back."""
    import gguf

    for each in (kind, FALLBACKS.get(kind)):
        if each is not None and columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[each]][0] == 0:
            return each
    return UNQUANTIZED


def _rounded(values: np.ndarray, kind: Any) -> np.ndarray:
    """Blocks of a matrix, uint8 [rows, bytes of a row], by `ggml_quantize_chunk`."""
    import gguf

    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.submodule_search_locations
    library = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    call = library.ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((rows, columns // block * nbytes), np.uint8)
    written = call(int(kind), values.ctypes.data, blocks.ctypes.data, 0, rows, columns, None)
    if written != blocks.nbytes:
        raise ValidationError(f"ggml wrote {written} bytes of {kind.name}, and {blocks.nbytes} were awaited.")
    return blocks
