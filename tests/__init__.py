"""Tests, mirroring the packages; `tests.tiny` builds small models, `tests.reference` holds the formulas."""
