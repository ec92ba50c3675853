"""Which SGLang the backend was tested with. Imports nothing of it."""

from kvferry_proto.errors import Code, FerryError

VERSIONS = ("0.5.23",)  # docs/engines.md has the table
ALLOW = "KVFERRY_ALLOW_UNTESTED_VERSION"


def check_version(version: str, *, is_allowed: bool) -> None:
    """FerryError(engine_unsupported) for an SGLang that nobody has tried this with.

    What a backend is to SGLang is not a stable interface, and changes with patch and post releases
    too. Another build of a release ("+cpu") is the same.
    """
    if version.split("+")[0] not in VERSIONS and not is_allowed:
        raise FerryError(
            Code.ENGINE_UNSUPPORTED,
            f"kvferry was tested with SGLang {', '.join(VERSIONS)}, not {version}; to try it all "
            f"the same set {ALLOW}=1",
        )
