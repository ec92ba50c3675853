"""What this end can do with NIXL, and whether it is worth while."""

import importlib.metadata
import logging
from pathlib import Path

from kvferry_daemon.transports.nixl.agent import NixlFailed, NixlMissing, load
from kvferry_daemon.transports.nixl.poller import Poller
from kvferry_daemon.transports.tcp.events import Enter, stay
from kvferry_proto.peer import Encryption, Ways

log = logging.getLogger(__name__)
RDMA_DEVICES = Path("/sys/class/infiniband")


def ways(wish: str, device_memory: bool = False, rdma_devices: Path = RDMA_DEVICES) -> Ways:
    """The ways of this end. NIXL is looked for, and not loaded yet."""
    if wish == "tcp":
        return Ways(wish="tcp", why="transport is set to tcp")
    try:
        version = importlib.metadata.version("nixl")
    except importlib.metadata.PackageNotFoundError:
        return Ways.model_validate({"wish": wish, "why": "the package nixl is not installed"})
    fast = device_memory or any(_entries(rdma_devices))
    why = "" if fast else "no RDMA device, and pools in host memory"
    return Ways.model_validate({"wish": wish, "nixl": version, "fast": fast, "why": why})


def wanted(wish: str, device_memory: bool = False) -> Ways:
    """The same; NixlMissing where the operator insists on NIXL and it is not installed."""
    found = ways(wish, device_memory)
    if wish == "nixl" and not found.nixl:
        raise NixlMissing(f"transport is set to nixl, but {found.why}: pip install 'kvferry[nixl]'")
    return found


def begin(
    wish: str,
    device_memory: bool = False,
    enter: Enter = stay,
    encryption: Encryption = "off",
    by_tenant: bool = False,
) -> tuple[Ways, Poller | None]:
    """The ways of this end, and what NIXL's is gone by, if it may be: it encrypts nothing.

    Nor does it keep a peer that is offered one block from the others of its pool (``by_tenant``).
    ``enter`` is called by the thread that talks to NIXL, before all else.
    Raises NixlFailed where the operator insists on NIXL and it cannot be had. Where it would not be
    chosen of itself it is not loaded before some peer insists.
    """
    if encryption == "tls":
        return Ways(wish="tcp", why="payload_encryption is tls", payload_encryption="tls"), None
    if by_tenant:
        return Ways(wish="tcp", why="there are tenants"), None
    found = wanted(wish, device_memory)
    if not found.nixl:
        return found, None
    if wish == "auto" and not found.fast:  # loaded only if a peer insists
        return found, Poller(enter, eager=False)
    try:
        load()
    except NixlFailed as error:
        if wish == "nixl":
            raise
        log.warning("%s", error)
        return Ways(wish="auto", why=str(error)[:1024]), None
    return found, Poller(enter)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
