"""A quantized .gguf file as another with the same weights in one plain dtype, for llama.cpp as a peer.

    python convert_gguf.py MODEL.gguf bfloat16 TARGET.gguf

Needs: gguf.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf

_TYPES = {
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
}
#: what the writer says itself
_OWN_FIELDS = {"general.architecture", "general.file_type", "general.quantization_version"}


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """Write `source` with its matrices in `dtype`; vectors stay as they are, as llama.cpp's own converter does it."""
    kind, file_type = _TYPES[dtype]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name not in _OWN_FIELDS and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        own = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[3]), sys.argv[2])
