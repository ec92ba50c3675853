"""Asks a live daemon by HTTP."""

import urllib.error
import urllib.request

from live import LiveDaemon


def get(daemon: LiveDaemon, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and body."""
    request = urllib.request.Request(daemon.http + path, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics_of(daemon: LiveDaemon) -> str:
    """Its metrics as text."""
    status, text = get(daemon, "/metrics")
    assert status == 200, text
    return text
