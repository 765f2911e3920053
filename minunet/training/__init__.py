"""The work: one training step, the optimiser, the scores, the run, and the checkpoints it can go on from."""
