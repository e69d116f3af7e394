"""The sites of a deployment, seen from the server: who may join, who is there, what a run waits for."""
