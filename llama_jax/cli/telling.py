"""Lines on standard error about what was decided, which are no results."""

import sys


def tell(line: str) -> None:
    """Print a line on standard error, if it is open."""
    if sys.stderr is not None:  # if it is closed, print would use standard output instead
        print(line, file=sys.stderr, flush=True)
