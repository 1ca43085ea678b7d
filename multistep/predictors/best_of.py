"""Best of n: of several draws the one that a scorer likes best. No torch here; `multistep.voting` obeys it.

    likelihood  log-probability under the model, divided by length^length_penalty: a search by chance where a beam is too narrow
    grounded    the share of its words that stand in what was read, the likelier of equals: for answers that may add nothing

Source: the oldest of reranking rules; for lengths Wu et al. 2016, arXiv 1609.08144 (without their constant 5).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from multistep.predictors.decoding import Sample
from multistep.types import Spec


class BestOf(Spec):
    """The best of n draws, as its scorer ranks them."""

    kind: Literal["best_of"] = "best_of"
    inner: Sample
    n: Annotated[int, Field(ge=1, le=64)] = 8
    scorer: Literal["likelihood", "grounded"] = "likelihood"
    length_penalty: Annotated[float, Field(ge=-5, le=5)] = 1.0
