"""The HTTP server's app: its addresses, and the layers around them."""

from collections.abc import Callable
from importlib.metadata import version as version_of
from typing import Any, TextIO

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ptv2_serving.answering import Service
from ptv2_serving.http import schemas
from ptv2_serving.http.asking import Asking, Catalogue
from ptv2_serving.http.auth import OPEN_PATHS
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.exchanges import Traffic
from ptv2_serving.http.gate import Gate
from ptv2_serving.http.logs import RequestLog
from ptv2_serving.http.metrics import Metrics
from ptv2_serving.http.oip import Protocol
from ptv2_serving.http.operations import Operations
from ptv2_serving.http.problems import refuse
from ptv2_serving.http.tasks import Tasks

__all__ = ["ServeConfig", "make_app"]

DESCRIPTION = (
    "Many tasks on one frozen encoder: each answer names the version and the digest of the prompt "
    "it came from."
)


def make_app(service: Service, config: ServeConfig, *, log: TextIO | None = None) -> FastAPI:
    """Return the app that answers for a service.

    Args:
        service: What predicts.
        config: Whom to let in, and what to take.
        log: Where a line for each request goes; None: standard error.

    Returns:
        The app; its `state.traffic` says what goes on, and `state.traffic.draining` ends it;
        `state.metrics` counts.
    """
    app = FastAPI(
        title="ptv2",
        version=version_of("ptv2"),
        description=DESCRIPTION,
        # their pages load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={HTTPException: refuse, RequestValidationError: refuse},
    )
    traffic = Traffic()
    metrics = Metrics(service, traffic)
    asking = Asking(service=service, config=config, traffic=traffic, catalogue=Catalogue(service))
    app.add_middleware(Gate, config=config, traffic=traffic, metrics=metrics, log=RequestLog(log))
    app.state.traffic = traffic
    app.state.metrics = metrics
    _add_tasks(app, Tasks(asking), config)
    _add_protocol(app, Protocol(asking), config)
    _add_operations(app, Operations(service, traffic, metrics))
    _describe(app, config)
    return app


def _add_tasks(app: FastAPI, tasks: Tasks, config: ServeConfig) -> None:
    # the address that is asked most comes first: routes are tried in their order
    app.add_api_route(
        "/v1/tasks/{task}/predict",
        tasks.predict,
        methods=["POST"],
        tags=["tasks"],
        openapi_extra=schemas.predict_body(config),
        responses={
            200: {"model": schemas.Prediction, "headers": schemas.ANSWER_HEADERS},
            **schemas.refusals(schemas.REFUSALS),
        },
    )
    guarded = schemas.refusals(schemas.GUARDED)
    for path, handler, model in (
        ("/v1/tasks", tasks.list_tasks, schemas.TaskList),
        ("/v1/tasks/{task}", tasks.get_task, schemas.Task),
        ("/v1/status", tasks.status, schemas.Status),
    ):
        _get(app, path, handler, model, guarded, "tasks")
    app.add_api_route(
        "/v1/admin/reload",
        tasks.reload,
        methods=["POST"],
        tags=["admin"],
        responses={200: {"model": schemas.Changes}, **guarded},
    )


def _add_protocol(app: FastAPI, protocol: Protocol, config: ServeConfig) -> None:
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    asking: tuple[tuple[str, Callable[..., Any]], ...] = (
        (f"{model}/infer", protocol.infer),
        (f"{version}/infer", protocol.infer_version),
    )
    for path, handler in asking:
        app.add_api_route(
            path,
            handler,
            methods=["POST"],
            tags=["Open Inference Protocol"],
            openapi_extra=schemas.infer_body(),
            responses={
                200: {"model": schemas.Inference, "headers": schemas.ANSWER_HEADERS},
                **schemas.refusals(schemas.REFUSALS, protocol=True),
            },
        )
    guarded = schemas.refusals(schemas.GUARDED, protocol=True)
    ready = {**guarded, 503: {"model": schemas.ModelReady, "description": "Not ready"}}
    health = {**guarded, 503: {"model": schemas.Ready, "description": "Not ready"}}
    looking: tuple[tuple[str, Callable[..., Any], type[Any], dict[int | str, Any]], ...] = (
        ("/v2", protocol.server, schemas.Server, guarded),
        ("/v2/health/live", protocol.live, schemas.Live, guarded),
        ("/v2/health/ready", protocol.ready, schemas.Ready, health),
        (model, protocol.model, schemas.Model, guarded),
        (version, protocol.model_version, schemas.Model, guarded),
        (f"{model}/ready", protocol.model_ready, schemas.ModelReady, ready),
        (f"{version}/ready", protocol.model_version_ready, schemas.ModelReady, ready),
    )
    for path, look, answer, refused in looking:
        _get(app, path, look, answer, refused, "Open Inference Protocol")


def _add_operations(app: FastAPI, operations: Operations) -> None:
    forbidden = schemas.refusals((403,))
    health = {**forbidden, 503: {"model": schemas.Ready, "description": "Not ready"}}
    _get(app, "/healthz", operations.live, schemas.Live, forbidden, "operations")
    _get(app, "/readyz", operations.ready, schemas.Ready, health, "operations")
    for path, handler in (
        ("/metrics", operations.metrics),
        ("/", operations.index),
        ("/page.css", operations.style),
        ("/page.js", operations.script),
        ("/icon.svg", operations.icon),
    ):
        app.add_api_route(path, handler, methods=["GET"], include_in_schema=False)


def _get(
    app: FastAPI,
    path: str,
    handler: Callable[..., Any],
    model: type[Any],
    refused: dict[int | str, Any],
    tag: str,
) -> None:
    app.add_api_route(
        path,
        handler,
        methods=["GET"],
        tags=[tag],
        responses={200: {"model": model}, **refused},
    )


def _describe(app: FastAPI, config: ServeConfig) -> None:
    """Add to the OpenAPI document what the framework does not know: errors and tokens."""
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        found = made()
        components = found.setdefault("components", {})
        for model in (schemas.Problem, schemas.ProtocolError):
            components.setdefault("schemas", {})[model.__name__] = model.model_json_schema()
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        for path, methods in found["paths"].items():
            for operation in methods.values():
                # the parameters of paths are texts, which the framework never refuses
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
                if path not in OPEN_PATHS and config.tokens:
                    operation["security"] = [{"token": []}]
        return found

    app.openapi = document  # type: ignore[method-assign]
