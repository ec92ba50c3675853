"""How long a message waits for a daemon's loop: heartbeats of a quiet worker, timed."""

import threading
import time
from contextlib import suppress
from pathlib import Path

from kvferry_client import Dtype, Layout, Plane, connect
from kvferry_proto import worker
from kvferry_proto.errors import FerryError

LAYOUT = Layout(planes=(Plane(name="token", dtype=Dtype.INT64),), block_size_tokens=16)


class Probe(threading.Thread):
    """Beats every ``every_s``, until stopped."""

    def __init__(self, directory: Path, every_s: float) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self._stopping = threading.Event()
        self._every_s = every_s
        self._client = connect(directory, LAYOUT, "probe")

    def run(self) -> None:
        while not self._stopping.wait(self._every_s):
            begun_s = time.perf_counter()
            with suppress(FerryError):  # nobody has answered for 10 s: that is how long it waited
                self._client.call(worker.Heartbeat())
            self.seconds.append(time.perf_counter() - begun_s)
        self._client.close()

    def result(self) -> dict[str, float]:
        """In milliseconds."""
        self._stopping.set()
        self.join()
        ordered = sorted(self.seconds) or [0.0]
        return {
            "lag_p50_ms": round(ordered[len(ordered) // 2] * 1e3, 2),
            "lag_p99_ms": round(ordered[len(ordered) * 99 // 100] * 1e3, 2),
            "lag_max_ms": round(ordered[-1] * 1e3, 2),
        }
