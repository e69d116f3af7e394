"""The strategies in the image application: their settings, and what a client does with an order."""
