"""``fedmutual compare``: strategies x conditions x seeds, run side by side and compared in pairs."""
