"""Tasks: prompts with what is needed to score their completions, split into training and held-out examples."""

from minirl.lab.tasks.registry import TASKS, load_task, parse_task
from minirl.task import Task

__all__ = ["TASKS", "Task", "load_task", "parse_task"]
