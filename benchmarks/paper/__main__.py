"""``python -m benchmarks.paper``: predicts the paper's figures, and writes them and ``docs/paper_memory.md``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging

import torch
import transformers

from benchmarks.paper.rows import A100, CAPACITY, SECTIONS
from benchmarks.paper.table import PAGE, RESULTS, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="only these; the others stay as they are")
    chosen = parser.parse_args().sections or list(SECTIONS)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sections": {}}
    results |= {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "device_bytes": A100,
        "overhead_bytes": A100 - CAPACITY,
    }
    for name in chosen:
        results["sections"][name] = [dataclasses.asdict(row) for row in SECTIONS[name]()]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        for row in results["sections"][name]:
            print(name, row, flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
