"""Plan a run for any TPU slice: ``python -m llama_jax.plan --config FILE.toml --topology v5e:16x16``."""

import os
import sys
import traceback
from collections.abc import Sequence

from llama_jax.errors import UserError, run_command
from llama_jax.plan.topology import ENVIRONMENT

# The status of an internal error in sysexits.h. Python's 1 would mean a step that does not fit.
EX_SOFTWARE = 70


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line ``argv`` and plan. None: that of this process."""
    os.environ.update(ENVIRONMENT)
    from llama_jax.plan.arguments import read_request
    from llama_jax.plan.command import run

    try:
        status = run(read_request(sys.argv[1:] if argv is None else argv))
    except (UserError, OSError, MemoryError):
        raise
    except Exception:
        traceback.print_exc()
        status = EX_SOFTWARE
    if sys.stdout is not None:
        sys.stdout.flush()
    sys.exit(status)


if __name__ == "__main__":
    run_command(main)
