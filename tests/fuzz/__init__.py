"""Fuzzing of everything that reads files of a cache, a model or a recipe; see docs/durability.md."""
