"""Why does nobody answer at an address? One connection attempt tells."""

import asyncio

PROBE_S = 3.0
ZMTP_SIGNATURE = b"\xff"  # first byte of every ZMTP 3 greeting


def split_address(address: str) -> tuple[str, int]:
    """Host and port of a tcp://host:port address that was checked before."""
    host, _, port = endpoint_of(address).removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def endpoint_of(address: str) -> str:
    """An address without the key that it may bear."""
    return address.partition("?")[0]


def key_of(address: str) -> str:
    """The key of the daemon at an address; empty where it talks in clear."""
    return address.partition("?key=")[2]


async def probe(address: str) -> str:
    """Say in words what happens at a tcp://host:port address."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"connecting took over {PROBE_S:g} s (unreachable, or a firewall drops it)"
    except (OSError, UnicodeError) as error:
        return f"connecting failed: {getattr(error, 'strerror', None) or error}"
    try:
        async with asyncio.timeout(PROBE_S):
            greeting = await reader.read(1)
    except TimeoutError:
        return "something listens there but says nothing; it is no kvferry"
    except OSError as error:
        return f"the connection broke: {error.strerror or error}"
    finally:
        writer.close()
    if greeting != ZMTP_SIGNATURE:
        return "something listens there, but it is no kvferry (it does not speak ZeroMQ)"
    words = "something speaks ZeroMQ there but gives no kvferry answer"
    if key_of(address):
        words += "; does it have that key, and trust ours?"
    return words
