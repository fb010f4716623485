"""Hand-written kernels, each beside the plain code that it equals."""
