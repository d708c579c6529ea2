"""Text to tokens: sources, tokenizers, packed arrays, and the batches a training run reads."""
