"""A run followed elsewhere while it goes on: one interface (``tracker.py``), and a file for each logger."""
