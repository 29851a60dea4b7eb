"""Configurations and trainers of CODI, PCCoT and KaVa."""

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
    one device).

    `preset_lora()` returns the LoRA configuration that belongs to them.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.presets = {name: values for name, (method, values) in PRESETS.items() if method == cls.__name__}

    @staticmethod
    def preset_lora() -> LoraConfig:
        """LoRA of all presets: rank 128, alpha 32, dropout 0.1, on all linear layers."""
        return LoraConfig(**LORA, task_type="CAUSAL_LM")


@dataclass
class CODIConfig(_Published, LatentArguments, SFTConfig):
    """CODI (arXiv 2502.21074): sequential latent tokens; hidden states are pulled together in every layer."""

    default_sources = {"official code": ("projection_dim",)}

    num_latents: int = field(default=6, metadata={"help": "M, the number of latent tokens."})
    iterations: int | None = field(default=None, metadata={"help": "None: one pass per latent token."})
    projection_dim: int | None = field(
        default=768, metadata={"help": "Width of the projection from hidden state to latent input."}
    )


@dataclass
class PCCoTConfig(_Published, LatentArguments, SFTConfig):
    """PCCoT (EMNLP 2025, arXiv 2506.18582): Jacobi iterations over all latent tokens at once.

    It uses no projection, and L_CODI excludes the embedding layer.
    """

    default_sources = {"official code": ("projection_dim",)}

    codi_skip_embeddings: bool = field(default=True, metadata={"help": "Exclude the embedding layer from L_CODI."})


@dataclass
class KAVAConfig(_Published, LatentArguments, SFTConfig):
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
