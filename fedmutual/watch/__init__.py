"""Keep a Flower process of this machine working: restart it when it ends or hangs."""
