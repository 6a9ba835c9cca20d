"""The server's limits and switches: plain values, checked once; knows no HTTP."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where to listen, whom to let in, and how much to take on.

    Raises ValueError, naming field, value and remedy.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_keys: tuple[str, ...] = ()  # empty: everyone may
    cors_origins: tuple[str, ...] = ()  # empty: no cross-origin headers; "*" is anyone
    tls_certificate: str | None = None  # PEM file; None: plain HTTP
    tls_key: str | None = None  # PEM file; None: in the certificate's
    max_waiting_requests: int = 256  # generations accepted beyond those that can run at once
    max_prompt_tokens: int = 262_144  # of all prompts accepted and not finished
    max_body_bytes: int = 2 * 2**20
    max_header_bytes: int = 16 * 2**10
    receive_seconds: float = 30.0  # for a request's head, and again for its body
    drain_seconds: float = 30.0  # after SIGTERM, for what still runs
    keepalive_seconds: float = 15.0  # a stream silent for so long gets a comment
    stalled_reader_seconds: float = 30.0  # a client that takes nothing for so long is dropped
    hung_after_seconds: float = 5.0  # a busy engine's silence until readiness calls it hung
    num_timelines: int = 4096  # finished requests that /v1/requests/{id} remembers

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
        for name in ("max_prompt_tokens", "max_body_bytes", "max_header_bytes", "num_timelines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_waiting_requests < 0:
            raise ValueError(
                f"max_waiting_requests must be at least 0, got {self.max_waiting_requests}"
            )
        for name in ("receive_seconds", "keepalive_seconds", "stalled_reader_seconds"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("drain_seconds", "hung_after_seconds"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("an API key must be printable ASCII and not empty")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ValueError(
                    f"a CORS origin must be like https://example.org, or * for any, got {origin!r}"
                )
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError("a TLS key needs a TLS certificate: give both, or only the latter")
