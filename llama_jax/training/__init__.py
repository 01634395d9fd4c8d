"""Training: the optimizer, the step, the loop and the run folder."""
