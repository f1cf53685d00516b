"""What the user was doing when a module raised: the sections of docs/troubleshooting.md."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "Options, configuration files and folders": (
        "pipeline.commands",
        "pipeline.config",
        "pipeline.config_schema",
        "pipeline.options",
        "pipeline.settings",
        "pipeline.demo",
        "pmetal_distill.config",
        "pmetal_distill.schedule",
        "pmetal_distill.yaml_files",
        "pmetal_distill.kernels",
        "pmetal_distill.precision",
        "pmetal_distill.modelling.folders",
    ),
    "Text": ("pipeline.data", "pipeline.demo_text", "pipeline.text", "pmetal_distill.plain_files"),
    "Models and tokenizers": (
        "pmetal_distill.models",
        "pmetal_distill.gguf",
        "pmetal_distill.modelling.anatomy",
        "pmetal_distill.modelling.overflow",
        "pmetal_distill.modelling.configs",
        "pmetal_distill.modelling.gguf_format",
        "pmetal_distill.modelling.gguf_tokenizer",
        "pmetal_distill.modelling.heads",
        "pmetal_distill.modelling.loaded",
    ),
    "Making a cache": (
        "pipeline.cache",
        "pipeline.calibration",
        "pipeline.planning",
        "pipeline.stage_one",
        "pipeline.teacher",
        "pmetal_distill.offline.background",
        "pmetal_distill.offline.calibrate",
        "pmetal_distill.offline.capture",
        "pmetal_distill.offline.commit",
        "pmetal_distill.offline.device_fidelity",
        "pmetal_distill.offline.fidelity",
        "pmetal_distill.offline.progress",
        "pmetal_distill.offline.row_capture",
        "pmetal_distill.offline.sketch",
        "pmetal_distill.offline.writer",
    ),
    "Reading, checking and mending a cache": (
        "pipeline.checking",
        "pipeline.inspection",
        "pipeline.replay",
        "pipeline.status",
        "pmetal_distill.offline",
        "schemas",
    ),
    "Caches in object storage": (
        "pipeline.transfer",
        "pmetal_distill.offline.mirror",
        "pmetal_distill.offline.remote",
        "pmetal_distill.offline.transfer",
    ),
    "Training": (
        "pipeline.training",
        "pmetal_distill.adapters",
        "pmetal_distill.checkpoint",
        "pmetal_distill.distiller",
        "pmetal_distill.losses",
        "pmetal_distill.modelling.callbacks",
        "pmetal_distill.modelling.tuning",
        "pmetal_distill.target",
        "pmetal_distill.teaching",
    ),
    "Several processes": (
        "pmetal_distill.modelling.sharding",
        "pmetal_distill.parallel",
        "pmetal_distill.sharded",
    ),
    "Evaluating and reporting": (
        "pipeline.eval_subject",
        "pipeline.evaluate",
        "pipeline.reporting",
        "pmetal_distill.evaluation",
        "pmetal_distill.modelling.tasks",
    ),
    "Making students": ("pipeline.new_student", "pmetal_distill.students"),
    "Importing and exporting": ("pipeline.exchange",),
}


def family_of(module: str) -> str:
    """The section of a module: that of its longest prefix.

    Raises:
        LookupError: it has none; add it above.
    """
    found = [
        (len(prefix), family)
        for family, prefixes in FAMILIES.items()
        for prefix in prefixes
        if f"{module}.".startswith(f"{prefix}.")
    ]
    if not found:
        raise LookupError(f"{module}: raises errors and belongs to no family of tools/reference/families.py")
    return max(found)[1]
