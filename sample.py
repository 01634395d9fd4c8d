"""Generate text: ``python sample.py --ckpt runs/tiny "Once upon a time"``."""

from llama_jax.commands import run

if __name__ == "__main__":
    run("sample")
