"""What the commands share: flags, progress bars, and how a command stops."""
