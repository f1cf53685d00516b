"""Between caches and the files of other tools: importers, exporters.

    import: source file -> SourceSequence, twice -> survey (k, checks, hashes) -> CacheWriter
    export: LogitCache -> plain Parquet lists, or rows over the whole vocabulary

Both stream. No importer writes the format itself, none unpickles anything.
"""

UNVERIFIED = "imported: "
"""How the fingerprint of a teacher starts that is known by name only."""
