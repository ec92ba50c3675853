"""`python -m kvferry_daemon` is the `kvferry` command."""

from kvferry_daemon.cli import main

main()
