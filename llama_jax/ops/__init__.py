"""The operations of the model: attention, matrix products, embeddings, the loss, the cache, quantized weights."""
