"""`python -m kvferry_daemon` is the `kvferry` command."""

from kvferry_daemon.command import main

main()
