"""Tasks: one file per task; base.py has what a task is, and the registry that finds them."""
