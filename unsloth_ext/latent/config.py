"""Settings and modules of a model that thinks in latent tokens (CODI, arXiv 2502.21074; PCCoT, arXiv 2506.18582)."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.attaching import attached_modules, check_attachable, remember, with_modules
from ..common.attaching import check_adapter as check_modules_to_save
from ..common.attaching import read_settings as settings_from_json
from ..common.embedding_rows import check_rows
from ..common.hub import fit_embeddings
from ..common.layer_kinds import CHUNKED, SLIDING, check_layers, check_length
from ..common.master_weights import MasterWeights, beside, without_autocast
from ..common.settings_file import read_json
from ..common.unsloth_decoding import on_unsloth
from ..common.wrapping import backbone_of, causal_lm_of
from .kv_projection import KVProjection
from .method import METHOD
from .phase import check_backbone


UPDATES = ("shifted", "own")
FEEDBACK = ("previous", "embedding")
PROJECTIONS = ("mlp", "linear")


@dataclass
class LatentConfig:
    """How a model thinks in latent tokens. Saved in `latent_reasoning.json`, and in a full model's `config.json`.

    Attributes:
        num_latents: M.
        iterations: T Jacobi iterations over all M latent tokens at once (PCCoT, KaVa). None is sequential, one pass for
            each token (CODI, Coconut), which gives the result of T = M. T = 0 feeds M plain `<latent>` tokens (pause
            tokens).
        projection_dim: the inner width of the projection from a hidden state to the next input,
            Dropout-Linear-GELU-Linear-LayerNorm. None is the identity.
        projection_dropout: the dropout of that projection.
        projection_layer_norm: whether it ends in a LayerNorm.
        update: `"shifted"`: the output at a slot is the input of the next slot, as in the official methods. `"own"`: it
            is the input of the same slot (Jacobi only).
        feedback_residual: add the projection to an input instead of replacing it (Jacobi only).
        feedback_onto: the input that `feedback_residual` adds to: `"previous"`, that of the pass before, or `"embedding"`,
            that of `<latent>`, in every pass (LOTUS, arXiv 2606.31779).
        bot_token: begins the latent tokens.
        latent_token: stands for a latent token.
        eot_token: ends the latent tokens.
        projection: `"mlp"`, the one above, or `"linear"`, a plain Linear(d, d).
        kv_projection: project latent keys and values before L_KV compares them (training only).
        kv_layer_norm: normalize them after this projection.

    Raises:
        ValueError: a value is unknown or out of range, or settings contradict each other.
    """

    num_latents: int = field(default=24)
    iterations: int | None = field(default=3)
    projection_dim: int | None = field(default=None)
    projection_dropout: float = field(default=0.0)
    projection_layer_norm: bool = field(default=True)
    update: str = field(default="shifted")
    feedback_residual: bool = field(default=False)
    bot_token: str = field(default="<bot>")
    latent_token: str = field(default="<latent>")
    eot_token: str = field(default="<eot>")
    projection: str = field(default="mlp")
    kv_projection: bool = field(default=False)
    kv_layer_norm: bool = field(default=False)
    feedback_onto: str = field(default="previous")

    def __post_init__(self) -> None:
        for name in ("num_latents", "iterations", "projection_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name == "num_latents"):
                raise ValueError(f"{name}={value!r}: must be a whole number")
        if self.num_latents < 1:
            raise ValueError(f"num_latents={self.num_latents}: must be at least 1")
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(
                f"iterations={self.iterations}: must be 0 or more, or None for one pass for each latent token"
            )
        if self.projection_dim is not None and self.projection_dim < 1:
            raise ValueError(f"projection_dim={self.projection_dim}: must be at least 1, or None for no projection")
        if not 0 <= self.projection_dropout < 1:
            raise ValueError(f"projection_dropout={self.projection_dropout}: must be at least 0 and below 1")
        if self.update not in UPDATES:
            raise ValueError(f"update={self.update!r}: choose one of {', '.join(UPDATES)}")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection={self.projection!r}: choose one of {', '.join(PROJECTIONS)}")
        if self.feedback_onto not in FEEDBACK:
            raise ValueError(f"feedback_onto={self.feedback_onto!r}: choose one of {', '.join(FEEDBACK)}")
        if self.feedback_onto != "previous" and not self.feedback_residual:
            raise ValueError(f"feedback_onto={self.feedback_onto!r}: nothing is added; set feedback_residual=True")
        if self.kv_layer_norm and not self.kv_projection:
            raise ValueError("kv_layer_norm=True: the LayerNorm comes after the projection; set kv_projection=True")
        if self.iterations is None and (self.update != "shifted" or self.feedback_residual):
            raise ValueError("update='own' and feedback_residual=True need Jacobi iterations; set iterations")
        if len({self.bot_token, self.latent_token, self.eot_token}) < 3:
            raise ValueError("bot_token, latent_token and eot_token must differ")

    @property
    def tokens(self) -> tuple[str, str, str]:
        """The tokens that begin, stand for and end the latent tokens."""
        return self.bot_token, self.latent_token, self.eot_token


class LatentProjection(MasterWeights, nn.Sequential):
    """The projection from a hidden state (..., d) to the next latent input (..., d).

    It is Dropout-Linear(d, w)-GELU-Linear(w, d)-LayerNorm, or a plain Linear(d, d).
    """

    def __init__(self, d: int, config: LatentConfig, **like):
        if config.projection == "linear":
            super().__init__(nn.Linear(d, d, **like))
            return
        width = config.projection_dim
        layers = [
            nn.Dropout(config.projection_dropout),
            nn.Linear(d, width, **like),
            nn.GELU(),
            nn.Linear(width, d, **like),
        ]
        super().__init__(*layers, *([nn.LayerNorm(d, **like)] if config.projection_layer_norm else []))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project hidden states (..., d) of any floating dtype to (..., d) in the dtype of the weights."""
        with without_autocast(hidden.device):
            return super().forward(hidden.to(next(self.parameters()).dtype))


def add_latent_tokens(tokenizer: PreTrainedTokenizerBase, config: LatentConfig) -> tuple[int, int, int]:
    """Return the ids of <bot>, <latent> and <eot>, after adding those that the tokenizer lacks."""
    missing = [token for token in config.tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return tuple(tokenizer.convert_tokens_to_ids(list(config.tokens)))


def attach_latent(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: LatentConfig | None = None
) -> PreTrainedModel:
    """Add latent tokens and their projection to a causal LM, in place, and the three special tokens to its tokenizer.

    Attach before PEFT wraps the model. The global RNG is used.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        config: how to think. None means the defaults.

    Returns:
        The same model.

    Raises:
        ValueError: the model already has latent tokens; runs Unsloth's fast forwards; has layers without keys and
            values of every token (linear attention, state spaces); has a window too short for the latent tokens; or has
            a decoder that works differently with a padded question in its cache.
    """
    config = config or LatentConfig()
    backbone = backbone_of(model)
    if on_unsloth(model):
        raise ValueError(
            "the model runs Unsloth's fast forwards, which cannot continue from latent tokens: load it with "
            "AutoModelForCausalLM"
        )
    check_attachable(model, METHOD)
    check_layers(model, "a latent phase", windows=(SLIDING, CHUNKED))
    check_length(model, config.num_latents + 2, "a latent phase")
    check_backbone(model)
    token_ids = add_latent_tokens(tokenizer, config)
    fit_embeddings(model, tokenizer)
    weight = model.get_input_embeddings().weight
    if config.projection_dim is not None or config.projection == "linear":
        backbone.latent_projection = LatentProjection(weight.shape[1], config, **beside(weight))
    if config.kv_projection:
        text = backbone.config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        backbone.latent_kv_projection = KVProjection(head_dim, config.kv_layer_norm, **beside(weight))
    backbone.latent_token_ids = token_ids
    remember(model, METHOD, config, token_ids=list(token_ids))
    return model


def attach_saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, saved: Any, name: str) -> None:
    """Call `attach_latent` with the settings that a model or adapter was saved with.

    Args:
        model: the causal LM.
        tokenizer: its tokenizer.
        saved: what the JSON of `name` has under `"latent"`.
        name: the folder or hub repository, for messages.

    Raises:
        ValueError: these are no settings, or the tokenizer has other ids for the latent tokens.
    """
    config, token_ids = read_settings(saved, name)
    attach_latent(model, tokenizer, config)
    found = backbone_of(model).latent_token_ids
    if list(found) != token_ids:
        raise ValueError(
            f"{name}: its tokenizer has the latent tokens at {found}, but the model was trained with {tuple(token_ids)}"
        )


def read_settings(saved: Any, name: str) -> tuple[LatentConfig, list[int]]:
    """Read settings and token ids from the JSON that `attach_latent` wrote.

    Args:
        saved: what the JSON holds.
        name: the folder or hub repository, for messages.

    Returns:
        The settings and the ids of the three tokens.

    Raises:
        ValueError: a value is missing, unknown or of the wrong type.
    """
    settings = settings_from_json(saved, name, METHOD, beside=("token_ids",))
    if not isinstance(saved["token_ids"], list):
        raise ValueError(f"{name}: its latent settings: token_ids={saved['token_ids']!r}: must be a list of ids")
    return settings, saved["token_ids"]


def trained_rows(adapter: PeftConfig) -> set[int]:
    """Return the tokens whose single embeddings an adapter trains."""
    asked = getattr(adapter, "trainable_token_indices", None) or {}
    return {i for ids in (asked.values() if isinstance(asked, dict) else [asked]) for i in ids}


def check_adapter(model: nn.Module) -> None:
    """Raise a ValueError if the active adapter of a `PeftModel` does not train the latent tokens or the projection."""
    adapter, backbone = model.peft_config[model.active_adapter], backbone_of(model)
    trained = trained_rows(adapter) >= set(backbone.latent_token_ids)
    check_modules_to_save(model, METHOD, () if trained else ("trainable_token_indices",))


def with_latent_modules(config: PeftConfig, model: PreTrainedModel) -> dict[str, Any]:
    """Return the fields of a PEFT config that train and save the embeddings of the latent tokens and the projection.

    Args:
        config: the PEFT config to complete.
        model: the model with latent tokens.

    Returns:
        Fields for `dataclasses.replace(config, **fields)`.

    Raises:
        ValueError: the PEFT method cannot train single embeddings.
    """
    if not hasattr(config, "trainable_token_indices"):
        raise ValueError(
            f"{type(config).__name__} cannot train the embeddings of the latent tokens: it has no trainable_token_indices; "
            "use LoRA"
        )
    backbone, embedding = backbone_of(model), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[2]
    check_rows(config, model, "the latent tokens'", [embedding])
    asked = config.trainable_token_indices or {}
    rows = dict(asked) if isinstance(asked, dict) else {name: asked}
    rows[name] = sorted({*rows.get(name, ()), *backbone.latent_token_ids})
    changes: dict[str, Any] = {"trainable_token_indices": rows}
    if modules := attached_modules(model, METHOD):
        changes |= with_modules(config, METHOD, modules)
    return changes


def remember_latent(model: PeftModel) -> None:
    """Save the active adapter without the embedding matrix if nothing is lost.

    PEFT writes the whole matrix into every adapter, because it has grown. If embeddings are tied and the adapter trains
    all rows that the base's `config.json` does not have, these rows are enough.
    """
    adapter = model.peft_config[model.active_adapter]
    base = read_json(adapter.base_model_name_or_path or "", "config.json", None) or {}
    grown = set(range(base.get("vocab_size", 0), model.config.vocab_size))
    if model.config.tie_word_embeddings and grown <= trained_rows(adapter):
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def think_from_now_on(model: nn.Module, **changes: Any) -> None:
    """Change settings of `LatentConfig` for good, also in what is saved. See `thinking_with`."""
    backbone = backbone_of(model)
    backbone.latent_config = replace(backbone.latent_config, **changes)
    getattr(causal_lm_of(model).config, METHOD.key).update(changes)


@contextlib.contextmanager
def thinking_with(model: nn.Module, **changes: Any) -> Iterator[None]:
    """Use other settings of `LatentConfig` inside the context, e.g. fewer latent tokens or more iterations."""
    backbone = backbone_of(model)
    kept = backbone.latent_config
    backbone.latent_config = replace(kept, **changes)
    try:
        yield
    finally:
        backbone.latent_config = kept
