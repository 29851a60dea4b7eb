"""Published settings by name, with the configuration that they belong to, and their LoRA. See docs/latent.md for the
sources."""

from typing import Any


LORA: dict[str, Any] = {"r": 128, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}

_SCHEDULE = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 4,  # batches of 128 on one device
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # a share of all steps
    "max_grad_norm": 2.0,
}


def _run(lr: float, decay: float, epochs: int, **method) -> dict:
    return {**_SCHEDULE, "learning_rate": lr, "weight_decay": decay, "num_train_epochs": epochs, **method}


def _kava(lr, decay, epochs, loss, std, mix=0.1, projection=2048, w_codi=10.0, w_kv=1.0) -> tuple[str, dict]:
    fields = {
        "w_codi": w_codi,
        "w_kv": w_kv,
        "kv_loss": loss,
        "kv_std_mode": "divide_loss" if std else "none",
        "kv_mix_lambda": mix,
        "projection_dim": projection,
    }
    return "KAVAConfig", _run(lr, decay, epochs, **fields)


def _staged(lr: float, epochs: int, **method) -> dict:
    """All weights are trained at a constant rate, in batches of 128 on one device."""
    batch = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 4, "weight_decay": 0.01}
    return {**batch, "learning_rate": lr, "lr_scheduler_type": "constant", "num_train_epochs": epochs, **method}


def _sim_cot_coconut() -> dict:
    """Batches of 64 on one device. The official run begins with a model that was trained by Coconut."""
    batch = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}
    return _staged(1e-4, 32, max_grad_norm=0.0, num_latents=10, w_step_decoder=1.0) | batch


PRESETS: dict[str, tuple[str, dict]] = {
    "codi-gpt2": ("CODIConfig", _run(3e-3, 0.1, 40, w_codi=1.0, projection_dim=768)),
    "codi-llama-1b": ("CODIConfig", _run(8e-4, 0.1, 10, w_codi=20.0, projection_dim=2048)),
    "sim-cot-gpt2": ("CODIConfig", _run(3e-3, 0.1, 40, w_codi=1.0, projection_dim=768, w_step_decoder=1.0)),
    "sim-cot-llama-1b": ("CODIConfig", _run(8e-4, 0.1, 10, w_codi=20.0, projection_dim=2048, w_step_decoder=1.0)),
    "pccot-gpt2": ("PCCoTConfig", _run(3e-3, 0.01, 40, w_codi=1.0, codi_std_scope="layer")),
    "pccot-llama-1b": ("PCCoTConfig", _run(8e-4, 0.1, 10, w_codi=20.0, codi_std_scope="global")),
    "kava-llama-1b-aug": _kava(8e-4, 0.1, 10, "smooth_l1", True),
    "kava-llama-1b-nl": _kava(8e-4, 0.1, 10, "mse", True),
    "kava-qwen-0.5b-aug": _kava(5e-4, 0.01, 10, "mse", False, projection=896),
    "kava-qwen-0.5b-nl": _kava(8e-4, 0.1, 10, "mse", True, projection=896),
    "kava-llama-3b-aug": _kava(2e-4, 0.1, 5, "smooth_l1", False, projection=3072, w_codi=20.0, w_kv=2.0),
    "kava-llama-3b-nl": _kava(2e-4, 0.1, 5, "smooth_l1", False, mix=0.0, projection=None, w_codi=20.0, w_kv=2.0),
    # The official runs begin with a stage without latent tokens on a model that writes its steps already
    "lotus-gpt2": ("LOTUSConfig", _staged(1e-4, 29, max_grad_norm=1.0)),
    "lotus-llama-1b": ("LOTUSConfig", _staged(1e-4, 99, max_grad_norm=1.0, num_latents=150, latents_per_step=25)),
    "lotus-llama-3b": ("LOTUSConfig", _staged(5e-5, 29, max_grad_norm=1.0, num_latents=150, latents_per_step=25)),
    "coconut-gpt2": ("CoconutConfig", _staged(1e-4, 22, max_grad_norm=0.0)),
    "sim-cot-coconut-gpt2": ("CoconutConfig", _sim_cot_coconut()),
}
