"""Language models built of test-time-training layers."""

from tttc.models.config import SIZES, TTTConfig
from tttc.models.language_model import BlockState, TTTBlock, TTTLanguageModel

__all__ = ["SIZES", "BlockState", "TTTBlock", "TTTConfig", "TTTLanguageModel"]
