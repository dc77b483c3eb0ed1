"""The subcommands of `roiserve`, one file each, mounted by `cli.py`. Words, tables and progress bars; the rooms do the work."""
