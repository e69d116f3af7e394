"""The mathematics, in torch and numpy only: no Flower, no files."""

DIVERGENCES = ("own_peer", "peer_own", "published_code")
