"""The `kvferry` command's door: says what to install where only the client is."""

import sys

EXTRA = ("click", "rich", "uvloop", "xxhash")  # what the client goes without


def main() -> None:
    """Run the command line, or name the extra that it needs and exit with 2."""
    try:
        from kvferry_daemon.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        print(
            f"kvferry: {error.name} is not installed, which the command needs and the client does "
            "not: pip install 'kvferry[daemon]'",
            file=sys.stderr,
        )
        sys.exit(2)
