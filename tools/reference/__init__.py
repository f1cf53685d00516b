"""Writes docs/reference.md and docs/reference-errors.md out of the code: `python -m tools.reference`."""
