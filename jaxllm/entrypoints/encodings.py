"""In which encoding a file of prompts is read: one that would come out wrong is refused before anything runs."""

from __future__ import annotations

import argparse
import codecs
from pathlib import Path

from jaxllm.api.errors import ValidationError

#: of files that nobody says anything about; a mark at the beginning is no part of the text
UTF8 = "utf-8-sig"
_PIECE = 1 << 20
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
#: in Western texts, of all bytes, at most this share is not ASCII
_WESTERN = 0.3


def add_encoding_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--encoding``."""
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="of the input file, such as latin-1, cp1252 or utf-16 (default: utf-8, and what is not is refused)",
    )


def encoding_of(path: str, given: str | None) -> str:
    """The encoding to open a file with, for all of which it has been tried, unless it was given as UTF-8.

    Args:
        given: by the user; None: UTF-8, with or without a mark.

    Raises:
        OSError: the file cannot be read.
        ValidationError: Python does not know the encoding, or it is not the file's; the text names the one that is
            likely.
    """
    encoding = UTF8 if given is None else given
    try:
        "a".encode(encoding)
    except LookupError:
        raise ValidationError(
            f"--encoding {given} is no text encoding that Python knows; it knows utf-8, latin-1, cp1252, utf-16, ..."
        ) from None
    if given is not None and codecs.lookup(given).name.startswith("utf-8"):
        # its user knows that some lines are broken: each is refused by itself
        return UTF8
    place = Path(path).expanduser()
    if place.is_file():
        _check(place, encoding, given)
    return encoding


def _check(path: Path, encoding: str, given: str | None) -> None:
    decoder = codecs.getincrementaldecoder(encoding)()
    line, last = 1, b""
    with open(path, "rb", buffering=0) as file:
        while True:
            piece = file.read(_PIECE)
            last = piece or last
            try:
                line += decoder.decode(piece, final=not piece).count("\n")
            except UnicodeDecodeError as error:
                found = error.object[error.start : error.start + 1]
                line += error.object[: error.start].count(b"\n")
                what = f"{str(path)!r} is not {given or 'UTF-8'}: line {line} has the byte 0x{found.hex().upper()}."
                raise ValidationError(f"{what} {_remedy(last, given)}") from None
            if not piece:
                return


def _remedy(piece: bytes, given: str | None) -> str:
    likely = likely_encoding(piece)
    if likely is None:
        told = "Name its encoding with --encoding."
    else:
        told = f"It is likely {likely}: --encoding {likely}."
    return told if given else f"{told} (--encoding utf-8 refuses the lines that are broken, and runs the others.)"


def likely_encoding(text: bytes) -> str | None:
    """What a text that is no UTF-8 is likely to be; None: nothing can be said."""
    for mark, name in _MARKS.items():
        if text.startswith(mark):
            return name
    zeros = [text[first:4096:2].count(0) for first in (0, 1)]
    if max(zeros) > 0.1 * min(len(text), 4096):
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    others = [byte for byte in text if byte >= 0x80]
    if len(others) > _WESTERN * len(text):
        return None
    # ISO 8859-1 has control characters there, which no text has, and Windows letters and quotation marks
    if all(byte >= 0xA0 for byte in others):
        return "latin-1"
    return "cp1252" if _decodes(text, "cp1252") else None


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        text.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
