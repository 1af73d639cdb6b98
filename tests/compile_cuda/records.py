"""What is inside a serialized executable of XLA:GPU: records of a Riegeli file, each a protobuf message or bytes.

The formats: google/riegeli ``doc/riegeli_records_file_format.md``, google/snappy ``format_description.txt``, protobuf's
wire format. Only what XLA writes is read: uncompressed or Snappy-compressed simple chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

_SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # of a Riegeli file: the hash of its first block's header
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 65536, 24, 40
_RECORDS = ord("r")
_UNCOMPRESSED, _SNAPPY = 0, ord("s")


def records(serialized: bytes) -> list[bytes]:
    """The records of a serialized executable, in order.

    Raises:
        ValueError: it is not a Riegeli file, or one of a kind that XLA does not write today.
    """
    start = serialized.find(_SIGNATURE)
    if start < 0:
        raise ValueError(f"no Riegeli file in a serialized executable of {len(serialized)} bytes")
    file = serialized[start:]
    # every block begins with a header, wherever that cuts a chunk
    data = b"".join(file[at + _BLOCK_HEADER : at + _BLOCK] for at in range(0, len(file), _BLOCK))
    found: list[bytes] = []
    at = 0
    while at + _CHUNK_HEADER <= len(data):
        size = int.from_bytes(data[at + 8 : at + 16], "little")
        kind = data[at + 24]
        at += _CHUNK_HEADER
        if kind == _RECORDS:
            found.extend(_simple_chunk(data[at : at + size]))
        elif found:  # what the executable's own bytes are followed by
            break
        at += size
    if not found:
        raise ValueError("the Riegeli file of a serialized executable has no records")
    # since JAX 0.11 the executable's file is a record of another one
    inner = next((record for record in found if record.startswith(_SIGNATURE)), None)
    return records(inner) if inner else found


def _simple_chunk(chunk: bytes) -> Iterator[bytes]:
    sizes_size, at = varint(chunk, 1)
    sizes = _decompress(chunk[0], chunk[at : at + sizes_size])
    values = _decompress(chunk[0], chunk[at + sizes_size :])
    at = start = 0
    while at < len(sizes):
        size, at = varint(sizes, at)
        yield values[start : start + size]
        start += size


def _decompress(compression: int, data: bytes) -> bytes:
    if compression == _UNCOMPRESSED:
        return data
    if compression != _SNAPPY:
        raise ValueError(f"a serialized executable is compressed in an unknown way: {chr(compression)!r}")
    return _snappy(data[varint(data, 0)[1] :])


def _snappy(data: bytes) -> bytes:
    size, at = varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            length = tag >> 2
            if length >= 60:
                width = length - 59
                length = int.from_bytes(data[at : at + width], "little")
                at += width
            out += data[at : at + length + 1]
            at += length + 1
            continue
        if tag & 3 == 1:
            length, offset, width = (tag >> 2 & 7) + 4, tag >> 5 << 8 | data[at], 1
        else:
            width = 2 if tag & 3 == 2 else 4
            length, offset = (tag >> 2) + 1, int.from_bytes(data[at : at + width], "little")
        at += width
        start = len(out) - offset
        # a copy may overlap its own output: what is there repeats
        out += (out[start:] * (length // offset + 1))[:length]
    if len(out) != size:
        raise ValueError(f"Snappy data of {size} bytes became {len(out)}")
    return bytes(out)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where the next one begins)"""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message's fields, in order: integers, or bytes of whatever has a length.

    Raises:
        ValueError: `message` is not one.
    """
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = varint(message, at)
        elif wire in (1, 2, 5):
            size, at = varint(message, at) if wire == 2 else (8 if wire == 1 else 4, at)
            if at + size > len(message):
                raise ValueError("a protobuf message ends within a field")
            value = message[at : at + size]
            at += size
        else:
            raise ValueError(f"protobuf has no wire type {wire}")
        yield key >> 3, value
