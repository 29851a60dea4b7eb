"""Token ids of a question."""

from transformers import PreTrainedTokenizerBase


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the token ids of a question, with special tokens that begin a text and without one that ends it.

    A chat template may have written the token that begins a text already. It is not added a second time then.
    """
    begun = bool(tokenizer.bos_token) and question.startswith(tokenizer.bos_token)
    ids = tokenizer(question, add_special_tokens=not begun)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
