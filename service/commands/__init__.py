"""The subcommands of `roiserve`, one file each. Messages, tables and progress bars only: the rooms below do the work,
and are imported when a command runs.
"""
