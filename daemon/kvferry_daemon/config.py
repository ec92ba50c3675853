"""Everything an operator may set: flags, environment (KVFERRY_...) and a TOML file, in one model.

A flag beats the environment, which beats the file, which beats the default. A name that nobody
knows is refused wherever it stands: a misspelt limit that is ignored is found out too late.
"""

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from kvferry_daemon.access import Access, gid_of
from kvferry_daemon.core.tenants import Tenancy
from kvferry_daemon.memory.placement import NODE_MAX, parse_cpus
from kvferry_proto.runtime_dir import default_runtime_dir

ENV_PREFIX = "KVFERRY_"
ENV_FILE = "KVFERRY_CONFIG"
# What workers read: one file of variables may serve them and the daemon.
WORKERS_OWN = frozenset(
    {
        "KVFERRY_ALLOW_UNTESTED_VERSION",
        "KVFERRY_ALLOW_UNTRIED",
        "KVFERRY_BLOCK_SIZE_TOKENS",
        "KVFERRY_MODEL_FINGERPRINT",
    }
)
# Kubernetes and Docker put these into every container beside a service called kvferry.
SERVICE_LINK = re.compile(
    r"KVFERRY_(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
DEVICE = re.compile(r"host|cuda:(0|[1-9]\d?)")
SOCKET_PATH_MAX = 107  # sun_path of a Unix socket, without its final NUL
Seconds = Annotated[float, Field(gt=0, le=86400)]


class ConfigError(Exception):
    """The daemon cannot be run like this; the message names the setting and what to do."""


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
    deadline_max_s: Seconds = 3600.0

    @model_validator(mode="after")
    def _fit(self) -> "Deadlines":
        for name in ("stall_s", "lease_s", "hold_s"):
            if getattr(self, name) > self.deadline_max_s:
                raise ValueError(
                    f"{name}: {getattr(self, name):g} is over deadline_max_s, "
                    f"{self.deadline_max_s:g}"
                )
        if self.lease_s < 2 * self.heartbeat_s:  # it lives by pings; one may get lost
            raise ValueError(
                f"lease_s: {self.lease_s:g} is under twice heartbeat_s, {self.heartbeat_s:g}"
            )
        return self


class Config(Deadlines):
    """One daemon. Flat, so that a setting has one name in flags, environment and file."""

    runtime_dir: Path = Field(
        default_factory=default_runtime_dir,
        description="private directory for sockets, pools and worker locks; on tmpfs",
    )
    worker_group: str | None = Field(
        None, description="group, by name or number, whose processes may be workers, too"
    )
    operator_group: str | None = Field(
        None, description="group whose processes may drain and abort, too"
    )
    tenant: Tenancy = Field(
        "off", description="uid: workers of different users share no pool, and no transfer here"
    )
    peer_host: str = Field("127.0.0.1", min_length=1, description="address that peers connect to")
    peer_port: int = Field(0, ge=0, le=65535, description="0 takes a free one")
    data_port: int = Field(0, ge=0, le=65535, description="0 takes a free one")
    advertise_host: str | None = Field(
        None, min_length=1, description="what peers are told, if not peer_host"
    )
    keys_dir: Path | None = Field(
        None, description="this daemon's key and those of trusted peers; see `kvferry keys`"
    )
    insecure: bool = Field(False, description="allow clear text off loopback")
    http_host: str = Field(
        "127.0.0.1", min_length=1, description="address of metrics, probes and the status page"
    )
    http_port: int | None = Field(
        None, ge=0, le=65535, description="their port; 0 takes a free one; not set: no HTTP"
    )
    device: str = Field("host", description="where pools lie: host, or cuda:N, a GPU's own memory")
    budget_bytes: ByteSize = Field(
        ByteSize(1 << 30), description="memory for all pools, the host's or the GPU's"
    )
    tenant_budget_bytes: ByteSize | None = Field(
        None, description="memory for the pools of one tenant, where there are several"
    )
    pool_tokens: int | None = Field(
        None, ge=1, description="tokens that a pool holds; default: all that the budget leaves"
    )
    source_share: float = Field(0.5, ge=0, le=1, description="part of a pool for sending")
    window_tokens: int = Field(8192, ge=1, le=1 << 30, description="default window")
    transport: Literal["auto", "tcp", "nixl"] = Field(
        "auto", description="how blocks travel; auto: the best that both ends have"
    )
    streams: int = Field(1, ge=1, le=16, description="data connections to each source")
    chunk_bytes: ByteSize = Field(ByteSize(1 << 20), description="aimed-at size of a chunk")
    checksum: bool = Field(True, description="xxh3 over every chunk")
    payload_encryption: Literal["off", "tls"] = Field(
        "off", description="of data connections; set alike on all daemons"
    )
    numa_node: int | None = Field(
        None, ge=0, le=NODE_MAX, description="NUMA node for pools; copying stays on its CPUs"
    )
    copy_cpus: str = Field("", description="CPUs for copying, such as 0-3,8")
    transfers_max: int = Field(20_000, ge=1)
    worker_transfers_max: int = Field(16_000, ge=1, description="of one worker")
    workers_max: int = Field(1024, ge=1)
    connections_max: int = Field(
        4096, ge=1, le=1 << 16, description="at once, to the worker and to the peer socket each"
    )
    messages_a_s: int = Field(
        20_000, ge=1, description="from one worker, one peer that pulls, or one source"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="where traces go by OTLP/HTTP, such as http://127.0.0.1:4318/v1/traces; "
        "not set: none are made",
    )
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")
    log_format: Literal["auto", "human", "json"] = Field(
        "auto", description="auto: json, a line an event, unless stderr is a terminal"
    )

    @property
    def deadlines(self) -> Deadlines:
        """The delays and deadlines alone."""
        return Deadlines(**{name: getattr(self, name) for name in Deadlines.model_fields})

    @property
    def is_open_to_all(self) -> bool:
        """Whether others than this machine's processes reach our sockets, and need no key."""
        return self.keys_dir is None and not _is_loopback(self.peer_host)

    @property
    def access(self) -> Access:
        """Which users of this machine may do what."""
        groups = (self.worker_group, self.operator_group)
        workers, operators = (None if group is None else gid_of(group) for group in groups)
        return Access(workers, operators, by_tenant=self.tenant != "off")

    @field_validator("worker_group", "operator_group")
    @classmethod
    def _there_is(cls, group: str | None) -> str | None:
        try:
            if group is not None:
                gid_of(group)
        except KeyError:
            raise ValueError(
                f"there is no group {group!r} here; make it, or give a number"
            ) from None
        return group

    @model_validator(mode="after")
    def _check(self) -> "Config":
        path = str(self.runtime_dir / "control.sock")
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ValueError(f"runtime_dir: {path} is over {SOCKET_PATH_MAX} bytes long")
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device: {self.device!r} is neither host nor cuda:N, such as cuda:0")
        if self.is_open_to_all and not self.insecure:
            raise ValueError(
                f"peer_host: {self.peer_host} is not loopback: traffic would be in clear text, and "
                "whoever reaches it could pull every payload; make keys (`kvferry keys new`) and set keys_dir, or set "
                "insecure=true if everybody on the network is trusted"
            )
        if self.payload_encryption == "tls":
            self._check_encryption()
        if self.tenant != "off":
            self._check_tenants()
        if _is_wildcard(self.http_host):
            raise ValueError(
                f"http_host: {self.http_host} stands for every address of a machine; name loopback, "
                "or the pod's own"
            )
        parse_cpus(self.copy_cpus)
        told = self.advertise_host or self.peer_host
        if _is_wildcard(told):
            raise ValueError(
                f"advertise_host: peers cannot connect to {told}, which stands for every address "
                "of a machine; set advertise_host to the one that they reach this daemon at"
            )
        return self

    def _check_tenants(self) -> None:
        if self.worker_group is None:
            raise ValueError(
                "tenant: without worker_group all workers run as the daemon's own user, or as root, "
                "which are one tenant; name the group that their users share"
            )
        if self.tenant_budget_bytes is None:
            raise ValueError(
                "tenant: the first one's pool would take the whole budget; set tenant_budget_bytes"
            )
        if self.transport == "nixl":
            raise ValueError(
                "tenant: a peer that NIXL offers one block can read all of the pool; set transport to tcp "
                "or auto"
            )
        if self.operator_group == self.worker_group:
            raise ValueError(
                "operator_group: with tenant the workers' group must not be the operators', who see "
                "and end every transfer"
            )
        if self.keys_dir is None:
            raise ValueError(
                "tenant: in clear every user of this machine may connect to the peer port and pull what a "
                "tenant sends; make keys (`kvferry keys new`) and set keys_dir"
            )

    def _check_encryption(self) -> None:
        if self.transport == "nixl":
            raise ValueError(
                "payload_encryption: NIXL encrypts nothing; set transport to tcp or auto, or "
                "payload_encryption to off"
            )
        if self.is_open_to_all:
            raise ValueError(
                "payload_encryption: without keys_dir whoever sits between two daemons can show a "
                "certificate of its own; make keys (`kvferry keys new`) and set keys_dir"
            )


def load(flags: Mapping[str, Any], file: Path | None = None) -> Config:
    """Build the config from the flags that were given, the environment and the TOML file.

    ``file`` beats the one that KVFERRY_CONFIG names. Raises ConfigError.
    """
    env = _from_environment()
    if file is None and os.environ.get(ENV_FILE):
        file = Path(os.environ[ENV_FILE])
    settings = _from_file(file) if file is not None else {}
    said_as = {name: f"{name} in {file}" for name in settings}
    said_as |= {name: _variable(name) for name in env}
    said_as |= {name: "--" + name.replace("_", "-") for name in flags}
    try:
        return Config(**{**settings, **env, **flags})
    except ValidationError as error:
        raise ConfigError(_words(error, said_as)) from error


def _from_environment() -> dict[str, str]:
    """Settings by name. An empty variable is as good as none, as it is for a shell's ${X:-}."""
    known = {_variable(name): name for name in Config.model_fields}
    ours = [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]
    given = [name for name in ours if not _is_service_link(name)]
    _refuse_unknown("environment variable", given, [*known, ENV_FILE, *WORKERS_OWN])
    return {known[name]: os.environ[name] for name in given if name in known and os.environ[name]}


def _is_service_link(name: str) -> bool:
    linked = name.endswith("_PORT") and "://" in os.environ[name]
    return linked or SERVICE_LINK.fullmatch(name) is not None


def _from_file(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the file {path}: {error.strerror}") from error
    except ValueError as error:  # TOML's and UTF-8's mistakes both
        raise ConfigError(f"{path} is not TOML: {error}") from error
    _refuse_unknown(f"setting in {path}:", settings, Config.model_fields)
    return settings


def _refuse_unknown(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            likely = difflib.get_close_matches(name.upper(), [k.upper() for k in known], 1, 0.0)
            (near,) = [k for k in known if k.upper() in likely]
            raise ConfigError(f"unknown {what} {name}; the nearest known is {near}")


def _words(error: ValidationError, said_as: Mapping[str, str]) -> str:
    words = []
    for one in error.errors(include_url=False):
        name = ".".join(map(str, one["loc"]))
        message = one["msg"].removeprefix("Value error, ")  # our own, which name the setting
        words.append(f"{said_as.get(name, name)}: {message}" if name else message)
    return "; ".join(words)


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _is_loopback(host: str) -> bool:
    address = _numeric(host)
    return host == "localhost" if address is None else address.is_loopback


def _is_wildcard(host: str) -> bool:
    address = _numeric(host)
    return host == "*" if address is None else address.is_unspecified


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, in any way of writing one ("0" is 0.0.0.0); None for a name."""
    try:
        (_, _, _, _, found), *_ = socket.getaddrinfo(
            host.strip("[]"), None, flags=socket.AI_NUMERICHOST
        )
    except (OSError, UnicodeError):  # a name's own look-up is left to the socket
        return None
    address = ipaddress.ip_address(str(found[0]).partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
