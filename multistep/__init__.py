"""multistep: a text dataset, a metric and a time budget in; a validated language model and the reasons for it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multistep.api import Run, fit, load
    from multistep.modules import Optimized, optimize

__version__ = "0.1.0"
__all__ = ["Optimized", "Run", "__version__", "fit", "load", "optimize"]


def __getattr__(name: str) -> Any:
    """Load the front door on first use: `import multistep` itself costs nothing."""
    if name in ("Run", "fit", "load"):
        from multistep import api

        return getattr(api, name)
    if name in ("Optimized", "optimize"):
        from multistep import modules

        return getattr(modules, name)
    raise AttributeError(f"module 'multistep' has no attribute {name!r}")
