"""Everything an operator may set: flags, environment (KVFERRY_...) and a TOML file, in one model.

A flag beats the environment, which beats the file, which beats the default.
"""

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

SOCKET_PATH_MAX = 107  # sun_path of a Unix socket, without its final NUL
Seconds = Annotated[float, Field(gt=0, le=86400)]


class Deadlines(BaseModel):
    """Delays and deadlines, in seconds. The defaults suit a fleet on one network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resend_s: Seconds = 0.2
    resend_max_s: Seconds = 2.0
    stall_s: Seconds = 60.0
    connect_s: Seconds = 15.0
    lease_s: Seconds = 30.0
    hold_s: Seconds = 60.0
    drain_s: Seconds = 2.0
    heartbeat_s: Seconds = 1.0
    lost_s: Seconds = 3.0
    tombstone_s: Seconds = 600.0
    stop_s: Seconds = 30.0


class Config(BaseSettings):
    """One daemon."""

    model_config = SettingsConfigDict(
        env_prefix="KVFERRY_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    runtime_dir: Path = Field(
        default_factory=lambda: default_runtime_dir(),
        description="private directory for sockets, pools and worker locks; on tmpfs",
    )
    peer_host: str = Field("127.0.0.1", description="address that peers connect to")
    peer_port: int = Field(0, ge=0, le=65535, description="0 takes a free one")
    data_port: int = Field(0, ge=0, le=65535, description="0 takes a free one")
    advertise_host: str | None = Field(None, description="what peers are told, if not peer_host")
    insecure: bool = Field(False, description="allow clear text off loopback")
    budget_bytes: ByteSize = Field(ByteSize(1 << 30), description="host memory for all pools")
    pool_tokens: int | None = Field(
        None, ge=1, description="tokens that a pool holds; default: all that the budget leaves"
    )
    source_share: float = Field(0.5, ge=0, le=1, description="part of a pool for sending")
    window_tokens: int = Field(8192, ge=1, le=1 << 30, description="default window")
    streams: int = Field(1, ge=1, le=16, description="data connections to each source")
    chunk_bytes: ByteSize = Field(ByteSize(1 << 20), description="aimed-at size of a chunk")
    checksum: bool = Field(True, description="xxh3 over every chunk")
    transfers_max: int = Field(20_000, ge=1)
    workers_max: int = Field(1024, ge=1)
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    deadlines: Deadlines = Deadlines()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        path = str(self.runtime_dir / "control.sock")
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ValueError(f"runtime_dir: {path} is over {SOCKET_PATH_MAX} bytes long")
        if not self.insecure and not _is_loopback(self.peer_host):
            raise ValueError(
                f"peer_host: {self.peer_host} is not loopback and traffic would be in clear text; "
                "set insecure=true if the network is trusted"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the TOML file named by KVFERRY_CONFIG."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file()))


def load(flags: dict[str, Any]) -> Config:
    """Build the config; ``flags`` holds only what was given. Raises pydantic's ValidationError."""
    return Config(**flags)


def config_file() -> Path | None:
    """The TOML file, if one is named."""
    name = os.environ.get("KVFERRY_CONFIG")
    return Path(name) if name else None


def default_runtime_dir() -> Path:
    """A directory on tmpfs of this user's own."""
    return Path("/dev/shm") / f"kvferry-{os.getuid()}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
