"""Two engines, each at a daemon of its own: prefill at ``a``, decode at ``b``."""

from dataclasses import dataclass

from live import LiveDaemon
from vllm_live.asking import wait_until
from vllm_live.engines import Engine


@dataclass
class Pair:
    """What the tests of a file share. Both engines can do either."""

    a: LiveDaemon
    b: LiveDaemon
    prefill: Engine
    decode: Engine

    def check_nothing_is_left(self) -> None:
        """No block is held, in any engine or daemon."""
        wait_until(self.prefill.blocks_are_free)
        wait_until(self.decode.blocks_are_free)
        self.a.wait_until_free()
        self.b.wait_until_free()
