"""Benchmarks, each a module to run: `python -m benchmarks.ops`. All sides of them run as `roiserve` would run them."""

from service.cli import let_waiting_threads_sleep

let_waiting_threads_sleep()  # Here, since it counts only before torch is imported.
