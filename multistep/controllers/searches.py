"""The searches over strategies, by name: each stands where the default has its race and its trunk. With a sentence for each."""

from collections.abc import Callable, Mapping

from multistep.controllers.bayes import bayes
from multistep.controllers.halving import halving
from multistep.controllers.members import Found, Ground
from multistep.controllers.population import population
from multistep.controllers.random import random_search
from multistep.controllers.reactive import reactive

SEARCHES: Mapping[str, tuple[Callable[[Ground], Found], str]] = {
    "reactive": (reactive, "One training, watched: corrections are tried on forks when it stands still, overfits or diverges."),
    "halving": (halving, "Several settings train a little, the better half trains on from where it was."),
    "population": (population, "Several members train side by side; the worst are replaced by nudged forks of the best."),
    "bayes": (bayes, "Settings proposed by Optuna's estimator; a trial that is behind at its third is stopped."),
    "random": (random_search, "Settings drawn blindly, each trained from the start: the honest baseline of the others."),
}  # fmt: skip
