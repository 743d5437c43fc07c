"""A file from outside becomes text in a process of its own, with little memory, little time and nothing to lose.

`python -m anchorkv.serve.extraction NAME` reads the file on standard input and writes {"text"} or {"error"} as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import anchorkv
from anchorkv.errors import DocumentError
from anchorkv.extract import KINDS, extract
from anchorkv.serve.refusals import Refused

MEMORY = 2**30
"""Bytes that a file may take to open; a small archive can hold a large one."""
SECONDS = 60.0
"""That a file may take to open, at most."""
AT_ONCE = 2
_SUFFIXES = {".txt", ".md", ".html", ".htm", ".xhtml", ".pdf", ".docx", ".text", ".markdown", ""}


async def extract_apart(data: bytes, name: str, *, seconds: float, most: int) -> str:
    """The text of `data`, a file called `name`. most: bytes of the text.

    Raises DocumentError for what cannot be read, Refused (413) for too much text.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DocumentError(f"Files of the kind {suffix[:20]!r} cannot be read; give {KINDS}.")
    out = await _run(data, suffix, seconds, most)
    if len(out) > 8 * most:
        raise _too_much(most)
    try:
        found = json.loads(out)
        text = found.get("text")
    except (ValueError, AttributeError):
        raise DocumentError("The file takes too much memory or time to open; save it in a simpler form.") from None
    if text is None:
        raise DocumentError(str(found.get("error")))
    if len(text.encode("utf-8", "replace")) > most:
        raise _too_much(most)
    return str(text)


def _too_much(most: int) -> Refused:
    return Refused(
        413, f"The document holds more than {most:,} bytes of text; send it in parts.", code="document_too_large",
    )


async def _run(data: bytes, suffix: str, seconds: float, most: int) -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "anchorkv.serve.extraction", suffix or ".txt", str(int(seconds) + 1),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={"PYTHONPATH": str(Path(anchorkv.__file__).parents[1]), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
    )
    try:
        async with asyncio.timeout(seconds):
            return await _talk(process, data, 8 * most + 1)
    except TimeoutError:
        raise DocumentError(
            f"The file takes more than {seconds:g} seconds to open; save it in a simpler form."
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _talk(process: asyncio.subprocess.Process, data: bytes, most: int) -> bytes:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a process without pipes")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it gave up early: what it wrote says why
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()
    out = bytearray()
    while len(out) < most and (chunk := await process.stdout.read(1 << 16)):
        out += chunk
    return bytes(out)


def main(suffix: str, seconds: int) -> None:
    """The process: see the module."""
    _limit(seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(sys.stdin.buffer.read())
        try:
            found = {"text": extract(path)}
        except DocumentError as error:
            found = {"error": str(error).replace(str(path), "The file")}
        except MemoryError:
            found = {"error": "The file takes too much memory to open; save it in a simpler form."}
    sys.stdout.write(json.dumps(found))


def _limit(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system: the time limit holds all the same
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, MEMORY)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
