"""Strategies: the only place that knows both the wire and the mathematics; one file each."""
