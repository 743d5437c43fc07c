"""Who sends a request, for the routes: `Depends(allowed("user"))`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from anchorkv.serve.auth import Principal
from anchorkv.serve.keys import Role
from anchorkv.serve.refusals import Refused
from anchorkv.serve.service import Service

_bearer = HTTPBearer(auto_error=False, description="An API key, as `anchorkv keys` makes them.")


def service_of(request: Request) -> Service:
    """The one that the app was made with."""
    found = request.app.state.service
    if not isinstance(found, Service):
        raise Refused(503, "The server is not ready yet.", retry_after=1.0)
    return found


ServiceOf = Annotated[Service, Depends(service_of)]


def allowed(*roles: Role) -> Callable[..., Awaitable[Principal]]:
    """A dependency that gives the caller. Raises Refused, 401 or 403."""

    async def caller(
        request: Request, service: ServiceOf,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Principal:
        key = None if credentials is None else credentials.credentials
        return await service.caller(key, request.client.host if request.client else "", *roles)

    return caller


UserOf = Annotated[Principal, Depends(allowed("user"))]
AuditorOf = Annotated[Principal, Depends(allowed("auditor", "operator"))]
OperatorOf = Annotated[Principal, Depends(allowed("operator"))]
AnyoneOf = Annotated[Principal, Depends(allowed("user", "operator", "auditor"))]
