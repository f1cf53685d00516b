"""The commands of `pmetal-pipeline`, one a file: options and words here, the work in the stages."""
