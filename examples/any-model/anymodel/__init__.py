"""Models of three frameworks learn from each other's predictions."""
