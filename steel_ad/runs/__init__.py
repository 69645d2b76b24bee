"""Runs: a working directory, and what each experiment does in one."""
