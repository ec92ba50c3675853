"""Which vLLM the connector was tested with. Imports nothing of it."""

from collections.abc import Mapping
from typing import Any

from kvferry_proto.errors import Code, FerryError

VERSIONS = ("0.32",)  # docs/engines.md has the table


def check_version(version: str, extra: Mapping[str, Any]) -> None:
    """FerryError(engine_unsupported) for a vLLM that nobody has tried this with.

    Its connector interface is not a stable one.
    """
    release = ".".join(version.split(".")[:2])
    if release not in VERSIONS and not extra.get("allow_untested_version"):
        raise FerryError(
            Code.ENGINE_UNSUPPORTED,
            f"KvferryConnector was tested with vLLM {', '.join(VERSIONS)}, not {version}; to try it "
            'all the same set "allow_untested_version": true in kv_connector_extra_config',
        )
