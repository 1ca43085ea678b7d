"""Self-consistency: n draws, the answer taken out of each, and the answer that most of them give. No torch here.

`reads`: "number": the last number of a text (a draw without one has no vote where others have); "text": the whole text without case,
articles and punctuation. What is given back is the likeliest text that holds the winning answer; its confidence is the share of
the votes. Ties go to the answer that the likelier draws give.
Source: Wang et al. 2023, arXiv 2203.11171.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from multistep.predictors.decoding import Sample
from multistep.types import Spec


class Vote(Spec):
    """The answer that most of n draws give; confidence: its share of the votes."""

    kind: Literal["vote"] = "vote"
    inner: Sample
    n: Annotated[int, Field(ge=1, le=64)] = 8
    reads: Literal["number", "text"] = "text"
