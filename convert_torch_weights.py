"""Convert LLaMA weights: ``python convert_torch_weights.py --input llama-2-7b --output checkpoints/llama-2-7b``."""

from llama_jax.commands import run

if __name__ == "__main__":
    run("convert")
