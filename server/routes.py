"""The routes: each a few lines from a checked request to a reply."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from engine.errors import EngineDied, EngineError
from engine.validation import check_request
from model.vocabulary import TokenizerError
from server.errors import (
    ApiError,
    BodyTooLarge,
    InvalidRequest,
    NotFound,
    TooSlow,
    Unavailable,
    UnknownModel,
    UnsupportedMediaType,
    from_engine,
)
from server.generation import Generation
from server.prompt_run import PromptRun
from server.protocol.reading import BodyT, parse_body
from server.protocol.replies import (
    CompletionResponse,
    DetokenizeResponse,
    ErrorResponse,
    HealthResponse,
    ModelCard,
    ModelList,
    TimelineResponse,
    TokenizeResponse,
    VersionResponse,
)
from server.protocol.requests import CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.served_model import ServedModel
from server.service import VERSION, Account, Service
from server.streaming import watch_client, whole_reply

PAGES = Path(__file__).parent / "pages"

_LONG_TEXT_CHARACTERS = 4096  # beyond, tokenising leaves the event loop
_CLIENT_CLOSED_REQUEST = 499  # nobody reads it; nginx's number for the counts


# Before OpenAPI 3.2 there is no standard way; by custom the schema is that of an event.
_EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "With `stream`: chunks of the reply's shape and then `[DONE]`, or where "
            "that fails, an error in the end.",
            "properties": {
                "data": {
                    "anyOf": [
                        {"const": "[DONE]"},
                        *(
                            {
                                "type": "string",
                                "contentMediaType": "application/json",
                                "contentSchema": {"$ref": f"#/components/schemas/{kind.__name__}"},
                            }
                            for kind in (CompletionResponse, ErrorResponse)
                        ),
                    ]
                }
            },
            "required": ["data"],
        }
    }
}


def _json(body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, media_type="application/json", headers=headers)


def _documented(kind: type[Any]) -> dict[str, Any]:
    """The OpenAPI entry of a body that we read ourselves."""
    content = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def _errors(*statuses: int, is_public: bool = False) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of what a route refuses, and of what is refused before any route."""
    before = (400, 408, 431, 500) if is_public else (400, 401, 408, 431, 500)
    return {status: {"model": ErrorResponse} for status in sorted({*before, *statuses})}


_BODY_ERRORS = (413, 415)  # besides 400 and 408


async def read_body(request: Request, kind: type[BodyT], service: Service) -> BodyT:
    """Receive a body within its bounds and check it; raises ApiError."""
    config = service.config
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(
            "The body must be JSON: send the header Content-Type: application/json."
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("The body must not be compressed: leave Content-Encoding out.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:18]) > config.max_body_bytes:
        raise BodyTooLarge(max_body_bytes=config.max_body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(config.receive_seconds):
            async for part in request.stream():
                body += part
                if len(body) > config.max_body_bytes:
                    raise BodyTooLarge(max_body_bytes=config.max_body_bytes)
    except TimeoutError:
        raise TooSlow(f"The body did not arrive within {config.receive_seconds:g} s.") from None
    return parse_body(kind, bytes(body))


async def tokenize(model: ServedModel, text: str, *, is_bounded: bool) -> list[int]:
    """Turn a prompt into ids, off the event loop if it is long; raises InvalidRequest.

    A bounded text is refused unread if it has more bytes than the context could hold.
    """
    num_bytes = len(text.encode(errors="replace"))
    max_bytes = model.n_ctx * model.max_token_bytes
    if is_bounded and num_bytes > max_bytes:
        raise InvalidRequest(
            f"The prompt has {num_bytes} bytes; this model's context of {model.n_ctx} tokens holds "
            f"at most {max_bytes}.",
            param="prompt",
            code="context_length_exceeded",
        )
    try:
        if len(text) > _LONG_TEXT_CHARACTERS:
            return await asyncio.to_thread(model.tokenizer.encode, text)
        return model.tokenizer.encode(text)
    except TokenizerError as error:
        raise InvalidRequest(str(error), param="prompt") from None


async def read_prompt(
    model: ServedModel, body: CompletionRequest, prompt: str | list[int]
) -> tuple[list[int], str]:
    """The ids of a prompt and the text that stands for them; raises InvalidRequest."""
    keep = body.truncate_prompt_tokens
    if isinstance(prompt, str):
        token_ids = await tokenize(model, prompt, is_bounded=keep is None)
    else:
        token_ids = prompt
        if keep is None:
            check_length(model, body, len(token_ids))
        bad = next((i for i in token_ids if not 0 <= i < model.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(
                f"prompt contains the token id {str(bad)[:30]}; this model's ids go from 0 to "
                f"{model.vocab_size - 1}.",
                param="prompt",
                code="token_out_of_range",
            )
    if not token_ids:
        if model.bos_token_id is None:
            raise InvalidRequest(
                "The prompt is empty, and this model has no token to start from.", param="prompt"
            )
        check_length(model, body, 1)
        return [model.bos_token_id], ""
    if keep is not None:
        room = max(1, model.n_ctx - body.max_tokens)
        num_tokens = len(token_ids)
        token_ids = token_ids[-(room if keep == -1 else keep) :]
        if len(token_ids) < num_tokens:
            prompt = token_ids
    check_length(model, body, len(token_ids))
    return token_ids, prompt if isinstance(prompt, str) else model.spell_text(token_ids)


def check_length(model: ServedModel, body: CompletionRequest, num_prompt_tokens: int) -> None:
    """Refuse what does not fit into the context."""
    if num_prompt_tokens + body.max_tokens > model.n_ctx:
        is_prompt = num_prompt_tokens >= model.n_ctx
        raise InvalidRequest(
            f"The prompt has {num_prompt_tokens} tokens and max_tokens is {body.max_tokens}, "
            f"{num_prompt_tokens + body.max_tokens} together; this model's context is "
            f"{model.n_ctx}. Shorten the prompt, or lower max_tokens.",
            param="prompt" if is_prompt else "max_tokens",
            code="context_length_exceeded",
        )


async def start_completion(service: Service, account: Account, body: CompletionRequest,
                           salt: bytes) -> Generation:  # fmt: skip
    """Admit a request, tokenise it and give it to the engine; raises ApiError.

    Admission comes first: what is turned away costs nothing.
    """
    model, engine = service.model, service.engine
    if service.is_draining:
        raise Unavailable(
            "The server is shutting down and takes no new requests.", code="shutting_down"
        )
    if body.model != model.name:
        raise UnknownModel(model=body.model, served=model.name)
    prompts = body.prompts
    timeline = account.timeline
    timeline.stream, timeline.num_prompts = body.stream, len(prompts)
    timeline.n, timeline.max_tokens = body.n, body.max_tokens
    account.permit = service.admission.reserve(
        num_choices=len(prompts) * body.num_candidates,
        num_prompt_tokens=sum(map(model.estimate_tokens, prompts)),
    )
    account.note("admitted")
    runs: list[PromptRun] = []
    for place, prompt in enumerate(prompts):
        try:
            token_ids, text = await read_prompt(model, body, prompt)
        except InvalidRequest as error:
            if len(prompts) > 1:
                error.message = f"Prompt {place} of {len(prompts)}, counted from 0: {error.message}"
            raise
        # An explicit seed applies to each prompt, so that a batch equals its prompts alone.
        seed = secrets.randbits(53) if body.seed is None else body.seed
        runs.append(PromptRun(model, body, place=place, token_ids=token_ids, text=text, seed=seed))
    account.note("tokenized")
    num_prompt_tokens = sum(len(run.token_ids) for run in runs)
    account.permit.correct(num_prompt_tokens)
    names = [service.next_engine_id() for _ in runs]
    generation = Generation(
        completion_id=f"cmpl-{timeline.request_id}",
        model=model,
        body=body,
        runs=runs,
        arrived_at=account.arrived_at,
        metrics=service.metrics,
        abort_choice=lambda run, choice: engine.abort_choice(names[run], choice),
    )
    params = [body.to_sampling_params(seed=run.seed) for run in runs]
    try:
        check_request([], params[0], n_ctx=model.n_ctx, vocab_size=model.vocab_size)
        submitted_at = time.monotonic()  # the engine may begin before `submit` returns
        for name, run, run_params in zip(names, runs, params, strict=True):
            stream = engine.submit(
                name,
                run.token_ids,
                run_params,
                num_choices=body.num_candidates,
                salt=salt,
                priority=body.priority,
            )
            generation.streams.add(stream)
    except EngineDied as error:
        generation.close()
        reason = error.reason.removesuffix(".")
        raise Unavailable(f"The engine is down: {reason}.", code="engine_down") from None
    except EngineError as error:
        generation.close()
        raise from_engine(error) from None
    account.note("submitted", submitted_at)
    timeline.state = "running"
    metrics = service.metrics
    metrics.request_prompt_tokens.observe(num_prompt_tokens)
    metrics.request_params_max_tokens.observe(body.max_tokens)
    metrics.request_params_n.observe(body.n)
    return generation


async def finish_completion(service: Service, generation: Generation, request: Request) -> Response:
    """Wait for a whole completion, unless its client leaves; raises ApiError."""
    watcher = asyncio.create_task(watch_client(request.receive, generation))
    try:
        await generation.finish()
    finally:
        watcher.cancel()
        generation.close()
    if generation.given_up is not None:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    return _json(whole_reply(generation, service.fingerprint()))


def completions_router(service: Service) -> APIRouter:
    """POST /v1/completions."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses={
            **_errors(404, *_BODY_ERRORS, 429, 503, 504),
            200: {"description": "The completion, or its stream.", "content": _EVENT_STREAM},
        },
        openapi_extra=_documented(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        """Continue a text, or several; with `stream`, as Server-Sent Events."""
        state = request.state
        account = service.open_account(request_id=state.request_id, salt=state.salt)
        generation: Generation | None = None
        try:
            body = await read_body(request, CompletionRequest, service)
            if body.request_id is not None:
                # The reply's header comes from the same place.
                state.request_id = account.timeline.request_id = body.request_id
            service.timelines.add(account.timeline)
            generation = await start_completion(service, account, body, state.salt)
        except ApiError as error:
            account.reject(error)
            raise
        except ClientDisconnect:
            account.abandon("abort", _CLIENT_CLOSED_REQUEST)
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            if generation is None:  # and it was nothing of the above
                account.abandon("error", 500)
        if body.stream:
            return service.keep(generation, account)
        with service.running(generation, account):
            return await finish_completion(service, generation, request)

    return router


def model_router(service: Service) -> APIRouter:
    """What can be asked about the model and its alphabet."""
    router = APIRouter()
    model = service.model
    card = ModelCard(
        id=model.name,
        object="model",
        created=model.created,
        owned_by="kvik",
        max_model_len=model.n_ctx,
    )

    def check_model(name: str | None) -> None:
        if name is not None and name != model.name:
            raise UnknownModel(model=name, served=model.name)

    @router.get("/v1/models", response_model=ModelList, responses=_errors())
    async def list_models() -> ModelList:
        """The models served here: one."""
        return ModelList(object="list", data=[card])

    @router.get("/v1/models/{model_id:path}", response_model=ModelCard, responses=_errors(404))
    async def show_model(model_id: str) -> ModelCard:
        """One model."""
        check_model(model_id)
        return card

    @router.post(
        "/tokenize",
        response_model=TokenizeResponse,
        responses=_errors(404, *_BODY_ERRORS),
        openapi_extra=_documented(TokenizeRequest),
    )
    async def tokenize_text(request: Request) -> Response:
        """The ids of a text."""
        body = await read_body(request, TokenizeRequest, service)
        check_model(body.model)
        tokens = await tokenize(model, body.prompt, is_bounded=False)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": model.n_ctx})

    @router.post(
        "/detokenize",
        response_model=DetokenizeResponse,
        responses=_errors(404, *_BODY_ERRORS),
        openapi_extra=_documented(DetokenizeRequest),
    )
    async def detokenize_ids(request: Request) -> Response:
        """The text of ids."""
        body = await read_body(request, DetokenizeRequest, service)
        check_model(body.model)
        try:
            return JSONResponse({"prompt": model.spell_text(body.tokens)})
        except TokenizerError as error:
            raise InvalidRequest(str(error), param="tokens", code="token_out_of_range") from None

    return router


def operations_router(service: Service) -> APIRouter:
    """What operators and their tools ask."""
    router = APIRouter()

    async def show_readiness() -> Response:
        """Whether requests can be sent here; 503 with the reason if not."""
        status, reason = service.readiness()
        return JSONResponse(
            {"status": status, "reason": reason}, status_code=200 if status == "ready" else 503
        )

    readiness: dict[str, Any] = {
        "response_model": HealthResponse,
        "responses": {**_errors(is_public=True), 503: {"model": HealthResponse}},
    }
    add: Callable[..., Callable[[Callable[[], Awaitable[Response]]], Any]] = router.get
    add("/health/ready", **readiness)(show_readiness)
    add("/health", **readiness)(show_readiness)

    @router.get("/health/live", response_model=HealthResponse, responses=_errors(is_public=True))
    async def show_liveness() -> HealthResponse:
        """That the server process answers; restart it when it does not."""
        return HealthResponse(status="alive", reason=None)

    @router.get("/version", response_model=VersionResponse, responses=_errors())
    async def show_version() -> VersionResponse:
        """What runs here."""
        facts = service.engine.facts
        if facts is None:
            return VersionResponse(
                version=VERSION, device=None, dtype=None, products=None, numerics=None
            )
        return VersionResponse(
            version=VERSION,
            device=facts.device,
            dtype=facts.dtype,
            products=facts.products,
            numerics=facts.numerics,
        )

    @router.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={**_errors(), 200: {"description": "Prometheus' text format."}},
    )
    async def show_metrics() -> Response:
        """Everything that is counted, for Prometheus."""
        return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.get(
        "/v1/requests/{request_id}", response_model=TimelineResponse, responses=_errors(404)
    )
    async def show_request(request: Request, request_id: str) -> Response:
        """What happened to a request, and when; the last some thousand are remembered."""
        timeline = service.timelines.find(request_id.removeprefix("cmpl-"), request.state.salt)
        if timeline is None:
            raise NotFound("No recent request of yours has this id.", param="request_id")
        return JSONResponse(timeline.to_reply())

    @router.get("/docs", include_in_schema=False)
    async def show_docs() -> Response:
        """The reference, drawn from /openapi.json; it loads nothing from elsewhere."""
        return HTMLResponse((PAGES / "docs.html").read_text(encoding="utf-8"))

    @router.get("/dashboard", include_in_schema=False)
    async def show_dashboard() -> Response:
        """What happens here and now, drawn from /metrics; it loads nothing from elsewhere."""
        return HTMLResponse((PAGES / "dashboard.html").read_text(encoding="utf-8"))

    return router
