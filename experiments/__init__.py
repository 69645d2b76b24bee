"""Binaries: flags -> settings -> one library call."""
