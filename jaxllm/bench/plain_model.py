"""Engines are compared in one plain dtype: a quantized model is written with the same values in that dtype."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax.numpy as jnp
from filelock import FileLock

from jaxllm.api.errors import ValidationError
from jaxllm.config.cache_folder import cache_folder
from jaxllm.weights.formats.gguf import GGUFReader

#: a GGUF file's fields that its writer says itself
_OWN_FIELDS = {"general.architecture", "general.file_type", "general.quantization_version"}


def plain_folder(model: Path, dtype: str) -> Path:
    """Return the model's own Hugging Face folder, or one that is made of its .gguf file and kept in the cache."""
    if model.is_dir():
        return model
    folder = _place(model, dtype)
    with FileLock(folder.with_suffix(".lock")):
        # the config is written last: where it is, everything is
        if not (folder / "config.json").exists():
            folder.mkdir(exist_ok=True)
            with GGUFReader(model) as reader:
                write_safetensors(reader, folder / "model.safetensors", dtype)
                config = {**reader.config(), "torch_dtype": dtype}
            (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def plain_gguf(model: Path, dtype: str) -> Path:
    """Return a .gguf file of the model in `dtype`, made of another one and kept in the cache.

    Raises ValidationError for a model that is no .gguf file, and where the package gguf is missing.
    """
    if model.is_dir():
        raise ValidationError(
            f"llama.cpp reads .gguf files, and {model} is a folder: convert it, and pass --gguf FILE."
        )
    target = _place(model, dtype) / "model.gguf"
    with FileLock(target.parent.with_suffix(".lock")):
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            unfinished = target.with_suffix(".part")
            try:
                write_gguf(model, unfinished, dtype)
            except ImportError:
                raise ValidationError(
                    f"{model} cannot be converted to {dtype} for llama.cpp: pip install gguf, or pass --gguf FILE."
                ) from None
            os.replace(unfinished, target)
    return target


def write_safetensors(reader: GGUFReader, path: Path, dtype: str) -> None:
    """Write all tensors, which are held together, under their Hugging Face names."""
    from safetensors.numpy import save_file

    tensors = {name: reader.read(name).astype(jnp.dtype(dtype)) for name in reader.names()}
    save_file(tensors, path, metadata={"format": "pt"})


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write `source` with its matrices in `dtype`; vectors are float32, as llama.cpp's own converter writes them.

    Raises ImportError without the package gguf.
    """
    import gguf

    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    kind, plain = gguf.GGMLQuantizationType[name], gguf.GGMLQuantizationType.F32
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in _OWN_FIELDS and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == plain else gguf.LlamaFileType[f"MOSTLY_{name}"])
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        own = kind if values.ndim > 1 else plain
        writer.add_tensor(tensor.name, gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _place(model: Path, dtype: str) -> Path:
    stat = model.stat()
    folder = cache_folder() / "bench" / f"{model.stem}-{stat.st_size}-{stat.st_mtime_ns}-{dtype}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder
