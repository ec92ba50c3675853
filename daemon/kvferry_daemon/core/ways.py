"""Which transport two daemons move blocks by: what both can, and their operators wish."""

from kvferry_proto.errors import Code, FerryError
from kvferry_proto.peer import Transport, Ways


def choose(sink: Ways, source: Ways) -> tuple[Transport, str]:
    """The transport of a connection, and why it is this one.

    Raises FerryError: encryption_differs where only one of them encrypts, transport_unavailable
    where one operator insists on what cannot be.
    """
    ends = (("sink", sink), ("source", source))
    if sink.payload_encryption != source.payload_encryption:
        told = ", ".join(f"the {name} has {ways.payload_encryption}" for name, ways in ends)
        raise FerryError(Code.ENCRYPTION_DIFFERS, f"payload_encryption: {told}")
    set_to_tcp = [name for name, ways in ends if ways.wish == "tcp"]
    set_to_nixl = [name for name, ways in ends if ways.wish == "nixl"]
    obstacle = _obstacle(sink, source)
    if set_to_nixl:
        if set_to_tcp:
            obstacle = f"the {set_to_tcp[0]} is set to tcp"
        if obstacle:
            message = f"the {set_to_nixl[0]} is set to nixl, but {obstacle}"
            raise FerryError(Code.TRANSPORT_UNAVAILABLE, message)
        return "nixl", f"the {set_to_nixl[0]} is set to it"
    if set_to_tcp:
        return "tcp", f"the {set_to_tcp[0]} is set to it"
    if obstacle:
        return "tcp", obstacle
    slow = [f"the {name}: {ways.why}" for name, ways in ends if not ways.fast]
    if slow:
        return "tcp", f"NIXL would not be faster, {slow[0]}"
    return "nixl", "both ends have hardware for it"


def _obstacle(sink: Ways, source: Ways) -> str:
    for name, ways in (("sink", sink), ("source", source)):
        if not ways.nixl:
            return f"the {name} has no NIXL: {ways.why or 'it does not say why'}"
    if _series(sink.nixl) != _series(source.nixl):
        return f"the sink has NIXL {sink.nixl}, the source {source.nixl}"
    return ""


def _series(version: str) -> list[str]:
    """What has to be equal: NIXL promises nothing between minor versions."""
    return version.split(".")[:2]
