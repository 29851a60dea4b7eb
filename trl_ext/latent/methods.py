"""Configurations and trainers of CODI, PCCoT, KaVa, LOTUS and Coconut."""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from trl import SFTConfig

from ..cli.presets import Presets
from .config import LatentArguments
from .presets import LORA, PRESETS
from .trainer import LatentTrainer


class _Published(Presets):
    """Presets with the published loss weights, learning rate, weight decay, epochs, schedule and batch size of 128 (on
    one device)."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.presets = {name: values for name, (method, values) in PRESETS.items() if method == cls.__name__}


class _PublishedWithLoRA(_Published):
    """`preset_lora()` returns the LoRA configuration that belongs to the presets."""

    @staticmethod
    def preset_lora() -> LoraConfig:
        """LoRA of all presets: rank 128, alpha 32, dropout 0.1, on all linear layers."""
        return LoraConfig(**LORA, task_type="CAUSAL_LM")


@dataclass
class CODIConfig(_PublishedWithLoRA, LatentArguments, SFTConfig):
    """CODI (arXiv 2502.21074): sequential latent tokens; hidden states are pulled together in every layer."""

    default_sources = {"official code": ("projection_dim",)}

    num_latents: int = field(default=6, metadata={"help": "M, the number of latent tokens."})
    iterations: int | None = field(default=None, metadata={"help": "None: one pass per latent token."})
    projection_dim: int | None = field(
        default=768, metadata={"help": "Width of the projection from hidden state to latent input."}
    )


@dataclass
class PCCoTConfig(_PublishedWithLoRA, LatentArguments, SFTConfig):
    """PCCoT (EMNLP 2025, arXiv 2506.18582): Jacobi iterations over all latent tokens at once.

    It uses no projection, and L_CODI excludes the embedding layer.
    """

    default_sources = {"official code": ("projection_dim",)}

    codi_skip_embeddings: bool = field(default=True, metadata={"help": "Exclude the embedding layer from L_CODI."})


@dataclass
class KAVAConfig(_PublishedWithLoRA, LatentArguments, SFTConfig):
    """KaVa (arXiv 2510.02312): PCCoT whose latent keys and values also follow the teacher's compressed ones."""

    default_sources = {"KaVa's paper": ("num_latents", "iterations", "w_codi", "w_kv", "kv_std_mode")}

    projection_dim: int | None = field(
        default=2048, metadata={"help": "Width of the projection from hidden state to latent input."}
    )
    w_codi: float = field(default=10.0, metadata={"help": "Weight of the hidden-state distance L_CODI."})
    w_kv: float = field(default=1.0, metadata={"help": "Weight of the key-value distance L_KV."})
    kv_std_mode: str = field(
        default="divide_loss",
        metadata={
            "help": "How L_KV uses the teacher's standard deviation: 'divide_loss', 'normalize_states' or 'none'."
        },
    )


@dataclass
class _StagedConfig(_Published, LatentArguments, SFTConfig):
    """Step after step becomes latent; there is no teacher, and the model writes the other steps."""

    default_sources = {
        "official code": ("latents_per_step", "stage_epochs", "step_separator", "drop_later_steps", "reset_optimizer"),
    }

    answer_prompt: str = field(default="###", metadata={"help": "Text before each answer."})
    step_separator: str = field(default="\n", metadata={"help": "Text after each step."})
    drop_last_step: bool = field(default=False, metadata={"help": "Remove the last step of each row."})
    w_teacher: float = field(default=0.0, metadata={"help": "Weight of the teacher's cross-entropy."})
    w_codi: float = field(default=0.0, metadata={"help": "Weight of the hidden-state distance L_CODI."})


@dataclass
class LOTUSConfig(_StagedConfig):
    """LOTUS (arXiv 2606.31779): a block of latent tokens for each step, made together, which the LM head reads as the
    step's tokens.

    Each iteration adds the last hidden states to the embedding of `<latent>`.
    """

    default_sources = {"official code": ("w_latent_ce", "latent_ce_passes", "feedback_onto")}

    num_latents: int = field(default=78, metadata={"help": "M, the number of latent tokens in the last stage."})
    latents_per_step: int | None = field(default=13, metadata={"help": "c, the number of latent tokens of each step."})
    iterations: int | None = field(default=6, metadata={"help": "T, the number of iterations in the last stage."})
    stage_epochs: float = field(default=1.0, metadata={"help": "Epochs until one more step becomes latent."})
    update: str = field(default="own", metadata={"help": "The output of a slot is for its own input ('own')."})
    feedback_residual: bool = field(default=True, metadata={"help": "Add each output to an earlier input."})
    feedback_onto: str = field(
        default="embedding", metadata={"help": "What feedback_residual adds to: the 'embedding' of <latent>."}
    )
    w_latent_ce: float = field(default=0.05, metadata={"help": "Weight of the steps' tokens on the latent tokens."})
    latent_ce_tokens: str = field(
        default="steps", metadata={"help": "Which tokens the latent tokens stand for: the first of their step."}
    )
    latent_ce_passes: str = field(default="last", metadata={"help": "Which passes are read: the 'last', or 'all'."})


@dataclass
class CoconutConfig(_StagedConfig):
    """Coconut (arXiv 2412.06769): each latent token is the last hidden state before it; after the stages no step is
    written."""

    num_latents: int = field(default=6, metadata={"help": "M, the number of latent tokens in the last stage."})
    latents_per_step: int | None = field(default=2, metadata={"help": "c, the number of latent tokens of each step."})
    iterations: int | None = field(default=None, metadata={"help": "None: one pass per latent token."})
    stage_epochs: float = field(default=3.0, metadata={"help": "Epochs until one more step becomes latent."})
    drop_later_steps: bool = field(default=True, metadata={"help": "After the stages, leave out the other steps."})
    reset_optimizer: bool = field(default=True, metadata={"help": "Forget the optimizer's moments at each stage."})


class CODITrainer(LatentTrainer):
    """CODI (arXiv 2502.21074): SFT with M sequential latent tokens, a projection between them, and L_CODI over all
    layers.

    L_CODI includes the embedding layer. The teacher runs once per batch, not twice as in the official code.
    """

    _config_class = CODIConfig
    _tag_names = ["trl", "latent-cot", "codi"]
    _name = "CODI"
    _paper = {
        "title": "CODI: Compressing Chain-of-Thought into Continuous Space via Self-Distillation",
        "id": "2502.21074",
        "citation": (
            "@article{shen2025codi,\n  title = {CODI: Compressing Chain-of-Thought into Continuous Space via "
            "Self-Distillation},\n  author = {Zhenyi Shen and Hanqi Yan and Linhai Zhang and Zhanghao Hu and Yali Du and "
            "Yulan He},\n  year = 2025,\n  eprint = {arXiv:2502.21074},\n}"
        ),
    }


class PCCoTTrainer(LatentTrainer):
    """PCCoT (arXiv 2506.18582): SFT with M latent tokens in T Jacobi iterations, and L_CODI over all layers."""

    _config_class = PCCoTConfig
    _tag_names = ["trl", "latent-cot", "pccot"]
    _name = "PCCoT"
    _paper = {
        "title": "Parallel Continuous Chain-of-Thought with Jacobi Iteration",
        "id": "2506.18582",
        "citation": (
            "@article{wu2025parallel,\n  title = {Parallel Continuous Chain-of-Thought with Jacobi Iteration},\n  author = "
            "{Haoyi Wu and Zhihao Teng and Kewei Tu},\n  year = 2025,\n  eprint = {arXiv:2506.18582},\n}"
        ),
    }


class KAVATrainer(LatentTrainer):
    """KaVa (arXiv 2510.02312): PCCoT plus L_KV.

    L_KV is the distance, in every layer and KV head, between the keys and values of latent tokens and the ones of the
    teacher's trace that importance and redundancy select.
    """

    _config_class = KAVAConfig
    _tag_names = ["trl", "latent-cot", "kava"]
    _name = "KaVa"
    _paper = {
        "title": "KaVa: Latent Reasoning via Compressed KV-Cache Distillation",
        "id": "2510.02312",
        "citation": (
            "@article{kuzina2025kava,\n  title = {KaVa: Latent Reasoning via Compressed KV-Cache Distillation},\n  "
            "author = {Anna Kuzina and Maciej Pioro and Paul N. Whatmough and Babak Ehteshami Bejnordi},\n  "
            "year = 2025,\n  eprint = {arXiv:2510.02312},\n}"
        ),
    }


class LOTUSTrainer(LatentTrainer):
    """LOTUS (arXiv 2606.31779): SFT in stages, in which one more step becomes a block of latent tokens, made in Jacobi
    iterations.

    The LM head reads the states before the latent tokens as the tokens of their step. The first model should write its
    steps already.
    """

    _config_class = LOTUSConfig
    _tag_names = ["trl", "latent-cot", "lotus"]
    _name = "LOTUS"
    _paper = {
        "title": "Bridging the Gap Between Latent and Explicit Reasoning with Looped Transformers",
        "id": "2606.31779",
        "citation": (
            "@article{fan2026bridging,\n  title = {Bridging the Gap Between Latent and Explicit Reasoning with Looped "
            "Transformers},\n  author = {Ying Fan and Anej Svete and Kangwook Lee},\n  year = 2026,\n  "
            "eprint = {arXiv:2606.31779},\n}"
        ),
    }


class CoconutTrainer(LatentTrainer):
    """Coconut (arXiv 2412.06769): SFT in stages, in which one more step becomes latent tokens, made one after the other.

    The first model should write its steps already.
    """

    _config_class = CoconutConfig
    _tag_names = ["trl", "latent-cot", "coconut"]
    _name = "Coconut"
    _paper = {
        "title": "Training Large Language Models to Reason in a Continuous Latent Space",
        "id": "2412.06769",
        "citation": (
            "@article{hao2024training,\n  title = {Training Large Language Models to Reason in a Continuous Latent "
            "Space},\n  author = {Shibo Hao and Sainbayar Sukhbaatar and DiJia Su and Xian Li and Zhiting Hu and Jason "
            "Weston and Yuandong Tian},\n  year = 2024,\n  eprint = {arXiv:2412.06769},\n}"
        ),
    }
