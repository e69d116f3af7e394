"""The subcommands of ``fedmutual``, a file each; what is heavy is imported when a command runs."""
