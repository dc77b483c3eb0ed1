"""The subcommands of `roiserve`, a file each, mounted by `cli.py`. Words, tables and progress bars: the rooms below do
the work, and are imported when a command runs.
"""
