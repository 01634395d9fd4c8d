"""Tests; the folder mirrors llama_jax/."""

import gc

# Tracing makes so many objects that a tenth of the tests' time would go into looking for cycles among them.
gc.set_threshold(100_000, 20, 20)
