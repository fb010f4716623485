"""Plain layers: attention, norms, rotary positions, dense feed-forward."""
