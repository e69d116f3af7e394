"""Federated learning on images by distributed mutual learning, on Flower's Message API."""

__version__ = "0.1.0"
