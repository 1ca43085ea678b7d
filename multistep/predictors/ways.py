"""All ways to write: the plain ones (decoding.py) and those that wrap them. Frozen settings that nest; no torch here.

    mbr, best_of, vote     several candidates, one of which is given back       (wrap a plain way)
    draft_revise           answers, then answers again with the draft before it (wraps those)
    few_shot               examples before the request                          (wraps all)

`multistep.voting` obeys them. With n = 1 (or no round, no example) a wrapper gives what its inner gives.
To add one: copy the nearest file, name it here, run tests/laws/test_ways.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.predictors.draft_revise import AGAIN, DraftRevise
from multistep.predictors.few_shot import FewShot
from multistep.predictors.mbr import Mbr
from multistep.predictors.vote import Vote
from multistep.types import UserError, nearest

WAYS = (Greedy, Beam, Sample, Mbr, BestOf, Vote, DraftRevise, FewShot)
Way = Annotated[
    Greedy | Beam | Sample | Mbr | BestOf | Vote | DraftRevise | FewShot, Field(discriminator="kind")
]  # fmt: skip
_KINDS = {w.model_fields["kind"].default: w for w in WAYS}


def read_way(data: Mapping[str, Any], where: str = "decoding") -> Way:
    """A way from JSON. Raises UserError naming the key."""
    kind = data.get("kind")
    if kind not in _KINDS:
        raise UserError(f"{where}.kind: {kind!r} is not known.{nearest(str(kind), list(_KINDS))}")
    return _KINDS[kind].parse(data, where)


def plain(way: Way) -> Decoding:
    """How single texts are written inside of it."""
    return way if isinstance(way, Greedy | Beam | Sample) else plain(way.inner)


def with_plain(way: Way, inner: Decoding) -> Way:
    """The same way around another plain one. Raises ValueError where it does not wrap such."""
    if isinstance(way, Greedy | Beam | Sample):
        return inner
    return way.with_(inner=with_plain(way.inner, inner))


def shots(way: Way) -> FewShot | None:
    """The examples that it asks for, if it does."""
    return way if isinstance(way, FewShot) and way.k else None


def one_text(way: Way) -> bool:
    """Whether every text of it is the one that greedy writing or a beam gives: what other engines can write."""
    match way:
        case Greedy() | Beam():
            return True
        case DraftRevise() | FewShot():
            return one_text(way.inner)
        case _:
            return False


def texts(way: Way) -> int:
    """How many texts the model follows for one answer: what it costs, greedy = 1."""
    match way:
        case Greedy() | Sample():
            return 1
        case Beam():
            return way.beams
        case Mbr():
            return way.inner.beams if isinstance(way.inner, Beam) else way.n
        case BestOf() | Vote():
            return way.n
        case DraftRevise():
            return (1 + way.rounds) * texts(way.inner)
        case FewShot():
            return texts(way.inner)


def words(way: Way) -> str:
    """'mbr (chrf) of 16 draws (temperature 0.7)'."""
    match way:
        case Greedy():
            return "greedy" + _limits(way)
        case Beam():
            return f"beam {way.beams}, length penalty {way.length_penalty:g}" + _limits(way)
        case Sample():
            return f"a draw ({_draws(way)})" + _limits(way)
        case Mbr():
            return f"mbr ({way.utility}) of {_several(way.n, way.inner)}"
        case BestOf():
            penalty = f", length penalty {way.length_penalty:g}" if way.scorer == "likelihood" else ""
            return f"best ({way.scorer}{penalty}) of {_several(way.n, way.inner)}"
        case Vote():
            return f"vote ({way.reads}) of {_several(way.n, way.inner)}"
        case DraftRevise():
            return f"{words(way.inner)}, revised {way.rounds}x" + ("" if way.again == AGAIN else f" by {way.again!r}")
        case FewShot():
            kept = f", {way.keep} tokens of each" if way.keep else ""
            which = f"{way.choose} {way.seed}" if way.choose == "seed" else way.choose
            return f"{words(way.inner)} after {way.k} examples ({which}, as {way.template}{kept})"


def _several(n: int, inner: Beam | Sample) -> str:
    if isinstance(inner, Beam):
        return f"the best {n} of {words(inner)}"
    return f"{n} draws ({_draws(inner)})" + _limits(inner)


def _draws(way: Sample) -> str:
    said = [f"temperature {way.temperature:g}"]
    said += [f"top-k {way.top_k}"] if way.top_k else []
    said += [f"top-p {way.top_p:g}"] if way.top_p < 1 else []
    said += [f"min-p {way.min_p:g}"] if way.min_p else []
    return ", ".join(said) + (f", seed {way.seed}" if way.seed else "")


def _limits(way: Decoding) -> str:
    said = f", repetition {way.repetition_penalty:g}" if way.repetition_penalty != 1 else ""
    return said + (f", no {way.no_repeat_ngram}-gram twice" if way.no_repeat_ngram else "")
