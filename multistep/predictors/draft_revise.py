"""Draft and revise: a model of prompts answers, is shown its answer and asked for a better one; the last answer stands. No torch here.

Source: Madaan et al. 2023, arXiv 2303.17651 (self-refine). Differs from the source: one instruction, no feedback of its own between.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Greedy, Sample
from multistep.predictors.mbr import Mbr
from multistep.predictors.vote import Vote
from multistep.types import Spec

AGAIN = "Check this answer for mistakes, then write only the better answer."


class DraftRevise(Spec):
    """Write, then ask again with the draft for a better one. For models that read prompts."""

    kind: Literal["draft_revise"] = "draft_revise"
    inner: Annotated[Greedy | Beam | Sample | Mbr | BestOf | Vote, Field(discriminator="kind")] = Greedy()
    rounds: Annotated[int, Field(ge=0, le=4)] = 1  # of revision; 0: the draft stands
    again: Annotated[str, Field(min_length=1)] = AGAIN  # what the user says after the draft
