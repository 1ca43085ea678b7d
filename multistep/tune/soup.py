"""Greedy soup: the mean of the weights of trainings that began at the same point, each taken in only if validation gets no worse.

Source: Wortsman et al. 2022, "Model soups", arXiv 2203.05482, recipe 1. Differs from the source: nothing known; whether the soup is
kept is decided afterwards, by the same paired test as for every candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Weights = Mapping[str, Tensor]


def greedy_soup(
    members: Sequence[str], weights: Callable[[str], Weights], score: Callable[[Weights], float]
) -> tuple[dict[str, Tensor], list[str], list[dict[str, Any]]]:
    """The soup's weights, its members, and what was tried. `score` is on validation, higher is better; ties are taken in."""
    alone = sorted(((score(weights(m)), m) for m in members), key=lambda pair: -pair[0])
    best, first = alone[0]
    soup, taken = {name: value.clone() for name, value in weights(first).items()}, [first]
    tried: list[dict[str, Any]] = [{"state": first, "alone": best, "taken": True}]
    for own, member in alone[1:]:
        other = weights(member)
        share = 1 / (len(taken) + 1)
        mixed = {n: v.lerp(other[n], share) if v.is_floating_point() else v for n, v in soup.items()}
        found = score(mixed)
        tried.append({"state": member, "alone": own, "in the soup": found, "taken": found >= best})
        if found >= best:
            soup, best = mixed, found
            taken.append(member)
    return soup, taken, tried
