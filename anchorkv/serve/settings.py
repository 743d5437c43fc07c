"""Everything that an operator decides, as one validated object: a YAML file, then ANCHORKV_… , then the command line.

Secrets may come from the environment alone: the audit database's URL with its password. No secret is ever shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import Field, ValidationError, model_validator
from pydantic.types import ByteSize

from anchorkv.config import AnchorConfig, policy_of
from anchorkv.errors import ConfigError
from anchorkv.models import EngineName
from anchorkv.poc.results import Lang
from anchorkv.poc.rollout import Rollout
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.auth import LOCAL, is_loopback
from anchorkv.serve.engine import LEAST_CELLS, MOST_CONTEXTS, MOST_SESSIONS
from anchorkv.serve.keys import FILE, check_tenant
from anchorkv.serve.limits import TenantLimits
from anchorkv.serve.settings_file import dump, merged, sentence
from anchorkv.serve.settings_groups import (
    AuditSettings,
    CanarySettings,
    FallbackSettings,
    Group,
    PolicyBounds,
    RequestLimits,
    WatchSettings,
)

LogLevel = Literal["debug", "info", "warning", "error"]
ENVIRONMENT = {
    "ANCHORKV_AUDIT_DATABASE": "audit.database", "ANCHORKV_KEYS": "keys", "ANCHORKV_DATA": "data",
}
"""Variables, and what they set. None is called as Kubernetes names a service's: ANCHORKV_PORT, ANCHORKV_SERVICE_…"""
PATHS = ("data", "keys", "canary.file")
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_MEMORY = ("cells", "kv_bytes")


class ServeSettings(Group):
    """All of it. `load` reads it."""

    model: str | None = Field(None, description="hub id, folder or GGUF file; null: the built-in SmolLM2-135M-Instruct")
    engine: EngineName = Field("auto", description="auto, llama or torch; auto takes llama for GGUF files")
    threads: int | None = Field(None, ge=1, description="processor threads; null: chosen by the engine")
    adapter: bool = Field(True, description="whether the built-in model uses its built-in adapter")
    policy: str | None = Field(
        None, description="a preset or a policy (.json), also changed (default:reduction=24), or the rollout.yaml of a "
        "proof of concept; null: the model's own"
    )
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; any but loopback needs API keys")
    port: int = Field(8080, ge=0, le=65_535, description="0: any that is free")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="names that requests may call the server by; empty: this machine's on loopback, else any"
    )
    cells: int | None = Field(None, ge=LEAST_CELLS, description="KV cells there are; give this or kv_bytes")
    kv_bytes: ByteSize | None = Field(None, gt=0, description="memory for KV cells, such as 2GiB; null: 1GiB")
    contexts: int | None = Field(
        None, ge=1, le=MOST_CONTEXTS, description="parts that the cells are kept in: more write faster on a CPU, and "
        "each must hold the largest request; null: as many as hold the model's window, at most 4"
    )
    max_sessions: int = Field(64, ge=1, le=MOST_SESSIONS - 4, description="requests that run at once")
    max_waiting: int = Field(256, ge=0, description="requests that wait; more are told to come back")
    data: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("anchorkv"), description="folder of what the server keeps"
    )
    keys: Path | None = Field(None, description="file of API keys; null: keys.json in the data folder, if there is one")
    audit: AuditSettings = AuditSettings.model_validate({})
    bounds: PolicyBounds = PolicyBounds.model_validate({})
    requests: RequestLimits = RequestLimits.model_validate({})
    limits: TenantLimits = Field(default_factory=TenantLimits, description="of every tenant")
    tenants: dict[str, TenantLimits] = Field({}, description="what differs for some: {name: {concurrent: 4}}")
    watch: WatchSettings = WatchSettings.model_validate({})
    fallback: FallbackSettings = FallbackSettings.model_validate({})
    canary: CanarySettings = CanarySettings.model_validate({})
    drain_seconds: float = Field(30, ge=0, description="time that running requests have to end when the server stops")
    metrics_by_tenant: bool = Field(False, description="whether /metrics tells figures apart by tenant")
    log_level: LogLevel = "info"
    lang: Lang = Field("en", description="language of the pages: en or ja")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cells is not None and self.kv_bytes is not None:
            raise ValueError("give cells or kv_bytes, not both")
        if self.keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"the server would answer other machines (host {self.host}) without API keys; make some with "
                "`anchorkv keys add TENANT`, or listen on 127.0.0.1"
            )
        for name in self.tenants:
            if name == EVERY_TENANT:
                raise ValueError("what holds for every tenant belongs under limits, not tenants")
            try:
                check_tenant(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
            if self.keys_file is None and name != LOCAL:
                raise ValueError(f"without API keys there is no tenant but '{LOCAL}', so '{name}' can have no limits")
        if any(not host or "/" in host for host in self.allowed_hosts):
            raise ValueError("write the names in allowed_hosts without http:// and path, such as anchors.example.com")
        return self

    @classmethod
    def load(
        cls, path: Path | None = None, given: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ServeSettings:
        """path: a YAML file, whose paths are relative to it. given: what the command line says, by dotted names
        ("audit.text"); None says nothing. It goes before the environment (os.environ if None), that before the file.

        Raises ConfigError, one sentence, for what is unknown, out of range or contradictory.
        """
        found = os.environ if environment is None else environment
        variables = {name: found.get(key) or None for key, name in ENVIRONMENT.items()}
        content = merged(path, (variables, given or {}), PATHS, ("model", "policy"))
        said = {name for name in _MEMORY if (given or {}).get(name) is not None}
        for name in set(_MEMORY) - said if said else ():  # one on the command line goes before the other in the file
            content.pop(name, None)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ConfigError(sentence(error, cls, path)) from None

    def to_yaml(self) -> str:
        """Every setting with what it means; the database's URL, which may hold a password, is left out."""
        return dump(self)

    @property
    def keys_file(self) -> Path | None:
        """None: there are no keys."""
        usual = self.data.expanduser() / FILE
        return self.keys.expanduser() if self.keys is not None else usual if usual.is_file() else None

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that the Host header may have: on loopback never another site's (DNS rebinding)."""
        return self.allowed_hosts or (LOOPBACK_HOSTS if is_loopback(self.host) else ("*",))

    @property
    def audit_database(self) -> str:
        """SQLite file or URL. A secret where the URL holds a password."""
        given = self.audit.database
        return given.get_secret_value() if given is not None else str(self.data.expanduser() / "audit.db")

    @property
    def documents_folder(self) -> Path:
        return self.data.expanduser() / "documents"

    @property
    def spool_folder(self) -> Path:
        return self.data.expanduser() / "spool"

    def cells_of(self, cell_bytes: int) -> int:
        """KV cells there are in all. cell_bytes: of one cell. Raises ConfigError where the memory is too small."""
        if self.cells is not None:
            return self.cells
        memory = self.kv_bytes if self.kv_bytes is not None else 2**30
        if (cells := memory // cell_bytes) < LEAST_CELLS:
            raise ConfigError(
                f"kv_bytes holds {cells} KV cells of this model ({cell_bytes:,} bytes each), and a server needs "
                f"{LEAST_CELLS}; give at least {math.ceil(LEAST_CELLS * cell_bytes / 2**20)}MiB."
            )
        return cells

    def chosen_policy(self) -> Rollout | AnchorConfig | None:
        """What `policy` names; None: the model's own. Raises ConfigError when it cannot be read."""
        if self.policy is None:
            return None
        path = Path(self.policy).expanduser()
        if path.suffix.lower() in (".yaml", ".yml"):
            return Rollout.load(path)
        return policy_of(self.policy, files="a .json file of one, or a PoC's rollout.yaml")
