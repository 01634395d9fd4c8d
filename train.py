"""Pretrain a LLaMA 2 model: ``python train.py`` for the built-in stories, ``python train.py my.txt`` for any text."""

from llama_jax.commands import run

if __name__ == "__main__":
    run("train")
