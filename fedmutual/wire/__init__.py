"""What travels: messages, the codec of predictions, and the exchange that carries them."""
