"""The mathematics: torch and numpy only, no Flower and no files."""

DIVERGENCES = ("own_peer", "peer_own", "published_code")
