"""The stages around gradient training: the race of learning rates, the trunk with its fork, the averages.

Probes and candidates are compared only after their learning rate has decayed to zero (short-horizon bias: Wu et al. 2018).
"""

from __future__ import annotations

from typing import Protocol

from multistep.controllers.plan import MOST_EPOCHS, Plan
from multistep.controllers.script import HARM, Does, Skip, Step, Steps, beats, left_out
from multistep.metrics.power import FEWEST_ROWS
from multistep.schedules import Linear, Plateau
from multistep.standing import diverged, early
from multistep.strategy import Action, Average, FineTune
from multistep.types import Outcome, Verdict

PROBE_SHARE = 0.06  # of what is left, for each probe
PROBE_UPDATES = 60  # a shorter probe says nothing
PROBE_EPOCHS = 0.5  # nor does one of random weights that sees less of train
SOUP_SHARE = 0.2  # of what is left at most is kept for a soup; one that costs more is not made
LEAST_UPDATES = 30  # a trunk shorter than this is not begun
# A pretrained encoder that sees train oftener overfits; on little data it is the updates that it needs (LOG.md, 2026-11-26):
TRUNK_EPOCHS, TRUNK_EXAMPLES = 4.0, 19_200
MEMBERS = 4  # trainings at most whose mean is taken
SHORTER = 0.6  # of that length is enough for each of several
AGAIN_EPOCHS = 1.5  # a shorter one is not begun for it
AVERAGE_EPOCHS = 2.0  # of twelve trainings that saw train less often no average was taken (LOG.md, 2026-11-26)
SLACK_S = 1.3  # what the end of a minute's run took beyond what was reckoned (LOG.md, 2026-11-26)
COOL_SHARE = 0.15  # of what a trunk that stopped early took: decaying from its best state to zero
LEAST_EPOCHS = 1.0  # nor one that does not see train once: it only disturbs the solved head (measured, LOG.md)

Finetuned = Does[str | None]


def race_rates(plan: Plan, action: FineTune, start: str | None) -> Does[float]:
    """Short probes at learning rates around the prior, each decaying to zero; the prior wins ties. The rate to go on with."""
    prior = action.optimizer.lr
    if skipped := left_out(plan.problem.config, "race"):
        yield from skipped
        return prior
    if isinstance(action.schedule, Plateau):  # a probe has no time to wait for one: it decays
        action = action.with_(schedule=Linear())
    if plan.problem.config.optimizer.lr is not None:
        yield Skip(stage="race", why=f"the learning rate was given: {prior:g}")
        return prior
    if (rows := plan.problem.rows["control"]) < FEWEST_ROWS:
        yield Skip(
            stage="race", why=f"{rows} control rows (< {FEWEST_ROWS}) cannot tell rates apart: the prior {prior:g}"
        )
        return prior
    share = PROBE_SHARE * plan.remaining
    if plan.updates(share, action.layers) < PROBE_UPDATES:
        n = plan.updates(share, action.layers)
        yield Skip(
            stage="race",
            why=f"a probe of {PROBE_SHARE:.0%} would be {n:.0f} updates (< {PROBE_UPDATES}): the prior {prior:g} is used",
        )
        return prior
    if plan.scratch and plan.timed and (seen := plan.epochs(share, action.layers)) < PROBE_EPOCHS:
        why = (
            f"a probe of {PROBE_SHARE:.0%} would see {seen:.1f} epochs (< {PROBE_EPOCHS:g}), too few for random weights"
        )
        yield Skip(stage="race", why=f"{why}: the prior {prior:g} is used")
        return prior
    best_rate = prior
    told = yield from plan.trial(
        "race", action, f"the prior learning rate {prior:.2g}", start=start, share=share, commit=False
    )
    best = told
    for higher, otherwise in ((2.0, 2.0), (4.0, 0.5)):  # up while it helps, else one step down
        rate = prior * (higher if best_rate >= prior * higher / 2 else otherwise)
        probe = action.with_(optimizer=action.optimizer.with_(lr=rate))
        why = f"learning rate {rate:.2g} against {best_rate:.2g}"
        told = yield from plan.trial("race", probe, why, start=start, share=share, against=best.state, commit=False)
        if beats(told, best):
            best_rate, best = rate, told
    return best_rate


def worth_training(plan: Plan, action: FineTune) -> Does[bool]:
    """Whether enough training fits into what is left; a Skip when it does not."""
    updates, epochs = plan.updates(plan.remaining, action.layers), plan.epochs(plan.remaining, action.layers)
    if updates < LEAST_UPDATES or (plan.timed and epochs < LEAST_EPOCHS):
        limits = f"(< {LEAST_UPDATES} or < {LEAST_EPOCHS:g})"
        yield Skip(stage="trunk", why=f"{updates:.0f} updates, {epochs:.1f} epochs fit into what is left {limits}")
        return False
    return True


def trunk(plan: Plan, action: FineTune, start: str | None) -> Finetuned:
    """Fine-tune for the time left; when the gap grows, a regularized fork against going on. The state of the result."""
    if not (yield from worth_training(plan, action)):
        return None
    plan.short = plan.timed and plan.epochs(plan.remaining, action.layers) < AVERAGE_EPOCHS
    count, share = trainings(plan, action)
    which = "the whole model" if action.trains == "all" else f"the last {action.layers} layers"
    why = f"lr {action.optimizer.lr:.2g}, {which}, about {plan.epochs(share, action.layers):.1f} epochs"
    if plan.depth_rule:
        why += f" ({plan.depth_rule})"
    if action.augment.on:
        why += ", words changed anew every epoch and so read as token ids"
    told = yield from plan.trial("trunk", action, why, start=start, share=share, watch=True)
    if "stopped" in told.facts:
        return (yield from _cool_down(plan, action, told, share))
    if diverged(told):
        yield Skip(stage="average", why="the training diverged, and stands where it began")
        return None
    if "diagnosis" in told.facts:
        rest = share * (1 - told.facts["progress"])
        told, action = yield from _fork(plan, action, told, min(rest, 0.48 * (plan.remaining - end_s(plan, 2))))
    if count > 1 and whole(told):
        yield from _again(plan, action, told, start, share, count)
    return told.state


def trainings(plan: Plan, action: FineTune) -> tuple[int, float]:
    """How many trainings the time left is worth, and how long each is: none sees train oftener than `TRUNK_EPOCHS` or `TRUNK_EXAMPLES` say,
    and time beyond that goes into more of them, up to `MEMBERS`. One where somebody looks on the way or asked for no averages, where the
    weights begin at random or where nothing can be judged."""
    if not plan.timed:
        return 1, plan.remaining
    left, a_second = plan.remaining - end_s(plan, 1), max(1e-9, plan.epochs(1.0, action.layers))
    if plan.scratch:
        return 1, min(left, plan.scratch.most_epochs / a_second)
    if plan.problem.config.patience or isinstance(action.schedule, Plateau):
        return 1, min(left, MOST_EPOCHS / a_second)
    longest = min(MOST_EPOCHS, max(TRUNK_EPOCHS, TRUNK_EXAMPLES / plan.problem.rows["train"])) / a_second
    if plan.few_rows or "average" in plan.problem.config.skip:
        return 1, min(left, longest)
    least, judged = max(SHORTER * longest, AGAIN_EPOCHS / a_second), plan.overhead()
    for count in range(MEMBERS, 1, -1):
        each = (plan.remaining - end_s(plan, count)) / count - judged
        if each >= least:
            return count, min(each, longest)
    return 1, min(left, longest)


def whole(training: Outcome) -> bool:
    """Whether it came to its end, so that its weights may be a part of a mean."""
    return training.ok and training.state is not None and not early(training)


def _again(plan: Plan, action: FineTune, first: Outcome, start: str | None, share: float, count: int) -> Steps:
    """The same from the same start in other orders of the data, at the rate that the first came down to (where it was forked, with what won
    there), and the mean of all their weights: in place of the first, unless that is seen to harm; where another model stands it has to be
    better. As many as there is time for: a fork took some."""
    members, judged = [str(first.state)], plan.overhead()
    scale = float(first.facts.get("lr_scale", 1.0))
    if scale != 1.0 and "lr" in action.optimizer.model_dump():
        action = action.with_(optimizer=action.optimizer.with_(lr=scale * action.optimizer.lr))
    fit = [n for n in range(1, count) if (plan.remaining - end_s(plan, n)) / n - judged >= SHORTER * share]
    count = 1 + max(fit, default=0)
    for n in range(1, count):
        own = min(share, (plan.remaining - end_s(plan, count - n)) / (count - n) - judged)
        if (seen := plan.epochs(own, action.layers)) < AGAIN_EPOCHS:
            yield Skip(stage="again", why=f"{seen:.1f} epochs fit into what is left (< {AGAIN_EPOCHS:g})")
            break
        why = f"the same in another order of the data, {n + 1} of {count}: for the mean of their weights"
        told = yield from plan.trial(
            "again", action.with_(reshuffle=action.reshuffle + n), why, start=start, share=own, commit=False
        )
        if whole(told):
            members.append(str(told.state))
    if len(members) < 2:
        return
    if plan.timed and plan.remaining < 0.5 * average_s(plan):
        yield Skip(
            stage="average", why=f"{plan.remaining:.1f} s are left, judging a mean takes {average_s(plan):.1f} s"
        )
        return
    why = f"the mean of the weights of {len(members)} trainings from the same start"
    stands = plan.incumbent is not None and "encoder" in plan.incumbent.models()
    stake = HARM if stands and plan.families.get("encoder") in members else 1.0
    mean = Average(which="mean", members=tuple(members))
    told = yield from plan.trial("average", mean, why, start=members[0], stake=stake)
    if told.state is not None and plan.families.get("encoder") == told.state:
        plan.members = len(members)


def _cool_down(plan: Plan, action: FineTune, stopped: Outcome, share: float) -> Finetuned:
    """From the state at which a trunk of `share` was stopped: its learning rate decays to zero, and training is over."""
    lr, done = max(1e-9, stopped.facts["best_lr"]), stopped.facts["best_progress"]
    rest = min(plan.remaining - end_s(plan, 1), COOL_SHARE * done * share)
    if plan.updates(rest, action.layers) < 1:
        yield Skip(stage="cool-down", why=f"the trunk stopped at {done:.0%}: no time is left to let its rate decay")
        return stopped.state
    cooled = action.with_(optimizer=action.optimizer.with_(lr=lr), schedule=Linear(warmup=0.0))
    why = f"from the state at {done:.0%} of the trunk with lr {lr:.2g} to zero: more training would not help"
    return (yield from plan.trial("cool-down", cooled, why, start=stopped.state, share=rest)).state


def _fork(plan: Plan, action: FineTune, paused: Outcome, share: float) -> Does[tuple[Outcome, FineTune]]:
    """Overfitting was seen: the rest of the trunk with stronger regularization, and as before, for `share` each. What came of the better
    one, and how it trained."""
    dropout = max(action.dropout or 0.0, min(0.5, (action.dropout or 0.0) + 0.1))
    stronger = action.with_(
        dropout=dropout,
        optimizer=action.optimizer.with_(weight_decay=max(0.1, 10 * action.optimizer.weight_decay)),
    )
    why = f"dropout {dropout:.2g} and ten times the weight decay from the paused state on"
    first = yield from plan.trial("regularize", stronger, why, start=paused.state, share=share)
    why = "the same without the change, for comparison"
    against = first.state
    second = yield from plan.trial("go on", action, why, start=paused.state, share=share, against=against)
    better = second.ok and Verdict(**second.facts["against_verdict"]).accept
    return (second, action) if better else (first, stronger)


def average_s(plan: Plan) -> float:
    """Seconds to judge two averages and to put the better one on disk; some are kept for the end where there are none."""
    if not plan.timed:
        return 0.0
    return SLACK_S if plan.short else 2 * plan.encode_s(plan.problem.rows["control"]) + 2.0


def soup_s(plan: Plan, members: int) -> float:
    """Seconds to judge each member alone, every mixture, and the soup."""
    return 2 * members * plan.encode_s(plan.problem.rows["control"])


def end_s(plan: Plan, more: int) -> float:
    """Seconds that come after the trunk: the averages and, where it was asked for, the soup of what is there and `more`."""
    needed = soup_s(plan, len(plan.ends) + more) if plan.problem.config.soup else 0.0
    return average_s(plan) + (needed if needed <= SOUP_SHARE * plan.remaining else 0.0)


def soup(plan: Plan) -> Steps:
    """Where it was asked for: the mean of the probes, the trunk and its forks, all from the same weights, as far as it helps."""
    if not plan.problem.config.soup:
        return
    yield from souped(plan, soup_s(plan, len(plan.ends)), "fine-tunings")


def average(plan: Plan, state: str) -> Steps:
    """The averages of the trunk's weights, each against what is committed."""
    if skipped := left_out(plan.problem.config, "average"):
        yield from skipped
        return
    if plan.members:
        yield Skip(stage="average", why=f"the mean of {plan.members} trainings is one already")
        return
    if plan.short:
        why = f"averages of a training that sees train less than {AVERAGE_EPOCHS:g} times are not better"
        yield Skip(stage="average", why=why)
        return
    needed = average_s(plan)
    yield from averages(plan, state, needed, plan.timed and plan.remaining < 0.5 * needed)


class Trials(Protocol):
    """The trials of a script so far."""

    remaining: float

    def trial(self, stage: str, action: Action, why: str, *, start: str | None = None) -> Step: ...


class Ended(Trials, Protocol):
    """And the trainings that came to their end."""

    timed: bool
    ends: list[str]


def souped(plan: Ended, needed: float, what: str) -> Steps:
    """The greedy mean of the trainings that came to their end, where there are two and the `needed` seconds are there to judge it."""
    if len(plan.ends) < 2:
        yield Skip(
            stage="soup", why=f"{len(plan.ends)} training came to its end: a soup needs two from the same weights"
        )
    elif plan.timed and plan.remaining < needed:
        yield Skip(stage="soup", why=f"{plan.remaining:.1f} s are left, judging the mixtures takes {needed:.1f} s")
    else:
        why = f"greedy mean of {len(plan.ends)} {what} that began at the same weights"
        yield from plan.trial("soup", Average(which="soup", members=tuple(plan.ends)), why)


def averages(plan: Trials, state: str, needed: float, short: bool) -> Steps:
    """Both averages that a training kept, where the `needed` seconds are there to judge them."""
    if short:
        yield Skip(stage="average", why=f"{plan.remaining:.1f} s are left, two averages take {needed:.1f} s to judge")
        return
    yield from plan.trial("average", Average(which="ema"), "exponential moving average of the weights", start=state)
    yield from plan.trial("average", Average(which="tail"), "mean of the last quarter's weights", start=state)
