"""Who an address belongs to, as far as bounds go."""

from ipaddress import IPv6Address, IPv6Network, ip_address

HOST_BITS = 64  # of an IPv6 address: whoever has one address of such a network has them all


def host_of(address: str) -> str:
    """An IPv4 address, also one that IPv6 wraps, or the network that an IPv6 one is in."""
    try:
        found = ip_address(address)
    except ValueError:
        return address  # a process of this machine, or nobody knows who
    if not isinstance(found, IPv6Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(IPv6Network((int(found) >> HOST_BITS << HOST_BITS, 128 - HOST_BITS)))
