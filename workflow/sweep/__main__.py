"""One job of a sweep (`FILE audit MODEL`, `FILE measure MODEL REVISION`), or what is left of it (`FILE left`)."""

import argparse
import sys

from sweep import measure


def main() -> int:
    """Do what the command line asks; 1 with one line on standard error where it can't be done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="the sweep: models, steps and settings (YAML)")
    parser.add_argument("task", choices=["audit", "measure", "left"])
    parser.add_argument("model", nargs="?")
    parser.add_argument("revision", nargs="?")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in the cache")
    asked = parser.parse_args()
    table, settings = measure.read(asked.file)
    if asked.task == "left":
        todo = measure.left(table, settings)
        total = sum(len(revisions) for revisions in table.values())
        print(
            f"{total - len(todo)} of {total} checkpoints measured",
            *(f"left: {m} {r}" for m, r in todo),
            sep="\n",
        )
        return 0
    try:
        audit = measure.audited(asked.model, table[asked.model], settings)
        if asked.task == "measure":
            measure.measure(asked.model, asked.revision, settings, audit, asked.keep)
    except (OSError, ValueError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
