"""The settings of both stages. Every default stands here and nowhere else; every value is checked here.

Keys are those of `mlx_lm.lora` where it has them; `metadata["help"]` is the text of the command-line option.
"""

from pipeline.settings.cache import CacheSettings
from pipeline.settings.train import LoraParameters, Loss, LrSchedule, TrainSettings

__all__ = ["CacheSettings", "LoraParameters", "Loss", "LrSchedule", "TrainSettings"]
