"""A task: examples, and the rewards that score their completions."""

from collections.abc import Callable
from dataclasses import dataclass

from minirl.rules import Reward


@dataclass(frozen=True)
class Task:
    """Examples, and the rewards that score their completions.

    An example is a dict with "prompt" (a text, or chat messages [{"role", "content"}, ...]) and columns, the same for
    all examples of the task. No problem of `heldout` is in `train`.
    """

    name: str
    train: list[dict]
    heldout: list[dict]
    rewards: dict[str, tuple[float, Reward]]  # name -> (weight, function), as `minirl.rewards.score` takes them
    correct: Reward  # defines accuracy: 1 is right
    # A completion's answer in normal form: its vote in majority voting, None if it cannot be read and does not vote.
    # Completions of one prompt with equal answers are equally right, so the right votes are the answers of the
    # completions that `correct` gives a 1.
    extract: Callable[[str], str | None]
    notes: tuple[str, ...] = ()  # remarks for the person who starts a run; printed at its start
