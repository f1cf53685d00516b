"""Every error a user can cause, in one place. The three packages raise these and nothing else on bad input.

    PmetalError                    exit code 1
    ├── UsageError                 exit code 2: an option, a configuration key, an output folder
    ├── DataError                  text that cannot be read as training data (names file and line)
    ├── ModelError                 not a model, or one that cannot be used
    ├── NonFiniteError             NaN or inf where a number is needed (names the row)
    ├── CheckpointError            a run's checkpoint that cannot be written, or belongs to another run
    └── CacheError                 something about a cache folder
        ├── CorruptionError        bytes that are not what was written: hash, CRC, invariant
        ├── VersionError           a format version this reader does not know
        ├── FingerprintError       made from other inputs than the ones given (names what differs)
        └── IncompatibleError      a sound cache that does not fit what it is asked for

A message says where, what must hold, what was found and what to do, in that order:
`shard 12, row 417: 63 ids, dataset.json says k=64; run 'pmetal-pipeline repair CACHE'`.
"""


class PmetalError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 1


class UsageError(PmetalError, ValueError):
    """A wrong option, configuration key or output folder."""

    exit_code = 2


class DataError(PmetalError, ValueError):
    """Training text that cannot be read."""


class ModelError(PmetalError, ValueError):
    """A folder or file that is not a usable model."""


class NonFiniteError(PmetalError, ArithmeticError):
    """NaN or infinity in logits, hidden states or a loss."""


class CheckpointError(PmetalError):
    """A checkpoint that cannot be written, or that belongs to another run."""


class PeerLostError(PmetalError):
    """A process of a distributed run that no longer answers."""


class CacheError(PmetalError):
    """Something about a cache folder."""


class CorruptionError(CacheError):
    """Bytes that differ from those that were written."""


class VersionError(CacheError):
    """A format version that this reader does not know."""


class FingerprintError(CacheError):
    """The cache was made from other inputs than the ones given."""


class IncompatibleError(CacheError):
    """The cache is sound, but cannot serve this request."""
