"""The pages and the files they are made of. They hold no data and so need no key: a page asks the API for what it
shows, with the key that its reader gives it."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Query, Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from anchorkv.engines.base import ShowsAttention
from anchorkv.serve.api.callers import ServiceOf
from anchorkv.serve.pages import dashboard
from anchorkv.serve.pages.words import LANGS, chosen, words
from anchorkv.serve.refusals import Refused

router = APIRouter()
router.include_router(dashboard.router)
PAGES = {"chat": "/ui/", "dashboard": "/ui/dashboard", "audit": "/ui/audit", "documents": "/ui/documents"}
COOKIE = "anchorkv_lang"
_YEAR = 365 * 24 * 3600
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Of every page: its own files alone, and no text is ever taken for HTML."""
_KINDS = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
Lang = Annotated[str | None, Query(max_length=20)]


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("anchorkv.serve.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def static() -> dict[str, bytes]:
    """Name -> content of every file that is served."""
    folder = files("anchorkv.serve.pages").joinpath("static")
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name.rpartition(".")[2] in _KINDS}


@router.get("/ui", include_in_schema=False)
async def start() -> Response:
    return RedirectResponse("/ui/")


@router.get(PAGES["chat"], include_in_schema=False)
async def chat(request: Request, service: ServiceOf, lang: Lang = None) -> Response:
    return _page("chat", request, service, lang)


@router.get(PAGES["dashboard"], include_in_schema=False)
async def figures(request: Request, service: ServiceOf, lang: Lang = None) -> Response:
    return _page("dashboard", request, service, lang)


@router.get(PAGES["audit"], include_in_schema=False)
async def audit(request: Request, service: ServiceOf, lang: Lang = None) -> Response:
    return _page("audit", request, service, lang)


@router.get(PAGES["documents"], include_in_schema=False)
async def documents(request: Request, service: ServiceOf, lang: Lang = None) -> Response:
    return _page("documents", request, service, lang)


@router.get("/ui/static/{name}", include_in_schema=False)
async def file(name: str, request: Request) -> Response:
    content = static().get(name)
    if content is None:
        raise Refused(404, "There is no such file.", code="not_found")
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_KINDS[name.rpartition(".")[2]])


@router.get("/ui/words/{lang}.json", include_in_schema=False)
async def texts(lang: str) -> Response:
    if lang not in LANGS:
        raise Refused(404, f"There are no words in {lang[:20]!r}; there are {' and '.join(LANGS)}.", code="not_found")
    return JSONResponse(words(lang))


def _page(name: str, request: Request, service: ServiceOf, wish: str | None) -> Response:
    lang = chosen(wish, request.cookies.get(COOKIE), request.headers.get("accept-language"))
    w = words(lang)
    body = _templates().get_template(f"{name}.html.j2").render(
        name=name, pages=PAGES, w=w, lang=lang, langs=LANGS, own={each: words(each)["language"] for each in LANGS},
        keys=service.gate.keys, card=service.card, attention=isinstance(service.scheduler.engine, ShowsAttention),
    )
    headers = {"content-security-policy": POLICY, "content-language": lang, "vary": "accept-language, cookie"}
    response = HTMLResponse(body, headers=headers)
    if wish in LANGS:
        response.set_cookie(COOKIE, lang, max_age=_YEAR, path="/ui", httponly=True, samesite="lax")
    return response
