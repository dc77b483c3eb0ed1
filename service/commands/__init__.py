"""The subcommands of `roiserve`, a file each. Words, tables and progress bars only: the rooms below do the work, and
are imported when a command runs.
"""
