from kvferry_daemon.core.pool import Run

__all__ = ["Run"]
