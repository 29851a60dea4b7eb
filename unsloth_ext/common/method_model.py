"""A model with a method's modules and its tokenizer, loaded from the folder that a trainer wrote."""

from pathlib import Path
from typing import Any, ClassVar, Self

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attaching import attached_modules, check_attached, read_settings
from .hub import base_of, check_name, check_vocabulary, load_adapter, load_causal_lm, load_modules, load_tokenizer
from .method import Method
from .settings_file import read_saved


class MethodModel:
    """A causal LM with the modules of a method, and its tokenizer. A subclass names the method and adds decoding.

    Args:
        model: the causal LM, or a `PeftModel` around it.
        tokenizer: its tokenizer, with padding on the left.

    Attributes:
        model: as given.
        tokenizer: as given.

    Raises:
        ValueError: the model has no modules of the method.
    """

    method: ClassVar[Method]
    attach_arguments: ClassVar[str] = "model"

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        check_attached(model, self.method, self.attach_arguments)
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(cls, name: str, *, token: str | None = None, **kwargs: Any) -> Self:
        """Load an adapter folder with its base, or a full model, with the modules of the method.

        Args:
            name: a folder or a hub id.
            token: the access token for the hub.
            **kwargs: keywords for `AutoModelForCausalLM.from_pretrained`, such as `dtype="bfloat16"`.

        Returns:
            The model in evaluation mode, with its tokenizer.

        Raises:
            ValueError: there are no settings of the method; or files are damaged, lack tensors or hold NaN.
        """
        check_name(name, token)
        saved = read_saved(name, cls.method.name, token)
        base = name if saved.adapter is None else base_of(saved.adapter, name)
        tokenizer = load_tokenizer(name, token, padding_side="left")
        if not saved.settings:
            raise ValueError(f"{name} has no settings of the method {cls.method.name}: it was not saved by its trainer")
        model = load_causal_lm(base, method=cls.method.name, token=token, **kwargs)
        check_vocabulary(model, tokenizer, name)
        cls._attach(model, tokenizer, saved.settings, name)
        if saved.adapter is not None:
            model = load_adapter(model, name, is_trainable=True, token=token)
        elif modules := attached_modules(model, cls.method):
            load_modules(model, name, modules, token)
        return cls(model.eval(), tokenizer)

    @classmethod
    def _attach(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saved: Any, name: str) -> None:
        """Attach the method's modules to a loaded model. `saved` holds the settings from the JSON of `name`."""
        cls.method.attach_function()(model, read_settings(saved, name, cls.method))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model (or adapter) and the tokenizer as safetensors and JSON, with a model card."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
