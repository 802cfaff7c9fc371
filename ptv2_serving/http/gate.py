"""The outermost layer: every request passes it, whatever becomes of it."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptv2_core.errors import PTv2Error
from ptv2_serving.http.auth import ADMIN_PREFIX, check_allowed
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.exchanges import Exchange, Traffic, request_id_of
from ptv2_serving.http.limits import Rates, client_of
from ptv2_serving.http.logs import RequestLog
from ptv2_serving.http.metrics import Metrics
from ptv2_serving.http.problems import (
    NOT_READY_RETRY_S,
    PROTOCOL_PREFIX,
    ClientGoneError,
    ProblemError,
    problem_body,
    problem_of,
)

CLIENT_GONE = 499
UNROUTED = "unknown"
# what still answers while the server drains
ALWAYS = frozenset({"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
# addresses that probes and scrapers ask for every few seconds, not logged when all is well
QUIET = ALWAYS | {"/v1/status", "/page.css", "/page.js", "/icon.svg"}

POLICY = b"default-src 'none'; frame-ancestors 'none'"
SAFETY: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
FOR_DATA: tuple[tuple[bytes, bytes], ...] = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", POLICY),
)


class Gate:
    """Names requests, lets them in or not, and counts and logs what became of them."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: ServeConfig,
        traffic: Traffic,
        metrics: Metrics,
        log: RequestLog,
    ) -> None:
        """Stand before an app.

        Args:
            app: Answers what is let in.
            config: Whom to let in.
            traffic: Of this server.
            metrics: Counts.
            log: Is written to.
        """
        self._app = app
        self._config = config
        self._traffic = traffic
        self._metrics = metrics
        self._log = log
        self._rates = Rates(config.rate_per_s, config.rate_burst, config.max_clients)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            raise RuntimeError(f"expected http, got {scope['type']}")
        headers = dict(scope["headers"])
        exchange = Exchange(request_id_of(headers.get(b"x-request-id", b"")), headers)
        scope["ptv2.exchange"] = exchange
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = message["headers"] = [*message.get("headers", ()), *SAFETY]
                given.append((b"x-request-id", exchange.request_id.encode("ascii")))
                if not any(name == b"content-security-policy" for name, _ in given):
                    given.extend(FOR_DATA)
            await send(message)

        self._traffic.pending += 1
        try:
            self._let_in(scope, exchange)
            await self._app(scope, receive, send_named)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:
            problem = problem_of(error)
            if problem.kind == "internal":
                # of our own errors those alone quote an input that the client is told
                with_message = self._config.log_texts or isinstance(error, PTv2Error)
                self._log.failure(exchange, error, with_message=with_message)
            if status:  # half an answer cannot be taken back: the server closes the connection
                raise
            await self._refuse(scope, exchange, problem, send_named)
        finally:
            self._traffic.pending -= 1
            self._note(scope, exchange, status or CLIENT_GONE)

    def _let_in(self, scope: Scope, exchange: Exchange) -> None:
        path, method = scope["path"], scope["method"]
        client = scope["client"][0] if scope["client"] else None
        token = check_allowed(path, method, exchange.headers, client, self._config)
        if path in ALWAYS:
            return
        if self._traffic.draining:
            raise ProblemError(
                "not-ready",
                "the server is draining; ask another one",
                retry_after_s=NOT_READY_RETRY_S,
                closes=True,
            )
        if path.startswith(("/v1/", PROTOCOL_PREFIX)) and not path.startswith(ADMIN_PREFIX):
            self._rates.take(token or client_of(client or ""))

    async def _refuse(
        self, scope: Scope, exchange: Exchange, problem: ProblemError, send: Send
    ) -> None:
        exchange.problem = problem.kind
        media_type, body = problem_body(problem, scope["path"], exchange.request_id)
        headers = [
            (b"content-type", media_type.encode("ascii")),
            (b"content-length", str(len(body)).encode("ascii")),
            *((name.lower().encode(), value.encode()) for name, value in problem.headers.items()),
        ]
        if problem.closes or _has_unread_body(exchange):
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": problem.status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})

    def _note(self, scope: Scope, exchange: Exchange, status: int) -> None:
        seconds = time.perf_counter() - exchange.started_s
        self._metrics.observe(exchange, status, seconds)
        if exchange.asks and status == 200:
            self._traffic.note(seconds)
        if status < 400 and scope["path"] in QUIET:
            return
        self._log.request(
            exchange,
            method=scope["method"],
            route=_route_of(scope),
            status=status,
            seconds=seconds,
        )


def _has_unread_body(exchange: Exchange) -> bool:
    headers = exchange.headers
    if exchange.is_read:
        return False
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _route_of(scope: Scope) -> str:
    route = scope.get("route")
    return getattr(route, "path", UNROUTED)
