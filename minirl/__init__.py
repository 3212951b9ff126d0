"""A compact engine for reinforcement learning of language models on one GPU."""

__version__ = "0.2.0"
