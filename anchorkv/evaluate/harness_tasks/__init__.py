"""lm-eval's task files for the paper's eight benchmarks, read from a local data folder."""
