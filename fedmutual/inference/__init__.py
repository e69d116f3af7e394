"""Trained models at work: predicting pictures, and leaving for other runtimes."""
