"""What a client is told when it gets no answer, in the form of OpenAI's errors."""

from __future__ import annotations

import re
from typing import Any

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?): ")


class RefusedError(ValueError):
    """A request that gets no answer.

    Args:
        message: What was expected, what came, and the cure.
        status: Of HTTP.
        code: The reason in a word.
        param: The field at fault.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As plain JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, where that helps, and that it does not; and that a key is asked for."""
        if self.code == "timeout":
            return {"x-should-retry": "false"}  # OpenAI's clients would ask at once for as much as before
        if self.code == "slow_body":
            return {"Connection": "close"}  # the rest of it is not waited for
        told = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
        return told.get(self.status, {})


def refusal_of(error: Exception) -> RefusedError:
    """What an error says to the client: a `ValueError` is about the request, all others are ours."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, ValueError):
        found = _FIELD.match(str(error))
        return RefusedError(" ".join(str(error).split()), param=found[1] if found else None)
    if isinstance(error, MemoryError):
        message = f"expected memory for the answer, got none ({error}); ask for less, or with fewer others at once"
        return RefusedError(message, 503, "no_memory")
    return RefusedError("the model failed; the log of the server says how", 500, "model_failed")
