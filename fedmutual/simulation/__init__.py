"""``fedmutual run``: a real ``flwr run`` simulation on this machine."""
