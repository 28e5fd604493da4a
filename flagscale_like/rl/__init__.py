"""Reinforcement learning: rewards, the guard on what a reward model can judge, rounds of policy and reward model in turns."""
