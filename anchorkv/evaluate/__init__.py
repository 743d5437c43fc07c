"""Prove it: perplexity, question answering, needles and speed, each way beside the full cache, with its uncertainty."""
