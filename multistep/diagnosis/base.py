"""A diagnosis: its name, the numbers that the rule read, the same in words, and one thing to do next."""

from __future__ import annotations

from typing import Any, Literal, get_args

from multistep.types import Spec

Name = Literal[
    "underfitting", "overfitting", "plateau", "divergence", "too little data", "noisy labels", "leaking splits",
    "cannot be learnt", "validation too small", "budget too small",
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)


class Diagnosis(Spec):
    """`action`: what a user can do next; empty where the thing was looked for and is not there."""

    name: Name
    numbers: dict[str, Any]
    words: str
    action: str = ""

    @property
    def found(self) -> bool:
        return bool(self.action)


def percent(share: float) -> str:
    """'8.1 %', '0.26 %'."""
    return f"{100 * share:.2g} %" if 0 < share < 0.01 else f"{100 * share:.1f} %"


def with_error(value: float, stderr: float) -> str:
    """'0.012 ± 0.004'; without a sign of its own."""
    if abs(value) < 1e-9:
        return f"0 ± {stderr:.1g}"
    return f"{value:.2g} ± {stderr:.1g}"
