"""The application around a service, and the process around the application."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from engine.client import EngineClient
from engine.config import LaunchConfig
from engine.errors import StartRefused
from engine.messages import Ready
from engine.worker_process import WorkerProcess
from server.config import ServerConfig
from server.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
)
from server.gate import Gate
from server.listener import HttpProtocol
from server.openapi import describe
from server.routes import completions_router, model_router, operations_router
from server.served_model import ServedModel
from server.service import VERSION, Service

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0  # for last words, after the drain
# After its last answer a connection lives longer than the 60 s for which proxies keep theirs: a
# request that meets a closing one is lost.
_UNUSED_SECONDS = 75


class CannotServe(Exception):  # noqa: N818
    """The server cannot start; one sentence says why."""


def create_app(service: Service) -> FastAPI:
    """The routes, the gate before them, and one shape for every error."""
    app = FastAPI(
        title="Kvik",
        version=VERSION,
        description="Text completion by a GPT, after OpenAI's `/v1/completions`.",
        docs_url=None,
        redoc_url=None,
    )
    for router in (completions_router, model_router, operations_router):
        app.include_router(router(service))
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(Exception, _answer_mistake)
    app.add_middleware(Gate, service=service)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, service)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _answer(error: ApiError) -> Response:
    return Response(
        error.to_json(), error.status, media_type="application/json", headers=error.headers
    )


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(error)


# Where people look first, and what they find instead.
_ELSEWHERE = {
    "/": "There is no page here: GET /dashboard is one",
    "/v1/chat/completions": "There is no chat here: POST /v1/completions continues a text",
}


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Whatever the framework refuses: routes and methods that there are not."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        hint = _ELSEWHERE.get(request.url.path, "There is nothing here")
        return _answer(NotFound(f"{hint}; GET /docs shows what there is."))
    if error.status_code == 405:
        methods = {*(error.headers or {}).get("Allow", "").split(", ")} - {""}
        if "GET" in methods:
            methods.add("HEAD")  # the gate answers it
        allowed = ", ".join(sorted(methods))
        return _answer(MethodNotAllowed(f"This route takes {allowed}.", headers={"Allow": allowed}))
    refusal = InvalidRequest(str(error.detail), headers=error.headers)
    refusal.status = error.status_code
    return _answer(refusal)


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    """What the framework finds wrong with a path or a query."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _answer(InvalidRequest(f"{first['msg']}.", param=str(first["loc"][-1])))


async def _answer_mistake(request: Request, error: Exception) -> Response:
    """Ours; the framework raises it again behind this, and so it gets into the log."""
    return _answer(InternalError().also({"X-Request-Id": getattr(request.state, "request_id", "")}))


class _Listener(uvicorn.Server):
    """uvicorn, leaving the signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    config: ServerConfig,
    launch: LaunchConfig,
    model: ServedModel,
    *,
    hang_seconds: float = 30.0,
    worker_module: str = "engine.worker",
    first_worker: WorkerProcess | None = None,
    announce: Callable[[str, Ready], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs; raises CannotServe.

    `announce` is called once, with the server's address, when requests can be sent there.
    """
    engine = EngineClient(
        launch, hang_seconds=hang_seconds, worker_module=worker_module, first_worker=first_worker
    )
    listening = _bind(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Service(config, launch, model, engine), engine, listening, announce))


def _bind(config: ServerConfig) -> socket.socket:
    """Take the port before anything else; raises CannotServe."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise CannotServe(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror or error}. "
            "Choose another with --host and --port."
        ) from None
    for path in (config.tls_certificate, config.tls_key):
        if path is not None and not Path(path).is_file():
            raise CannotServe(f"The TLS file {path} is not there.")
    return listening


def _address(config: ServerConfig, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.tls_certificate else 'http'}://{shown}:{port}"


async def _serve(
    service: Service,
    engine: EngineClient,
    listening: socket.socket,
    announce: Callable[[str, Ready], None],
) -> None:
    config = service.config
    engine.on_step = service.record_step
    try:
        listener = _Listener(_uvicorn_config(config, service))
        listener.config.load()
    except (OSError, ValueError) as error:
        raise CannotServe(f"The TLS files cannot be used: {error}.") from None
    stop_signal: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        if not stop_signal.done():
            stop_signal.set_result(number)
            service.is_draining = True
            return
        logger.warning("second signal, ending at once live_requests=%d", service.num_in_flight)
        sys.stderr.flush()
        os._exit(128 + number)  # the engine's process dies with us

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    async with _running(listener, service, engine, listening):
        starting = asyncio.create_task(engine.start())
        stopping: asyncio.Future[Any] = stop_signal
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            try:
                facts = starting.result()
            except StartRefused as error:
                raise CannotServe(str(error)) from None
            service.fingerprint()
            logger.info(
                "engine ready device=%s dtype=%s products=%r weights_bytes=%d kv_cache_bytes=%d "
                "numerics=%r",
                facts.device, facts.dtype, facts.products, facts.weights_bytes,
                facts.kv_cache_bytes, facts.numerics,
            )  # fmt: skip
            announce(_address(config, listening), facts)
            await stop_signal
        else:
            starting.cancel()
        logger.info("shutting down live_requests=%d", service.num_in_flight)
        await service.drain()


@contextlib.asynccontextmanager
async def _running(
    listener: uvicorn.Server, service: Service, engine: EngineClient, listening: socket.socket
) -> AsyncIterator[None]:
    """HTTP is answered and streams are watched within; in the end nothing of ours runs."""
    answering = asyncio.create_task(listener.serve(sockets=[listening]))
    watching = asyncio.create_task(service.watch_streams())
    try:
        yield
    finally:
        listener.should_exit = True
        await answering
        watching.cancel()
        await engine.stop()


def _uvicorn_config(config: ServerConfig, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        http=HttpProtocol.bounded(
            max_header_bytes=config.max_header_bytes,
            receive_seconds=config.receive_seconds,
            stalled_reader_seconds=config.stalled_reader_seconds,
            count_stalled=service.metrics.stalled_readers.inc,
        ),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
        timeout_keep_alive=_UNUSED_SECONDS,
        timeout_graceful_shutdown=_FLUSH_SECONDS,  # type: ignore[arg-type]
    )
