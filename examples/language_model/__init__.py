"""The parts of examples/train_lm.py: text, training, checkpoints, perplexity by position, plots."""
