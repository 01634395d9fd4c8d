"""Shared by the commands: flags, progress bars, and stopping on signals."""
