"""How a model writes: frozen settings. The engine that obeys them is `multistep.generate`. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field

from multistep.types import Spec, UserError


class _Writing(Spec):
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = 128
    min_new_tokens: Annotated[int, Field(ge=0, le=100_000)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0  # Keskar et al. 2019 (CTRL), arXiv 1909.05858
    no_repeat_ngram: Annotated[int, Field(ge=0, le=20)] = 0  # n-grams of this length are written once; 0: off
    stop: tuple[str, ...] = ()  # texts that end the writing; they are not part of it


class Greedy(_Writing):
    """The likeliest token, always."""

    kind: Literal["greedy"] = "greedy"


class Beam(_Writing):
    """The likeliest text of a beam search; scores are log-probabilities divided by length^length_penalty."""

    kind: Literal["beam"] = "beam"
    beams: Annotated[int, Field(ge=2, le=64)] = 4
    length_penalty: Annotated[float, Field(ge=-5, le=5)] = 1.0


class Sample(_Writing):
    """Draw tokens, from the likeliest few. Every request has its own random numbers, whatever else is in the batch."""

    kind: Literal["sample"] = "sample"
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # Holtzman et al. 2020, arXiv 1904.09751
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0  # Nguyen et al. 2024, arXiv 2407.01082
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


DECODINGS = (Greedy, Beam, Sample)
Decoding = Annotated[Greedy | Beam | Sample, Field(discriminator="kind")]


def greedy(decoding: Decoding) -> Greedy:
    """The likeliest token, with the limits and penalties of another way."""
    return Greedy(**decoding.model_dump(include=set(_Writing.model_fields)))


def obeyed(
    tuned: Decoding, *, temperature: float | None = None, top_p: float | None = None, top_k: int | None = None,
    min_p: float | None = None, seed: int | None = None,
) -> Decoding:  # fmt: skip
    """The tuned decoding with what is asked for; None leaves it as it is. A temperature or top_p of 0 is greedy, another temperature
    draws; else a beam stays one, and what is greedy stays so."""
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    drawing: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if temperature == 0 or top_p == 0:
        return greedy(tuned)
    if isinstance(tuned, Sample):
        return tuned.with_(**drawing)
    if temperature is not None:
        return Sample(**tuned.model_dump(include=set(_Writing.model_fields)), **drawing)
    return tuned


class _Several(Protocol):
    @property
    def n(self) -> int: ...
    @property
    def inner(self) -> Beam | Sample: ...


S = TypeVar("S", bound=_Several)


def several(way: S) -> S:
    """The same, once it is known that a beam has so many texts to give. Raises UserError."""
    if isinstance(way.inner, Beam) and way.n > way.inner.beams:
        raise UserError(f"n: {way.n} candidates of {way.inner.beams} beams. Give n of at most that, or more beams.")
    return way
