"""The command line and the two stages: cache and train."""

import pmetal_distill  # noqa: F401  (claims the name `schemas`, see `pmetal_distill._own_packages`)
