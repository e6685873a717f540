"""From raw text to batches: tokenizer, prepare, blocks, mixture, feed."""
