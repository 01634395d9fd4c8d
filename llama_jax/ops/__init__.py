"""What the model computes with: attention, matrix products, embeddings, the loss, the cache, quantized weights."""
