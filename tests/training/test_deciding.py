"""Settings of which two decide the same thing: which one counts, and that it is told."""

import pytest

from llama_jax.config import Config, ModelArgs
from llama_jax.training.deciding import decide


@pytest.mark.parametrize(("name", "value"), [("multiple_of", 64), ("ffn_dim_multiplier", 2.0)])
def test_the_width_of_a_feed_forward_layer_is_that_of_the_flag(name: str, value: float) -> None:
    model = ModelArgs(dim=32, n_heads=2, hidden_dim=48, **{name: value})  # type: ignore[arg-type]
    config, notes = decide(Config(model=model), {f"model.{name}"})
    assert config.model.hidden_width == ModelArgs(dim=32, n_heads=2, **{name: value}).hidden_width  # type: ignore[arg-type]
    assert notes == [f"model.hidden_dim 48 of the file is not used, as --model.{name} {value} decides the same"]
    config, notes = decide(Config(model=model), {f"model.{name}", "model.hidden_dim"})
    assert config.model.hidden_width == 48
    assert notes == [f"model.{name} {value} is not used, as model.hidden_dim 48 decides the same"]
    assert decide(Config(model=model), set()) == (Config(model=model), [])
