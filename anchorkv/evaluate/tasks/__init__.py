"""What can be measured: one task a file, each a small class that `evaluate.run` drives."""
