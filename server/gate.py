"""What every HTTP request passes on its way in and out: its id, its key, its part in the counts."""

import base64
import binascii
import hashlib
import hmac
import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import InvalidKey
from server.service import Service

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI around the application. Every path needs a key, once there are keys, unless listed."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._digests = [hashlib.sha256(key.encode()).digest() for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        method = scope["method"] if scope["method"] in _METHODS else "other"
        state = scope.setdefault("state", {})
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # its body stays here
        sent_id = headers.get(b"x-request-id", b"")
        state["request_id"] = (
            sent_id.decode() if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(12)
        )
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", state["request_id"].encode()),
                ]
                if self._service.is_draining:
                    message["headers"].append((b"connection", b"close"))
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            state["salt"] = self._authenticate(scope["path"], headers.get(b"authorization", b""))
            await self._app(scope, receive, send_with_id)
        except InvalidKey as error:
            await _ask_for_key(error, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._service.metrics.http.labels(route, method, str(status)).inc()

    def _authenticate(self, path: str, authorization: bytes) -> bytes:
        """Check the key and return its salt for the prefix cache; raises InvalidKey."""
        if not self._digests:
            return b""
        digest = hashlib.sha256(_read_key(authorization)).digest()
        # Digests have one length, and all are compared: time tells nothing about the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if any(matches):
            return hashlib.sha256(b"kvik prefix cache" + digest).digest()[:16]
        if path in PUBLIC_PATHS:
            return b""
        raise InvalidKey


def _read_key(authorization: bytes) -> bytes:
    """The key in an Authorization header: a bearer's token, or a browser's password."""
    scheme, _, value = authorization.partition(b" ")
    value = value.strip()
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


async def _ask_for_key(error: InvalidKey, send: Send) -> None:
    """Answer with an error, outside the framework."""
    body = error.to_json()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((b"www-authenticate", challenge.encode()) for challenge in error.challenges),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
