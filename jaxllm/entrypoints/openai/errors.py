"""A refused API call is told by OpenAI's error object, with vLLM's types."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class APIError(Exception):
    """An API call that cannot be answered.

    Args:
        message: for the person who sent it.
        status: HTTP's status code.
        param: the parameter at fault.
        code: a word for programs; None: the status.
        retry_after: seconds after which the same call may succeed; None: nobody knows.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = HTTPStatus.BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.status = int(status)
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the response's body."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, _TYPES[400]),
                "param": self.param,
                "code": self.code or self.status,
            }
        }
