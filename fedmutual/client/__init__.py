"""A site: an order comes in, the model learns, a report goes out."""
