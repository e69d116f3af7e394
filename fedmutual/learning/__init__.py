"""The mathematics: torch and numpy only, no Flower and no files."""
