"""`python -m pmetal_distill` is `pmetal-pipeline`, also in a folder with a file pipeline.py."""

import importlib

from pmetal_distill import _own_packages

if __name__ == "__main__":
    _own_packages.claim("pipeline")
    # By name: the library itself does not depend on the command line.
    importlib.import_module("pipeline.cli").main()
