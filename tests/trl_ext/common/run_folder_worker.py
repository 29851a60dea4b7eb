"""A rank that claims a folder twice and writes down what it was told."""

import json
import sys
from pathlib import Path

from transformers import TrainingArguments

from tests.processes import leave
from trl_ext.cli.resuming import claim


def main(folder: Path) -> None:
    args = TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to="none")
    found = {"run": claim(args, False)[0]}
    if args.process_index == 0:
        (folder / "out" / "final").mkdir()
    try:
        claim(args, False)
    except ValueError as error:
        found["again"] = str(error)
    (folder / f"{args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
