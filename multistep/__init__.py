"""multistep: a text dataset, a metric and a time budget in; a validated language model and the reasons for it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multistep.api import Run, fit, load
    from multistep.comparison.front import Compared, compare
    from multistep.modules import Optimized, optimize
    from multistep.range_test import RangeTest, lr_range_test

__version__ = "0.1.0"
__all__ = [
    "Compared", "Optimized", "RangeTest", "Run", "__version__", "compare", "fit", "load", "lr_range_test", "optimize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the front door on first use: `import multistep` itself costs nothing."""
    if name in ("Run", "fit", "load"):
        from multistep import api

        return getattr(api, name)
    if name in ("Optimized", "optimize"):
        from multistep import modules

        return getattr(modules, name)
    if name in ("RangeTest", "lr_range_test"):
        from multistep import range_test

        return getattr(range_test, name)
    if name in ("Compared", "compare"):
        from multistep.comparison import front

        return getattr(front, name)
    if name == "keras":
        import importlib

        return importlib.import_module("multistep.keras")
    raise AttributeError(f"module 'multistep' has no attribute {name!r}")
