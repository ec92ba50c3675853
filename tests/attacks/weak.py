"""`kvferry` with one defence switched off, by its name: `python -m attacks.weak NAME serve ...`.

The attacks run against it too: one that fails there as well proves nothing about the defence. These,
in `switched_off`, are the only places where a defence can be switched off; the product has no such
option. Some only set the scene, for both runs of an attack: a fault of ours, or deadlines that a test
can wait for.
"""

import sys
from collections.abc import Callable

from attacks.switched_off import (
    bounds,
    data_port,
    doors,
    files,
    http_door,
    load,
    peers,
    plans,
    words,
    workers,
)
from kvferry_daemon.command import main

WEAK: dict[str, Callable[[], None]] = {
    one.__name__: one
    for place in (workers, files, peers, doors, data_port, words, http_door, bounds, plans, load)
    for one in place.SWITCHES
}

if __name__ == "__main__":
    WEAK[sys.argv.pop(1)]()
    main()
