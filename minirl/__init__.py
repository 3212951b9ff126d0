"""A compact engine for reinforcement learning of language models on one GPU."""
