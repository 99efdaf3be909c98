"""Short bare runs of an unknown pipeline with plain hooks, and what they show of it."""
