"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--json]`; without a NAME, all of them."""

import argparse
import importlib
import json
import pkgutil

import pandas as pd

import benchmarks
from benchmarks.measure import Result, machine, versions


def discover() -> dict:
    """Every module of this package that has `run`, by name."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")]
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    return {name: module.run for name, module in modules.items() if hasattr(module, "run")}


def report(name: str, result: Result) -> None:
    """Two tables for people: what was timed, and the ratios beside their targets."""
    print(f"\n{name}")
    if result.table:
        print(pd.DataFrame(result.table).to_string(index=False))
    rows = [
        {
            "ratio": label,
            "measured": f"{value:.3f}",
            "target": f"<= {result.targets[label]}" if label in result.targets else "",
        }
        for label, value in result.ratios.items()
    ]
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"spread (middle half of the rounds, relative): {result.spread:.3f}")


def main() -> None:
    found = discover()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(found)}; none means all")
    parser.add_argument("--quick", action="store_true", help="small inputs: checks that it runs, not how fast")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON a benchmark")
    wanted = parser.parse_args()
    if unknown := set(wanted.names) - set(found):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    lines = []
    for name in wanted.names or found:
        result = found[name](wanted.quick)
        report(name, result)
        line = {"name": name, "ratios": result.ratios, "spread": result.spread}
        lines.append(json.dumps({**line, "machine": machine(), "versions": versions()}))
    if wanted.json:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
