"""/v1/documents: upload a document once, ask it in any later chat by `anchorkv.document`."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from anchorkv.config import AnchorConfig
from anchorkv.serve.api import replies
from anchorkv.serve.api.answering import unless_gone
from anchorkv.serve.api.asks import wish_of
from anchorkv.serve.api.callers import ServiceOf, UserOf
from anchorkv.serve.api.errors import responses, sentence
from anchorkv.serve.api.formats import Text, Wishes
from anchorkv.serve.refusals import Refused, bad
from anchorkv.serve.requests import DocumentFacts
from anchorkv.serve.service import Service

router = APIRouter(tags=["documents"])
Number = Annotated[str, Path(min_length=1, max_length=100, description="id of a document")]


class DocumentRequest(BaseModel):
    """A document as text."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[Text, Field(min_length=1)]
    title: Annotated[Text, Field(max_length=200)] = "text"
    anchorkv: Wishes | None = None


class DocumentReply(BaseModel):
    """What is known of a document."""

    id: str
    object: Literal["document"] = "document"
    title: str
    created: float
    tokens: int
    policy: str
    policy_config: AnchorConfig
    kept_cells: int
    reduction: float
    kv_bytes: int
    file_bytes: int
    reading_seconds: float
    resident: bool = Field(description="whether its cells are in memory now; else they are on disk")
    damage: str


class DocumentList(BaseModel):
    """A tenant's documents, oldest first."""

    object: Literal["list"] = "list"
    data: list[DocumentReply]


class SegmentList(BaseModel):
    """What every anchor of a document holds."""

    object: Literal["list"] = "list"
    document: str
    data: list[replies.Segment]


class DeletedReply(BaseModel):
    """It is gone."""

    id: str
    object: Literal["document.deleted"] = "document.deleted"
    deleted: Literal[True] = True


_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {
    "application/json": {"schema": {"$ref": "#/components/schemas/DocumentRequest"}},
    "multipart/form-data": {"schema": {
        "type": "object", "required": ["file"], "properties": {
            "file": {"type": "string", "format": "binary", "description": "txt, md, html, pdf or docx"},
            "title": {"type": "string", "maxLength": 200},
            "anchorkv": {"type": "string", "description": "the options of DocumentRequest.anchorkv, as JSON"},
        },
    }},
}}}


@router.post(
    "/v1/documents", response_model=DocumentReply, operation_id="upload", openapi_extra=_BODY,
    responses=responses(400, 401, 403, 413, 429, 503, 504),
)
async def upload(request: Request, service: ServiceOf, caller: UserOf) -> Any:
    """Read a document: JSON text, or a file as multipart/form-data. It is kept when this returns."""
    given = await _given(request, service)
    wishes = given.anchorkv or Wishes()
    if wishes.document is not None:
        raise bad("A document is no part of another; leave 'document' out.", "anchorkv.document")
    facts = await unless_gone(request, service.add_document(caller, given.title, given.text, wish_of(wishes)))
    return _reply(facts, service)


@router.get("/v1/documents", response_model=DocumentList, operation_id="documents", responses=responses(401, 403))
async def documents(service: ServiceOf, caller: UserOf) -> Any:
    """List the tenant's documents."""
    found = service.scheduler.list_documents(caller.tenant)
    return {"object": "list", "data": [_reply(facts, service) for facts in found]}


@router.get(
    "/v1/documents/{number}", response_model=DocumentReply, operation_id="document",
    responses=responses(400, 401, 403, 404),
)
async def document(number: Number, service: ServiceOf, caller: UserOf) -> Any:
    """One document."""
    return _reply(service.scheduler.get_document(caller.tenant, number), service)


@router.get(
    "/v1/documents/{number}/segments", response_model=SegmentList, operation_id="segments",
    responses=responses(400, 401, 403, 404, 429, 503),
)
async def segments(number: Number, request: Request, service: ServiceOf, caller: UserOf) -> Any:
    """What was kept, dropped and pinned of each segment, and why; the anchors are what stayed of it."""
    found = await unless_gone(request, service.segments(caller, number))
    return {"object": "list", "document": number, "data": [replies.segment_of(segment) for segment in found]}


@router.delete(
    "/v1/documents/{number}", response_model=DeletedReply, operation_id="delete_document",
    responses=responses(400, 401, 403, 404, 503),
)
async def delete(number: Number, service: ServiceOf, caller: UserOf) -> Any:
    """Remove a document from disk and memory."""
    await service.delete_document(caller, number)
    return {"id": number, "object": "document.deleted", "deleted": True}


async def _given(request: Request, service: Service) -> DocumentRequest:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _file(request, service)
    if kind != "application/json":
        raise bad("Send a document as application/json or as multipart/form-data.", "content-type")
    body = await request.body()
    try:
        return DocumentRequest.model_validate_json(body)
    except ValidationError as error:
        raise sentence([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]) from None


async def _file(request: Request, service: Service) -> DocumentRequest:
    try:
        form = await request.form(max_files=1, max_fields=8, max_part_size=1 << 20)
    except HTTPException as error:
        raise bad(f"The form cannot be read: {str(error.detail).rstrip('.')}.", code="invalid_form") from None
    try:
        file, title, options = form.get("file"), form.get("title"), form.get("anchorkv")
        if not isinstance(file, UploadFile):
            raise bad("The form has no file; send one in the field 'file'.", "file", "missing_field")
        name = PurePath((file.filename or "file").replace("\\", "/")).name[:200] or "file"
        data = await file.read(service.bounds.upload_bytes + 1)
        fields: dict[str, Any] = {"title": title if isinstance(title, str) else name}
        try:
            if isinstance(options, str) and options:
                fields["anchorkv"] = Wishes.model_validate_json(options)
            given = DocumentRequest(text=".", **fields)  # tell what is wrong with these before the file is opened
        except ValidationError as error:
            raise sentence([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]) from None
    finally:
        await form.close()
    if len(data) > service.bounds.upload_bytes:
        raise Refused(413, f"The file is larger than {service.bounds.upload_bytes:,} bytes; send it in parts.")
    text = await unless_gone(request, service.extract(data, name))
    return given.model_copy(update={"text": text})


def _reply(facts: DocumentFacts, service: Service) -> dict[str, Any]:
    kept = max(1, facts.kept_cells)
    return {
        "id": facts.id, "object": "document", "title": facts.title, "created": facts.created, "tokens": facts.tokens,
        "policy": service.policies.name_of(facts.policy), "policy_config": facts.policy,
        "kept_cells": facts.kept_cells, "reduction": round(facts.tokens / kept, 3), "kv_bytes": facts.kv_bytes,
        "file_bytes": facts.file_bytes, "reading_seconds": facts.reading_seconds, "resident": facts.resident,
        "damage": facts.damage,
    }
