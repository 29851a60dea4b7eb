"""Token ids of a question."""

from transformers import PreTrainedTokenizerBase


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the token ids of a question, with special tokens that begin a text and without one that ends it."""
    ids = tokenizer(question)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
