"""What repeated looks at the same validation rows may cost: alpha-investing.

    level = stake min(0.1, wealth / 2);    a comparison that finds nothing pays level / (1 - level);    one that finds a gain earns 0.1

A run that compares and compares without finding anything has to be surer every time; one that finds gains keeps its level. On average
there are at most so many false gains as the wealth it began with and a tenth of all gains that it found; and, once the wealth is spent,
half a hundredth for every further look.
Source: Foster and Stine 2008, "Alpha-investing", Journal of the Royal Statistical Society B 70.
Differs from the source: the level has a ceiling; trials that are outstanding together have the same level, at which all of them can be
paid; what is left never falls below a hundredth, so that a long run does not go deaf.
"""

from __future__ import annotations

BEGIN, EARN, CEILING, FLOOR = 0.2, 0.1, 0.1, 0.01


class Wealth:
    """Of one split that judges."""

    def __init__(self) -> None:
        self.amount = BEGIN

    def level(self, stake: float = 1.0, among: int = 1) -> float:
        """The chance of a false gain that the next comparison may have; a long shot gets a part of it. `among`: so many comparisons are
        outstanding together, and what all of them may pay, among * level / (1 - level), has to be there."""
        return round(min(stake * min(CEILING, self.amount / 2), self.amount / (among + self.amount)), 6)

    def settle(self, level: float, found: bool) -> None:
        """Pay for a comparison at that level, or earn by what it found."""
        change = EARN if found else -level / (1 - level)
        self.amount = min(1.0, max(FLOOR, self.amount + change))


Purse = dict[str, Wealth]  # by the split that judges
