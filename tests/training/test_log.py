"""What a run says of its losses, where bits per byte are known and where the tokens do not hold the text."""

from pathlib import Path
from typing import Any

import pytest

from llama_jax.training.log import evaluation_text, loss_text
from llama_jax.training.plot import plot_losses

RECORDS: list[dict[str, Any]] = [
    {"step": step, "tokens": 64 * step, "train_loss": 3.0 / step, "eval_loss": 3.5 / step, "eval_bits_per_byte": 1.75 / step}
    for step in (1, 2, 3)
]  # fmt: skip
LOSSY = [record | {"eval_bits_per_byte": None} for record in RECORDS]


def test_bits_per_byte_are_told_where_they_are_known() -> None:
    assert loss_text(RECORDS[0]) == "3.5000 nats a token, 1.750 bits per byte"
    assert loss_text(LOSSY[0]) == "3.5000 nats a token"
    assert evaluation_text(RECORDS[0], 1.5, True) == (
        "step 1: eval loss 3.5000 nats a token, 1.750 bits per byte (+0.250 from the floor), the best so far"
    )
    assert evaluation_text(LOSSY[0], None, False) == "step 1: eval loss 3.5000 nats a token"


@pytest.mark.parametrize("records", [RECORDS, LOSSY], ids=["known", "not known"])
def test_losses_are_drawn_with_and_without_bits_per_byte(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    plot_losses(tmp_path / "losses.png", records, "a run")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
