"""A dialogue with a model, turn by turn."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.generation_arguments import check_context


class Dialogue:
    """The turns of a dialogue and the model that answers.

    Args:
        model: a causal LM; it is moved to the GPU if there is one.
        tokenizer: its tokenizer.
        max_new_tokens: maximum number of tokens of an answer.
        temperature: 0 takes the most likely token.
        system: the system message; None: no system message.

    Attributes:
        messages: all turns, with `role` and `content`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        system: str | None = None,
    ):
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: must be 0 or more")
        self.model, self.tokenizer = model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
        self.messages = [{"role": "system", "content": system}] if system else []
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        self.generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )

    @torch.no_grad()
    def say(self, text: str, stream: bool = False) -> str:
        """Add a user turn and return the answer, which is added too. With `stream` it is printed while it is generated."""
        self.messages.append({"role": "user", "content": text})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        check_context(self.model, inputs["attention_mask"].sum(1).tolist(), self.generation)
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        with evaluating(self.model):
            out = self.model.generate(generation_config=self.generation, streamer=streamer, **inputs)
        answer = self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer
