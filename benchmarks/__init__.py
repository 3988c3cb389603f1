"""Side-by-side ratios against what a user would pick instead: `python -m benchmarks NAME [--quick] [--json]`.

Each module with a function `run(quick: bool) -> measure.Result` is one benchmark, named as the module.
"""
