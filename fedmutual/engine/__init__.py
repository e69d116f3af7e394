"""Drive a run: rounds or arrivals, participation, history, checkpoints, results."""
