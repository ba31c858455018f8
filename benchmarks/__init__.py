"Benchmarks that anyone can rerun: `python -m benchmarks.op`, `.compile`, `.anneal`. Not part of the wheel."
