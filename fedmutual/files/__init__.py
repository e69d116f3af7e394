"""Files that survive a crash or a full disk: atomic writes and checkpoints."""
