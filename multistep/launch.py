"""What torchrun tells the processes that it starts; without torch."""

from __future__ import annotations

import os

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this is one of several processes that were started to work together."""
    return all(os.environ.get(name) for name in _NAMES) and os.environ["WORLD_SIZE"] != "1"


def assists() -> bool:
    """Whether it is one of them and not the first, which says what there is to say."""
    return launched() and os.environ["RANK"] != "0"


def alone() -> dict[str, str]:
    """The environment for a process that this one starts for itself: not one of them."""
    return {name: value for name, value in os.environ.items() if name not in _NAMES}


def beside() -> int:
    """How many of them are on this machine."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(found) if launched() and found.isdigit() else 1
