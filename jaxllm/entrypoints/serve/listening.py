"""The socket that a server listens at."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator

from jaxllm.api.errors import ValidationError

#: names of this machine that reach a server on loopback
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host.lower() == "localhost"


@contextlib.contextmanager
def listen(host: str, port: int, path: str | None) -> Iterator[tuple[socket.socket, str]]:
    """While it lasts, there is a socket, and the address that clients use.

    Args:
        port: 0: a free one.
        path: of a Unix socket, which takes the place of host and port. Its owner alone can connect.

    Raises ValidationError when it is taken, or there is none.
    """
    if path is not None:
        with _unix(path) as bound:
            yield bound, f"unix:{path}"
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValidationError(
                f"The server cannot listen at {host}:{port} ({error}). Another --port may be free; 0 takes any."
            ) from error
        name = f"[{host}]" if ":" in host else host
        yield bound, f"http://{name}:{bound.getsockname()[1]}"
    finally:
        bound.close()


@contextlib.contextmanager
def _unix(path: str) -> Iterator[socket.socket]:
    _remove_stale(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            bound.bind(path)
        except OSError as error:
            raise ValidationError(f"The server cannot listen at {path!r} ({error}).") from error
        finally:
            os.umask(before)
        try:
            yield bound
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    finally:
        bound.close()


def _remove_stale(path: str) -> None:
    """Remove a socket that a server left behind, and nothing else."""
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ValidationError(f"--uds {path!r} is there already, and no socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ValidationError(f"Another server listens at {path!r}.")
