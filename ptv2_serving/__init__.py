"""Production: prompts pulled from the registry and served on one frozen backbone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptv2_serving.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Import a client when it is asked for: who serves needs none."""
    if name in __all__:
        from ptv2_serving import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
