"""``python -m llama_jax train``: the same as ``llama-jax train``."""

from llama_jax.commands import main

if __name__ == "__main__":
    main()
