"""One of two ranks that run a recipe: ENGINE SCRIPT FLAGS..."""

import runpy
import sys

import torch

from tests.engines.worker import prepare


if __name__ == "__main__":
    engine, script, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    prepare(engine)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
