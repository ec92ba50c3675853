"""What the demo's workers told, compared: for those that run in containers of their own."""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Read what prefill, decode and reference told, a file each; 0 if all is the same, else 1."""
    source, sink, reference = (_end_of(Path(name)) for name in sys.argv[1:])
    same_bytes = source["digests"] == sink["digests"]
    same_tokens = sink["output_tokens"] == reference["output_tokens"]
    print(f"{sink['total_tokens']} tokens, {sink['bytes']} bytes moved")
    print(f"bytes {'are the same' if same_bytes else 'DIFFER'}")
    print(f"tokens {'are the same' if same_tokens else 'DIFFER'}")
    return 0 if same_bytes and same_tokens else 1


def _end_of(path: Path) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
    return last


if __name__ == "__main__":
    sys.exit(main())
