"""The on-disk contract: what a cache is, byte by byte. Needs NumPy, PyArrow and safetensors, not MLX."""
