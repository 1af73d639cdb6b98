"""A web host on this machine, for whatever fetches."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping

Handler = http.server.BaseHTTPRequestHandler


@contextlib.contextmanager
def local_host(get: Callable[[Handler], object]) -> Iterator[str]:
    """Its URL, without a slash at the end.

    Args:
        get: answers one GET or HEAD (of which it sends no body), in a thread of its own.
    """

    class Quiet(Handler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):  # who asked may have gone
                get(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def send(handler: Handler, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
    """One whole answer."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)
