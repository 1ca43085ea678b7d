"""A conversation with a bundle's model: turns in, an answer in pieces as it is written."""

from __future__ import annotations

from collections.abc import Iterator

from multistep.data.cells import Turn
from multistep.language_bundle import LanguageBundle
from multistep.predictors.decoding import Beam, Greedy, Sample, greedy, obeyed
from multistep.predictors.ways import plain
from multistep.types import UserError
from multistep.writing import Neural


class Talk:
    """`temperature`, `seed`: None leaves the decoding as it was tuned, as far as an answer can be given while it is written: of a beam its
    limits and penalties. A temperature of 0 is greedy. Raises UserError where the bundle cannot converse."""

    def __init__(
        self,
        bundle: LanguageBundle,
        system: str | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ):
        speaker = bundle.speaker
        if not isinstance(speaker, Neural) or speaker.reads != "prompts":
            raise UserError(
                "chat: this model does not take turns. Fit one with --task chat, or use: multistep predict."
            )
        self._speaker = speaker
        self._decoding = _decoding(speaker, temperature, seed)
        self._system = (Turn("system", system),) if system else ()
        self.conversations: list[list[Turn]] = [list(self._system)]

    @property
    def turns(self) -> list[Turn]:
        return self.conversations[-1]

    def anew(self) -> None:
        """Forget what was said."""
        if len(self.turns) > len(self._system):
            self.conversations.append(list(self._system))

    def say(self, text: str) -> Iterator[str]:
        """The answer to one more turn of the user, in pieces."""
        self.turns.append(Turn("user", text))
        said = ""
        for piece in self._speaker.converse(self.turns, self._decoding):
            said += piece
            yield piece
        self.turns.append(Turn("assistant", said.strip()))


def _decoding(speaker: Neural, temperature: float | None, seed: int | None) -> Greedy | Sample:
    found = obeyed(plain(speaker.decoding), temperature=temperature, seed=seed)
    return greedy(found) if isinstance(found, Beam) else found
