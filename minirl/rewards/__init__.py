"""Rewards: what a completion is worth, in parts that are weighted, added up and logged one by one.

A reward is a plain function `reward(prompts, completions, **columns) -> list[float | None]`, called with keywords:
`prompts` and `completions` are lists, every column of the data is a list of the same length, and NaN or None means
"cannot be scored".
"""

from minirl.rewards.registry import REWARDS, load_reward
from minirl.rewards.rules import Reward, guarded
from minirl.rewards.scoring import Fault, Outside, RewardError, score

__all__ = ["REWARDS", "Fault", "Outside", "Reward", "RewardError", "guarded", "load_reward", "score"]
