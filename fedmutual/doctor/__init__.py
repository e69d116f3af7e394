"""``fedmutual doctor``: check whether a site is ready for a run, and say what to fix."""
