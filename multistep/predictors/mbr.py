"""Minimum Bayes risk: of several candidates the one that is most like the others, as the task's metric sees it.

    argmax_i  mean_{j != i} utility(candidate_i, candidate_j)          the first of equals; equal candidates speak for each other

The candidates are draws, or the n best of a beam (then a rough stand-in for draws). No torch here; `multistep.voting` obeys it.
Sources: Kumar and Byrne 2004, "Minimum Bayes-risk decoding for statistical machine translation"; Eikema and Aziz 2022, arXiv
2108.04718 (draws). Differs from the sources: a candidate is no reference of itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from multistep.predictors.decoding import Beam, Sample, several
from multistep.types import Spec

Utility = Literal["chrf", "bleu", "rougeL", "f1"]


class Mbr(Spec):
    """Minimum Bayes risk over draws or the n best of a beam."""

    kind: Literal["mbr"] = "mbr"
    inner: Annotated[Beam | Sample, Field(discriminator="kind")]
    n: Annotated[int, Field(ge=1, le=64)] = 8
    utility: Utility = "chrf"

    @model_validator(mode="after")
    def _fits(self) -> Mbr:
        return several(self)
