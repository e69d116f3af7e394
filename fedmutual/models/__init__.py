"""Models of the project; any other by its dotted path."""
