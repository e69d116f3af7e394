"""What a run leaves: its folder, history, summary and warnings."""
