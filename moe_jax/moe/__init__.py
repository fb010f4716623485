"""The Mixture-of-Experts layer: score, select, dispatch, combine."""
