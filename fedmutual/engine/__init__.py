"""Driving a run: rounds or arrivals, who takes part, history, checkpoints, results."""
