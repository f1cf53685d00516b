"""The command line and the two stages: cache and train."""
