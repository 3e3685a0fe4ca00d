"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """An answer other than 200.

    Args:
      status: of HTTP.
      message: one sentence for the user.
      kind: the field `type`.
      param: the field of the request that is at fault, as in "messages.0.role".
      code: a word for programs, as in "model_not_found".
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        fields = {"type": self.kind, "param": self.param, "code": self.code}
        return {"error": {"message": self.message, **fields}}


def internal(what: str = "The server failed at this request; its log has the reason.") -> ApiError:
    """Status 500."""
    return ApiError(500, what, kind=SERVER, code="internal_error")


def unavailable(why: str) -> ApiError:
    """Status 503."""
    return ApiError(503, why, kind=SERVER, code="unavailable", headers={"retry-after": "1"})


def too_slow(seconds: float) -> ApiError:
    """Status 504. The `openai` client repeats such requests unless it is told not to."""
    return ApiError(
        504,
        f"The request took longer than {seconds:g} s; ask for fewer tokens, or start the server "
        "with a larger --timeout.",
        kind=SERVER,
        code="timeout",
        headers={"x-should-retry": "false"},
    )
