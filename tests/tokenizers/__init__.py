"""Tests of llama_jax/tokenizers."""
