"""Training of a byte-level BPE tokenizer of MiniMind's kind, and its chat template."""

import sys
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from .presets import STRETCHED_TO, VOCABULARY


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as the presets have them
SMALLEST = 256 + len(SPECIAL_TOKENS)  # every byte is a token

# ChatML. The assistant generates its content and the end token; the header and the newline after it are not generated.
CHAT_TEMPLATE = (
    "{% if tools %}{{ raise_exception('tools: write them into the system content') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('role ' ~ message.role ~ ': system, user, assistant or tool') }}"
    "{% elif message.content is not string %}"
    "{{ raise_exception('the content of role ' ~ message.role ~ ' is no text') }}"
    "{% elif message.tool_calls or message.reasoning_content %}"
    "{{ raise_exception('tool_calls, reasoning_content: write them into the content') }}"
    "{% endif %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message.content ~ '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

logger = logging.get_logger(__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a tokenizer for which `decode(encode(text))` is always the text: all bytes are tokens, and none is unknown.

    Digits and newlines are tokens of their own. Digits help with sums. Because of newlines a turn's header never shares
    a token with its content, so a tokenized prompt is always the beginning of the tokenized conversation.

    Args:
        texts: they are read once and not kept. The same texts in the same order give the same tokenizer.
        vocab_size: the number of tokens, including 3 special ones and 256 bytes. If the texts have too few different
            words, a warning gives the number of tokens.

    Returns:
        The tokenizer, with a chat template.

    Raises:
        ValueError: `vocab_size` is below 259, there is no text, or one of the texts is no string.
    """
    if vocab_size < SMALLEST:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {SMALLEST}, for {len(SPECIAL_TOKENS)} special tokens and 256 bytes"
        )
    if isinstance(texts, str):
        raise ValueError("texts is one string, which would be read character by character; give a list of texts")
    characters = 0

    def checked() -> Iterator[str]:
        nonlocal characters
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"text {i} is not a string: {text!r:.60}")
            characters += len(text)
            yield text

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),  # in a file the progress bars are empty lines
    )
    backend.train_from_iterator(checked(), trainer)
    if not characters:
        raise ValueError("there is no text to train a tokenizer on")
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            f"the tokenizer has {backend.get_vocab_size()} tokens, not {vocab_size}: there are no more pairs to merge in "
            f"{characters} characters of text; give more text, or this vocab_size"
        )
    end, start, stop = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=end,
        unk_token=end,  # as MiniMind has it; never produced
        bos_token=start,
        eos_token=stop,
        model_max_length=STRETCHED_TO,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
