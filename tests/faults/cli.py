"""`pmetal-pipeline` as a module, for processes that run in a source tree."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
