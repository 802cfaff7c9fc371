"""Health, metrics and the page."""

import asyncio
import math
import time
from importlib.resources import files

from starlette.responses import Response

from ptv2_serving.answering import Service
from ptv2_serving.http.exchanges import Traffic
from ptv2_serving.http.metrics import MEDIA_TYPE, Metrics
from ptv2_serving.http.problems import NOT_READY_RETRY_S
from ptv2_serving.http.tasks import json_response

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# for several that scrape; hundreds of tasks make a long text
TEXT_KEPT_S = 1.0

_clock = time.monotonic

# file -> media type
PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Operations:
    """What machines that watch over the server, and people, look at."""

    def __init__(self, service: Service, traffic: Traffic, metrics: Metrics) -> None:
        """Read the page's files once."""
        self._service = service
        self._traffic = traffic
        self._metrics = metrics
        self._text = b""
        self._made_s = -math.inf
        self._making = asyncio.Lock()
        folder = files("ptv2_serving").joinpath("page")
        self._page = {name: folder.joinpath(name).read_bytes() for name in PAGE_FILES}

    async def live(self) -> Response:
        """Say that the process answers."""
        return json_response({"live": True})

    async def ready(self) -> Response:
        """Say whether requests are answered, or why not."""
        is_ready, reason = readiness(self._service, self._traffic)
        if is_ready:
            return json_response({"ready": True})
        return json_response(
            {"ready": False, "reason": reason}, status=503, headers=retry_headers()
        )

    async def metrics(self) -> Response:
        """Say everything in the text format of Prometheus."""
        async with self._making:
            if _clock() - self._made_s > TEXT_KEPT_S:
                self._metrics.look()
                # requests go on meanwhile
                self._text = await asyncio.to_thread(self._metrics.text)
                self._made_s = _clock()
        return Response(self._text, headers={"Content-Type": MEDIA_TYPE})

    async def index(self) -> Response:
        """Show the page."""
        return self._file("index.html")

    async def style(self) -> Response:
        """Return the page's style."""
        return self._file("page.css")

    async def script(self) -> Response:
        """Return the page's script."""
        return self._file("page.js")

    async def icon(self) -> Response:
        """Return the page's icon."""
        return self._file("icon.svg")

    def _file(self, name: str) -> Response:
        headers = {
            "Content-Type": PAGE_FILES[name],
            "Content-Security-Policy": PAGE_POLICY,
            "Cache-Control": "no-cache",
        }
        return Response(self._page[name], headers=headers)


def readiness(service: Service, traffic: Traffic) -> tuple[bool, str]:
    """Return whether requests are answered, and why not."""
    if traffic.draining:
        return False, "draining"
    status = service.status()
    return status.ready, status.reason


def retry_headers() -> dict[str, str]:
    """Return what a server that is not ready tells its clients."""
    return {"Retry-After": str(int(NOT_READY_RETRY_S))}
