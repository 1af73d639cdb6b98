"""Pictures that conversations name: which of them may be read, and from where.

Conversations may come from people whom the machine's owner does not know. So files are read below one folder only, and
the network is asked only for the hosts that are named (`allowed_local_media_path`, `allowed_media_domains`).
"""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.multimodal.pictures import convert_image_mode, read_picture

#: of a picture that is fetched
MOST_BYTES = 256 * 2**20
#: of a URL that is no data URI
MOST_CHARACTERS = 2**16
#: in which an answer is here whole, once its host has been reached
SECONDS = 30.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Where a host that is named sends somebody is not named."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class _Until(io.RawIOBase):
    """What a socket sends until some time. One that sends a byte now and then is never silent, so that timeouts of the
    socket alone would not end it.
    """

    def __init__(self, sock: Any, raw: Any):
        self._sock, self._raw, self._until = sock, raw, time.monotonic() + SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"it has taken more than {SECONDS:g} seconds")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Until(sock, self.fp.detach()))  # pyright: ignore[reportAttributeAccessIssue]


class _InTime:
    """Of a handler: its connections' answers end in time."""

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        def connection(*args: Any, **others: Any) -> Any:
            made = http_class(*args, **others)
            made.response_class = _Answer
            return made

        return super().do_open(connection, req, **options)  # pyright: ignore[reportAttributeAccessIssue]


class _HTTP(_InTime, urllib.request.HTTPHandler):
    pass


class _HTTPS(_InTime, urllib.request.HTTPSHandler):
    pass


class MediaAccess:
    """What may be read.

    Args:
        local_path: the folder whose files may be; "": none.
        domains: of hosts.
        follows: whether hosts that these send to are asked, too.
    """

    def __init__(self, local_path: str = "", domains: Sequence[str] = (), *, follows: bool = False):
        self._folder = Path(local_path).expanduser().resolve() if local_path else None
        self._domains = tuple(domain.lower() for domain in domains)
        redirects = urllib.request.HTTPRedirectHandler if follows else _NoRedirects
        self._opener = urllib.request.build_opener(redirects, _HTTP, _HTTPS)

    def read(self, place: Any, name: str) -> bytes:
        """What lies at a data URI, a file's URI or path, or a URL.

        Raises:
            ValidationError: it may not be read, or cannot be.
        """
        if not isinstance(place, str):
            raise ValidationError(f"{name}: the URL must be a text, got {type(place).__name__}: {place!r:.80}")
        # urlsplit keeps the latest texts that it has read, however long
        if place[:64].lstrip()[:5].lower() == "data:":
            return _of_data(place, name)
        if len(place) > MOST_CHARACTERS:
            raise ValidationError(f"{name}: {place[:60]!r} and so on is no URL: it has {len(place)} characters")
        try:
            parts = urllib.parse.urlsplit(place)
            host = (parts.hostname or "").lower()
        except ValueError as error:
            raise ValidationError(f"{name}: {place!r:.200} is no URL: {error}") from None
        if parts.scheme in ("http", "https"):
            return self._fetched(place, host, name)
        if parts.scheme == "file":
            if host not in ("", "localhost"):
                raise ValidationError(f"{name}: {place!r:.200} is a file of another machine. Write file:///path.")
            return self._of_file(urllib.request.url2pathname(parts.path), name)
        if parts.scheme and len(parts.scheme) > 1:  # one letter is a drive
            raise ValidationError(f"{name}: The URL must be either a HTTP, data or file URL, got {place!r:.80}")
        return self._of_file(place, name)

    def _of_file(self, place: str, name: str) -> bytes:
        if self._folder is None:
            raise ValidationError(
                f"{name}: Cannot load local files without `--allowed-local-media-path`: start the engine with "
                "allowed_local_media_path='/the/folder'."
            )
        try:
            path = Path(place).expanduser()
            path = (path if path.is_absolute() else self._folder / path).resolve()
            if not path.is_relative_to(self._folder):
                raise ValidationError(
                    f"{name}: The file path {place!r:.200} must be a subpath of the `--allowed-local-media-path` "
                    f"{str(self._folder)!r}."
                )
            if not path.is_file():  # a pipe would never end
                raise ValidationError(f"{name}: {place!r:.200} cannot be read: there is no such file.")
            if path.stat().st_size > MOST_BYTES:
                raise ValidationError(f"{name}: {place!r:.200} has more than {MOST_BYTES} bytes.")
            return path.read_bytes()
        except ValidationError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise ValidationError(f"{name}: {place!r:.200} cannot be read: {error}") from None

    def _fetched(self, url: str, host: str, name: str) -> bytes:
        if host not in self._domains:
            named = ", ".join(self._domains) or "none"
            raise ValidationError(
                f"{name}: The URL must be from one of the allowed domains: {named}. Input URL domain: {host}. Start "
                f"the engine with allowed_media_domains=[{host!r}], or give the picture itself."
            )
        try:
            with self._opener.open(url, timeout=SECONDS) as answer:
                return _read(answer)
        # a URL that is none and an answer that ends early are exceptions of HTTP's own
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValidationError(f"{name}: {url!r:.200} cannot be fetched: {error}") from None


def fetch_image(image_url: str) -> Any:
    """The picture, one of Pillow's, at a URL, a data URI, or a file's URI or path, wherever it lies: for scripts of
    vLLM's, whose owners name it themselves.

    Raises:
        ValidationError: it cannot be fetched, or is none.
    """
    host = urllib.parse.urlsplit(image_url).hostname if image_url.startswith(("http:", "https:")) else None
    if not re.match(r"\s*[A-Za-z][\w+.-]+:", image_url):  # a path, which begins where the script runs
        image_url = str(Path(image_url).expanduser().absolute())
    access = MediaAccess("/", [host] if host else [], follows=True)
    return read_picture(access.read(image_url, "image_url"), "image_url")


def encode_image_url(image: Any, *, image_mode: str | None = "RGB", format: str = "PNG") -> str:
    """A data URI of a picture of Pillow's, for scripts of vLLM's."""
    buffer = io.BytesIO()
    (convert_image_mode(image, image_mode) if image_mode else image).save(buffer, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(answer: http.client.HTTPResponse) -> bytes:
    """What an answer holds, whole."""
    data = answer.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes")
    if answer.length:  # which no exception tells where a size is given
        raise http.client.IncompleteRead(data, answer.length)
    return data


def _of_data(uri: str, name: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValidationError(f"{name}: a data URI must begin as data:image/png;base64, does; got {uri!r:.60}")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValidationError(f"{name}: the data URI is no base64: {error}") from None
