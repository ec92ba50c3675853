"""`python -m bench`: every measurement in one run, printed as one JSON object."""

import json
import os
import platform

from bench import poll, pool, stream

if __name__ == "__main__":
    load = os.getloadavg()[0]
    result = {
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "load_before": load},
        "stream": stream.measure(),
        "poll": poll.measure(),
        "pool": pool.measure(),
    }
    print(json.dumps(result, indent=2))
