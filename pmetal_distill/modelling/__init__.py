"""What `pmetal_distill.models` and `pmetal_distill.gguf` are made of; import those two, not this package."""
