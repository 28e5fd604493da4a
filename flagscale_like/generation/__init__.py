"""Text from a model: prompts in, rollouts out, by one interface for every engine that generates."""
