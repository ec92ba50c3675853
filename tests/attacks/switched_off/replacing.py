"""How a defence is switched off."""

from typing import Any


def replace(owner: Any, name: str, weak: Any) -> None:
    """Put the weak one in place, where there was one before."""
    assert name in vars(owner), f"{owner} has no {name} any more"
    setattr(owner, name, weak)
