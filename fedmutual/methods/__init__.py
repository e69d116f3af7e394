"""The strategies in the image application: their settings and the client's side."""
