"""How good a model is: the loss of a text, and scores on tasks in JSON lines."""

from llama_jax.evaluate.text import evaluate as evaluate
