"""Blocks that the sink reads itself, one-sided, through NIXL."""
