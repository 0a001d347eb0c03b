"""Count what the op table covers and how it is tested: operators, node-test cases, and why cases are left out.

Run it from the repository: ``python tools/count_ops.py [--left-out]``.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import onnx

from zsq_deploy.model.ops import FAMILIES, OPS, OPSETS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "model" / "ops"))
from node_cases import select  # type: ignore[import-not-found]


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description="Count the operators of the op table and their node tests.")
    parser.add_argument("--left-out", action="store_true", help="list every case that is not run, with its reason")
    options = parser.parse_args()
    selection = select()
    own = sorted(name for domain, name in OPS if not domain)
    run = set().union(*(case.operators for case in selection.cases)) & set(own)
    cases = Counter(name for case in selection.cases for name in case.operators)
    print(f"operators of ONNX in the table: {len(own)} (opset {OPSETS.start} to {OPSETS.stop - 1})")
    print(f"operators of com.microsoft:     {len(OPS) - len(own)}")
    print(f"node tests of onnx {onnx.__version__}: {len(selection.cases)} run, {len(selection.left_out)} left out")
    print(f"operators in node tests:        {len(run)}; without: {', '.join(sorted(set(own) - run)) or '-'}")
    print()
    for family in FAMILIES:
        rows = sorted(row.op_type for row in OPS.values() if row.build.__module__ == family.__name__ and not row.domain)
        print(
            f"{family.__name__.rpartition('.')[2]} ({len(rows)}): {', '.join(f'{name} {cases[name]}' for name in rows)}"
        )
    print("\nleft out:")
    for reason, count in Counter(selection.left_out.values()).most_common():
        print(f"{count:5d}  {reason}")
    if options.left_out:
        print()
        for name, reason in sorted(selection.left_out.items()):
            print(f"{name}: {reason}")


if __name__ == "__main__":
    main()
