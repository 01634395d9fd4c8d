"""Writes the records of metrics.jsonl as TensorBoard events."""

from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.programs import install_command


def check_installed() -> None:
    """Raise UserError if tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UserError(
            "train.tensorboard: expected the package tensorboardX, found none; "
            f"{install_command('tensorboard')}, or leave the flag out"
        ) from None


class Events:
    """Writes records into ``folder``. Events of an earlier start after step ``start`` are hidden."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX import SummaryWriter

        # Files are named by their second, in which there may be two starts.
        self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=10, filename_suffix=f".{start:09d}")

    def write(self, record: dict[str, Any]) -> None:
        """Write every number of a record at its step. It is on disk within ten seconds."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Close the file, with all records on disk."""
        self._writer.close()
