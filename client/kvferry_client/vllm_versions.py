"""Which vLLM the connector was tested with. Imports nothing of it."""

from collections.abc import Mapping
from typing import Any

VERSIONS = ("0.32",)  # docs/engines.md has the table


def check_version(version: str, extra: Mapping[str, Any]) -> None:
    """ValueError for a vLLM that nobody has tried this with: its connector API changes freely."""
    release = ".".join(version.split(".")[:2])
    if release not in VERSIONS and not extra.get("allow_untested_version"):
        raise ValueError(
            f"KvferryConnector was tested with vLLM {', '.join(VERSIONS)}, not {version}: use one of "
            'these, or set "allow_untested_version": true in kv_connector_extra_config'
        )
