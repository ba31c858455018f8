"""Benchmarks that anyone can rerun: `python -m benchmarks.op`, `.compile`, `.anneal`, `.lm_step`; `python -m
benchmarks.gpu` is the acceptance on a card. Not part of the wheel."""
