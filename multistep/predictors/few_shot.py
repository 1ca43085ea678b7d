"""Few-shot prompts: examples of train stand before the request. No torch here; the examples are kept in the bundle.

`choose`: "seed": the same k for every request; "nearest": those whose n-grams of three characters are most like the request's (cosine
of tf-idf), the nearest last. `template`: "turns": an example is an exchange before the request; "text": all is one turn of the
user, a request and its answer a paragraph. `keep`: tokens of a source that are kept, of the examples' and of the request's; 0: all. A
prompt that is too long for the model loses its first examples.
Sources: Brown et al. 2020, arXiv 2005.14165; Liu et al. 2022, arXiv 2101.06804 (nearest). Differs from them: nearest by n-grams.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Greedy, Sample
from multistep.predictors.draft_revise import DraftRevise
from multistep.predictors.mbr import Mbr
from multistep.predictors.vote import Vote
from multistep.types import Spec


class FewShot(Spec):
    """k examples before the request. For models that read prompts."""

    kind: Literal["few_shot"] = "few_shot"
    inner: Annotated[Greedy | Beam | Sample | Mbr | BestOf | Vote | DraftRevise, Field(discriminator="kind")] = Greedy()
    k: Annotated[int, Field(ge=0, le=32)] = 2
    choose: Literal["seed", "nearest"] = "nearest"
    template: Literal["turns", "text"] = "turns"
    keep: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
