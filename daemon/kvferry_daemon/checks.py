"""What a config asks of the machine, beyond what it says of itself: keys, CPUs, what is installed."""

from kvferry_daemon import traces
from kvferry_daemon.config import Config
from kvferry_daemon.http import listen
from kvferry_daemon.keys import Keys
from kvferry_daemon.memory.placement import Placement
from kvferry_daemon.transports.nixl import ways
from kvferry_daemon.transports.tcp.tls import Certificate


def check_here(config: Config) -> None:
    """Look at what the daemon will ask for, and make nothing of it.

    Raises what the daemon itself raises: HttpMissing, KeysRefused, EncryptionFailed,
    PlacementRefused, TracesRefused, NixlMissing.
    """
    if config.http_port is not None:
        listen.check_installed()
    if config.keys_dir is not None:
        Keys(config.keys_dir)
    if config.payload_encryption == "tls":
        Certificate()
    Placement.settle(config.numa_node, config.copy_cpus)
    if config.otlp_endpoint is not None:
        traces.check_installed()
    ways.wanted(config.transport)
