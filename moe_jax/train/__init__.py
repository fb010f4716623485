"""State, step, loop, optimizers and schedules."""
