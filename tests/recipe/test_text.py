"""What a recipe knows of a text before it chooses."""

from pathlib import Path

from llama_jax.config import DataArgs
from llama_jax.recipe.text import count_text
from llama_jax.tokenizer import Tokenizer


def test_what_of_a_folder_is_not_counted_is_told(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"The fox of {name} went to the river.\n" * 200)
    args = DataArgs(str(tmp_path), tokenizer_model_path=str(small_tokenizer.model_path))
    counted = count_text(args, False, 1e6)
    assert any("the test split: 1 (test.txt)" in note for note in counted.notes)
    assert counted.train_bytes < 200 * len("The fox of train went to the river.\n")
