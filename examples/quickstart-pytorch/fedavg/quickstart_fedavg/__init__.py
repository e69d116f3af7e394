"""Flower's quickstart: a small network learns to read digits at several clients."""
