"""A platform that records what would be launched and returns zeros, for tests that only compile the texts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from pmetal_distill.kernels.dispatch import Platform


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the kernel's text and everything that MLX would generate its frame from."""

    name: str
    source: str
    header: str
    inputs: tuple[tuple[str, mx.Dtype], ...]
    outputs: tuple[tuple[str, mx.Dtype], ...]
    template: tuple[tuple[str, Any], ...]
    threads: int


def recording(prelude: str, platform: str = "cuda") -> tuple[Platform, list[Launch]]:
    """A platform that fills the returned list."""
    launches: list[Launch] = []

    def make(name: str, input_names: Any, output_names: Any, source: str, header: str) -> Callable[..., Any]:
        def call(
            inputs: Any, template: Any, grid: Any, threadgroup: Any, output_shapes: Any, output_dtypes: Any
        ) -> list[mx.array]:
            launches.append(
                Launch(
                    name,
                    source,
                    header,
                    tuple((n, a.dtype) for n, a in zip(input_names, inputs, strict=True)),
                    tuple(zip(output_names, output_dtypes, strict=True)),
                    tuple(template),
                    threadgroup[0],
                )
            )
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    return Platform(platform, make, prelude), launches
