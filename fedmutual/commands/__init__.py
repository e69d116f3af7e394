"""The subcommands of ``fedmutual``, one file each; heavy modules are imported when a command runs."""
