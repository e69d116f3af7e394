"""Use of trained models: prediction, and export to other runtimes."""
