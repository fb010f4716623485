"""Layout invariance: the same numbers on every mesh."""
