"""Text classifiers with different tokenisers learn from each other's predictions."""
