"""``fedmutual audit RUN``: attacks on what a run's server received, measured against the truth."""
