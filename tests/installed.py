"""Which versions the tests run on."""

from unsloth_ext.common.compat import at_least


__all__ = ["OLD_NAMES", "at_least"]

# PEFT 0.21 and TRL 1.16 call what transformers 5.23 renamed by its old names. The message of such a warning, as a pattern
OLD_NAMES = ".*gradient_checkpointing"
