"Benchmarks that anyone can rerun: `python -m benchmarks.op`, `.compile`. Not part of the wheel."
