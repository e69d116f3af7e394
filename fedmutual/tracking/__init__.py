"""Live tracking of a run in external tools: one interface (``tracker.py``), one file per logger."""
