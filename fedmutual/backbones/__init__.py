"""Pretrained backbones: their settings, where their weights are, and the networks."""
