"""The record of MiniMind: its published models as stock transformers classes, and its tokenizer."""

from ..common.method import Method


METHOD = Method(
    name="minimind",
    exports={"load_minimind": "convert", "minimind_config": "presets", "train_tokenizer": "tokenizer"},
)
