"""The fields that latent distillation adds to SFT's configuration."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from unsloth_ext.kv_compression.compression import KVScoring
from unsloth_ext.latent.config import LatentConfig

from ..common import mixin_bases
from ..common.config_checks import (
    check_values,
    check_weights,
    must_be_off,
    must_ignore_lengths,
    must_prepare,
    must_stay,
    one_of,
)
from .data import LatentTokenizer
from .losses import LATENT_PASSES, LATENT_TOKENS, LOSSES, OF_STEPS, STD_MODES, STD_SCOPES
from .stages import Stages


WEIGHTS = ("w_student", "w_teacher", "w_codi", "w_kv", "w_latent_ce", "w_step_decoder")


@dataclass
class LatentArguments(mixin_bases.SFTConfig):
    """Fields of the configurations of latent distillation beyond those of TRL's `SFTConfig`.

    loss = w_student CE_student + w_teacher CE_teacher + w_codi L_CODI + w_kv L_KV + w_latent_ce CE_latent
        + w_step_decoder L_step
    """

    flags_title = "Latent tokens (CODI, PCCoT, KaVa, LOTUS, Coconut)"
    default_sources = {
        "official code": (
            "num_latents",
            "iterations",
            "projection",
            "projection_dropout",
            "projection_layer_norm",
            "update",
            "feedback_residual",
            "answer_prompt",
            "drop_last_step",
            "w_student",
            "w_teacher",
            "w_codi",
            "codi_loss",
            "codi_std_mode",
            "codi_std_scope",
            "codi_skip_embeddings",
        ),
        "KaVa's paper": ("kv_loss", "kv_scorer", "kv_mix_lambda", "kv_score_norm"),
    }

    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Must stay off: with it, transformers drops the cache in training."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Maximum number of tokens of question, trace and answer; recipes skip longer rows."},
    )
    num_latents: int = field(default=24, metadata={"help": "M, the number of latent tokens."})
    iterations: int | None = field(
        default=3,
        metadata={"help": "T, the number of Jacobi iterations; None: one pass per latent token; 0: pause tokens."},
    )
    projection_dim: int | None = field(
        default=None,
        metadata={"help": "Hidden width of the projection from hidden state to latent input; None: no projection."},
    )
    projection: str = field(
        default="mlp",
        metadata={"help": "'mlp' (one hidden layer of width projection_dim) or 'linear' (Linear(d, d))."},
    )
    projection_dropout: float = field(default=0.0, metadata={"help": "Dropout before the projection."})
    projection_layer_norm: bool = field(default=True, metadata={"help": "LayerNorm after the projection."})
    update: str = field(
        default="shifted",
        metadata={"help": "'shifted': the output of a slot is the input of the next; 'own': of the same slot."},
    )
    feedback_residual: bool = field(
        default=False, metadata={"help": "Add each new latent input to an earlier one instead of replacing it."}
    )
    feedback_onto: str = field(
        default="previous",
        metadata={"help": "What feedback_residual adds to: the 'previous' input, or the 'embedding' of <latent>."},
    )
    latents_per_step: int | None = field(
        default=None, metadata={"help": "c, the number of latent tokens of each step; None: they belong to no step."}
    )
    stage_epochs: float = field(
        default=0.0,
        metadata={
            "help": "Epochs until one more step becomes latent, and with iterations one more iteration is made; the steps "
            "after it are written. 0: latent tokens stand for all steps from the start."
        },
    )
    drop_later_steps: bool = field(
        default=False, metadata={"help": "After the stages, leave out the steps that have no latent tokens (Coconut)."}
    )
    reset_optimizer: bool = field(
        default=False, metadata={"help": "Forget the optimizer's moments at each stage, as Coconut does."}
    )
    answer_prompt: str = field(default="The answer is:", metadata={"help": "Text before each answer."})
    step_separator: str = field(default=" ", metadata={"help": "Text after each step of the teacher's trace."})
    drop_last_step: bool = field(default=True, metadata={"help": "Remove the last step from the teacher's trace."})
    w_student: float = field(default=1.0, metadata={"help": "Weight of the student's cross-entropy."})
    w_teacher: float = field(default=1.0, metadata={"help": "Weight of the teacher's cross-entropy."})
    w_codi: float = field(default=1.0, metadata={"help": "Weight of the hidden-state distance L_CODI."})
    w_kv: float = field(default=0.0, metadata={"help": "Weight of the key-value distance L_KV."})
    w_latent_ce: float = field(
        default=0.0,
        metadata={"help": "Weight of the cross-entropy of the steps' tokens on the latent tokens (LOTUS)."},
    )
    latent_ce_tokens: str = field(
        default="spread",
        metadata={
            "help": "Which tokens of longer steps the latent tokens stand for: 'spread' evenly, the 'first', or the first "
            "latents_per_step of each of the 'steps', or of their 'results', which stand after '='."
        },
    )
    latent_ce_passes: str = field(
        default="all", metadata={"help": "Which passes of Jacobi iterations CE_latent is a mean over: 'all' or 'last'."}
    )
    w_step_decoder: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy of each step, written from its latent tokens by a decoder: a copy of the "
            "model that is trained beside it and then dropped (SIM-CoT)."
        },
    )
    codi_loss: str = field(default="smooth_l1", metadata={"help": "Distance of L_CODI: 'smooth_l1', 'l1' or 'mse'."})
    codi_std_mode: str = field(
        default="divide_loss",
        metadata={
            "help": "How L_CODI uses the teacher's standard deviation: 'divide_loss', 'normalize_states' or 'none'."
        },
    )
    codi_std_scope: str = field(
        default="layer", metadata={"help": "Standard deviation per 'layer', 'global', or per 'token'."}
    )
    codi_skip_embeddings: bool = field(
        default=False, metadata={"help": "Exclude the embedding layer from L_CODI, as PCCoT does."}
    )
    kv_loss: str = field(default="smooth_l1", metadata={"help": "Distance of L_KV: 'smooth_l1', 'l1' or 'mse'."})
    kv_std_mode: str = field(
        default="none",
        metadata={
            "help": "How L_KV uses the teacher's standard deviation per layer: 'divide_loss', 'normalize_states' or 'none'."
        },
    )
    kv_projection: bool = field(
        default=False,
        metadata={"help": "Apply a linear layer each to the keys and values of latent tokens before L_KV."},
    )
    kv_layer_norm: bool = field(
        default=False, metadata={"help": "Apply a LayerNorm after the linear layers of kv_projection."}
    )
    kv_scorer: str = field(
        default="kava",
        metadata={
            "help": "How the teacher's keys are chosen: 'kava', 'rkv', 'attention_only', 'cosine_only', 'random', "
            "'uniform' or 'crop'."
        },
    )
    kv_mix_lambda: float = field(
        default=0.1, metadata={"help": "Weight of importance against redundancy in kv_scorer."}
    )
    kv_score_norm: str = field(
        default="none", metadata={"help": "How importance and redundancy are normalised: 'none', 'zscore' or 'rank'."}
    )
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        check_values(self)
        if hasattr(super(), "__post_init__"):
            super().__post_init__()
        self.latent_config()
        try:
            self.kv_scoring()
        except ValueError as error:  # its message names its own fields
            raise ValueError(f"kv_{error}") from None
        one_of(self, codi_loss=LOSSES, kv_loss=LOSSES)
        one_of(self, latent_ce_tokens=LATENT_TOKENS, latent_ce_passes=LATENT_PASSES)
        self._check_steps()
        one_of(self, codi_std_mode=STD_MODES, kv_std_mode=STD_MODES, codi_std_scope=STD_SCOPES)
        weights = {name: getattr(self, name) for name in WEIGHTS}
        check_weights(**weights)
        if not any(weights.values()):
            raise ValueError(f"{', '.join(WEIGHTS)} are all 0: nothing would be trained")
        if self.w_kv and self.kv_scorer == "rkv" and self.num_latents <= KVScoring.window:
            raise ValueError(
                f"num_latents={self.num_latents}: kv_scorer='rkv' keeps the {KVScoring.window} most recent keys; use at "
                f"least {KVScoring.window + 1}"
            )
        if self.w_step_decoder and self.iterations == 0:
            raise ValueError(
                f"w_step_decoder={self.w_step_decoder} with iterations=0: pause tokens are the same for all questions, "
                "so no step can be written from them; set iterations"
            )
        if self.kv_projection and not self.w_kv:
            raise ValueError("kv_projection=True with w_kv=0: only L_KV trains it; set w_kv or leave it out")
        must_be_off(
            self,
            packing="latent tokens stand inside each row",
            eval_packing="latent tokens stand inside each row",
            padding_free="latent tokens stand inside each row",
            gradient_checkpointing="transformers drops the cache with it, and latent tokens would not see the question",
            assistant_only_loss="rows are question, steps and answer, not conversations",
        )
        if getattr(self, "completion_only_loss", None) is False:
            raise ValueError("completion_only_loss=False: questions are read, not trained on; leave it unset")
        must_ignore_lengths(self)
        must_prepare(self, "leaves rows untokenized; tokenized rows are used unchanged")
        must_stay(self, "the loss of latent distillation supports only", loss_type="nll", label_smoothing_factor=0.0)

    def _check_steps(self) -> None:
        if self.latents_per_step is not None and (
            self.latents_per_step < 1 or self.num_latents % self.latents_per_step
        ):
            raise ValueError(
                f"latents_per_step={self.latents_per_step}: must be at least 1, and divide num_latents={self.num_latents}"
            )
        if not self.stage_epochs >= 0:
            raise ValueError(f"stage_epochs={self.stage_epochs}: must be 0 or more")
        tokens = self.latent_ce_tokens
        of_steps = {f"latent_ce_tokens={tokens!r}": tokens in OF_STEPS, "stage_epochs": self.stage_epochs}
        for name, asked in of_steps.items():
            if asked and self.latents_per_step is None:
                raise ValueError(f"{name}: latent tokens must belong to steps; set latents_per_step")
        for name in ("drop_later_steps", "reset_optimizer"):
            if getattr(self, name) and not self.stage_epochs:
                raise ValueError(f"{name}=True: there are no stages; set stage_epochs")
        if self.stage_epochs and self.w_kv:
            raise ValueError(
                f"stage_epochs={self.stage_epochs} with w_kv={self.w_kv}: L_KV compresses all steps into the latent "
                "tokens; set one of them to 0"
            )

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> LatentTokenizer:
        """What tokenizes the rows that a trainer with these arguments reads."""
        return LatentTokenizer(
            tokenizer,
            self.answer_prompt,
            self.step_separator,
            self.drop_last_step,
            self.max_length,
            step_ends=self.latents_per_step is not None or self.w_step_decoder > 0,
            results=self.w_latent_ce > 0 and self.latent_ce_tokens == "results",
        )

    def stages(self) -> Stages | None:
        """The curriculum; None: there is none."""
        if not self.stage_epochs or self.latents_per_step is None:
            return None
        steps = self.num_latents // self.latents_per_step
        return Stages(steps, self.latents_per_step, self.iterations, self.stage_epochs, self.drop_later_steps)

    def latent_config(self) -> LatentConfig:
        """The settings of the model's latent tokens."""
        return LatentConfig(
            self.num_latents,
            self.iterations,
            self.projection_dim,
            self.projection_dropout,
            self.projection_layer_norm,
            self.update,
            self.feedback_residual,
            projection=self.projection,
            kv_projection=self.kv_projection,
            kv_layer_norm=self.kv_layer_norm,
            feedback_onto=self.feedback_onto,
        )

    def kv_scoring(self) -> KVScoring:
        """How the teacher's keys are chosen."""
        return KVScoring(self.kv_scorer, self.kv_mix_lambda, self.kv_score_norm)
