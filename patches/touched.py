"""The code of other packages that this project changes, overrides or relies on, and which versions of it were tested.

`known_code.json` has the fingerprints. After an upgrade, read what changed upstream, run the tests, then:

    python -m patches.touched --record   # adds the fingerprints of the installed code
"""

import argparse
import functools
import json

from . import fingerprints, registry, versions


OVERRIDDEN = {
    "peft/tuners/tuners_utils.py": ("BaseTuner._check_merge_allowed",),
    "peft/utils/other.py": ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "_set_trainable"),
    "torch/distributed/fsdp/_fully_shard/_fsdp_state.py": ("FSDPState._lazy_init",),
    "torch/distributed/fsdp/_fully_shard/_fully_shard.py": ("FSDPModule._get_fsdp_state",),
    "torch/nn/modules/module.py": ("Module._apply",),
    "transformers/cache_utils.py": ("Cache.activate_past_recording", "get_layer_types_and_kwargs"),
    "transformers/conversion_mapping.py": ("get_model_conversion_mapping",),
    "transformers/convert_slow_tokenizer.py": ("bytes_to_unicode",),
    "transformers/distributed/fsdp.py": ("is_fsdp_managed_module",),
    "transformers/distributed/utils.py": ("_get_torch_distributed_world_size",),
    "transformers/generation/utils.py": (
        "GenerationMixin._prepare_generation_config",
        "GenerationMixin._sample",
        "GenerationMixin.generate",
    ),
    "transformers/integrations/deepspeed.py": ("is_deepspeed_zero3_enabled",),
    "transformers/modeling_utils.py": ("PreTrainedModel.get_decoder",),
    "transformers/trainer.py": (
        "Trainer._clip_grad_norm",
        "Trainer._get_output_dir",
        "Trainer._load_best_model",
        "Trainer._load_from_checkpoint",
        "Trainer._load_optimizer_and_scheduler",
        "Trainer._load_rng_state",
        "Trainer._load_scaler",
        "Trainer._prepare_for_training",
        "Trainer._save",
        "Trainer._save_checkpoint",
        "Trainer._save_optimizer_and_scheduler",
        "Trainer.create_optimizer",
        "Trainer.evaluation_loop",
    ),
    "trl/models/utils.py": ("_ForwardRedirection.__call__",),
    "trl/trainer/grpo_trainer.py": (
        "GRPOTrainer._calculate_rewards",
        "GRPOTrainer._compute_loss",
        "GRPOTrainer._generate_and_score_completions",
        "GRPOTrainer._generate_single_turn",
        "GRPOTrainer._get_per_token_logps_and_entropies",
        "GRPOTrainer._get_train_sampler",
        "GRPOTrainer.compute_loss",
        "GRPOTrainer.log",
    ),
    "unsloth/kernels/rms_layernorm.py": ("fast_rms_layernorm",),
    "unsloth/kernels/rope_embedding.py": ("fast_rope_embedding",),
    "unsloth/models/llama.py": (
        "FastLlamaModel.for_training",
        "FastLlamaModel.patch_peft_model",
        "LlamaRotaryEmbedding._set_cos_sin_cache",
        "LongRopeRotaryEmbedding._ensure_rope_cache",
        "LongRopeRotaryEmbedding._set_cos_sin_cache",
        "_PerDeviceRopeCache._build_rope_cache",
        "_PerDeviceRopeCache._ensure_rope_cache",
        "_gated_method",
        "apply_logit_transforms",
        "mark_unsloth_fast_path",
        "resolve_logit_scaling",
        "unsloth_fast_generate",
    ),
    "unsloth/models/rl.py": ("PatchFastRL",),
    "unsloth/models/rl_replacements.py": (
        "_unsloth_grpo_autocast",
        "_unsloth_grpo_autocast_unscored",
        "grpo_trainer__get_per_token_logps_and_entropies",
        "grpo_trainer_compute_loss",
    ),
    "unsloth_zoo/rl_replacements.py": ("left_pack_padding",),
}
"""Functions and classes that are overridden or called though they are private, or whose inner workings are relied on."""

RELIED_ON = (
    # file, text in it, why
    ("trl/trainer/grpo_trainer.py", "self._buffered_inputs", "rollouts inside a generation cycle are saved"),
    ("trl/trainer/grpo_trainer.py", "self._step", "so is the place in it"),
    ("trl/trainer/grpo_trainer.py", "self._metrics", "our numbers are logged with the parent's"),
    ("trl/trainer/grpo_trainer.py", "self._tokenizer", "the delimiter is compiled for it"),
    (
        "trl/trainer/grpo_trainer.py",
        'model.add_adapter("ref", default_config)',
        "a PeftModel's reference is an adapter",
    ),
    ("transformers/trainer.py", "for subdir_name in adapter_subdirs:", "and is loaded in the trained adapter's place"),
    ("transformers/training_args.py", "doesn't support bf16/gpu", "our parser says what to do instead"),
    ("transformers/generation/utils.py", "_eos_token_tensor", "rows that have ended do not think"),
    ("transformers/generation/utils.py", "custom_generate", "hybrid decoding rides on generate"),
    (
        "trl/trainer/base_trainer.py",
        'os.path.join(self.args.output_dir, "README.md")',
        "a run's card is completed there",
    ),
    ("peft/peft_model.py", 'card.data["tags"] = sorted(tags)', "PEFT drops a reader's tags, so the old card is kept"),
    (
        "bitsandbytes/nn/modules.py",
        "and self.support_avx512bf16_for_cpu",
        "evaluation packs no weights that are trained",
    ),
    ("bitsandbytes/nn/modules.py", '"packing_format_for_cpu"', "and packed ones are refused"),
    ("transformers/cache_utils.py", "self.record_past", "Jacobi iterations crop layers with a window"),
    (
        "transformers/cache_utils.py",
        '"sliding_window", None) is not None',
        "the rule of layer_kinds.py",
    ),
    (
        "transformers/models/rwkv/modeling_rwkv.py",
        "_is_stateful = True",
        "recurrent models are told by their class",
    ),
    (
        "transformers/models/llama4/modeling_llama4.py",
        'base_model_prefix = "language_model"',
        "backbone_of goes round it",
    ),
    (
        "transformers/generation/utils.py",
        "generation_mode_kwargs = {k: kwargs.pop(k) for k in new_custom_keys if k in kwargs}",
        "the tokenizer of stop strings, and whether ranks keep step, are dropped for it",
    ),
    (
        "peft/peft_model.py",
        "self.base_model.model.generation_config = self.generation_config",
        "whose config counts",
    ),
    ("peft/utils/other.py", "disable_adapters", "the KL reference does not think"),
    ("trl/trainer/grpo_trainer.py", "self.state.global_step != self._last_loaded_step", "when weights go to vLLM"),
    ("peft/utils/other.py", "copy.deepcopy(self.original_module)", "a module's copy has the original's digits"),
    (
        "trl/trainer/grpo_trainer.py",
        "param.data = param.data.to(torch.bfloat16)",
        "keeping_master_weights undoes it",
    ),
    ("trl/trainer/sft_trainer.py", "param.data = param.data.to(torch.bfloat16)", "keeping_master_weights undoes it"),
    (
        "torch/distributed/fsdp/_fully_shard/_fsdp_common.py",
        "PRE_BACKWARD",
        "several forwards before a backward",
    ),
    ("unsloth/models/llama.py", '"UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1"', "hidden states in the logits' place"),
    (
        "unsloth/models/llama.py",
        'getattr(self, "_unsloth_fast_path", False)',
        "the gate in transformers' classes",
    ),
    ("unsloth/models/_decode_graphs.py", "ENABLED = None", "the switch of CUDA-graph decoding"),
    ("unsloth/models/_decode_graphs.py", "if ENABLED is not None:", "that it comes before the environment"),
    ("unsloth/models/rl.py", '"_unsloth_grpo_hidden_states_unsafe"', "the GRPO wrapper steps aside"),
    ("unsloth/models/rl.py", 'os.environ.get("UNSLOTH_ALLOW_CPU", "0") == "1"', "the CPU fixture"),
    ("unsloth/models/rl.py", "unsloth_grpo_mini_batch :", "how its config is told from TRL's"),
    ("unsloth/save.py", "_refuse_model_parallel_export(model, method)", "every export asks it first"),
    ("unsloth/utils/prefix_grouper.py", "return _ENABLED", "shared-prompt deduplication can be turned off"),
    (
        "unsloth_zoo/rl_replacements.py",
        "_pack_flat_ids = input_ids[_pack_keep].unsqueeze(0)",
        "packed row by row",
    ),
    (
        "unsloth_zoo/rl_replacements.py",
        "input_ids = left_pack_padding(input_ids,",
        "left-packed in the batch's order",
    ),
    ("unsloth_zoo/rl_replacements.py", "= UnslothEfficientGRPO.apply(", "the log-probs pass there"),
    ("unsloth/models/rl_replacements.py", "self._autocast_dtype", "our passes take the precision of Unsloth's"),
    ("unsloth/models/rl_replacements.py", "self._autocast_enabled", "and whether there is one"),
    (
        "unsloth/models/rl_replacements.py",
        ") = grpo_accumulated_loss(",
        "the loss is looked up in the trainer's module",
    ),
    ("unsloth_zoo/cpu/ops.py", "_unsloth_cpu_dispatch = True", "its CPU backend has a fused LM head of its own"),
)
"""Texts in files of other packages."""


def places() -> list[str]:
    """All places with a fingerprint, `"package/folder/file.py:name"`: those of patches, and `OVERRIDDEN`."""
    of_patches = {place for name in registry.NAMES for place in registry.get(name).places}
    return sorted(of_patches | {f"{file}:{name}" for file, names in OVERRIDDEN.items() for name in names})


@functools.cache
def changes(package: str) -> tuple[str, ...]:
    """What differs from tested code in an installed package, one sentence for each place.

    Args:
        package: the folder of the package, such as `trl`.
    """
    of_package = f"{package}/"
    found = [fingerprints.change(place) for place in places() if place.startswith(of_package)]
    for file, text, why in RELIED_ON:
        if file.startswith(of_package) and not fingerprints.contains(file, text):
            found.append(f"{file} lacks {text!r} ({why})")
    return tuple(sentence for sentence in found if sentence)


def compared(package: str) -> int:
    """Return how many places and texts of a package `changes` looks at.

    Args:
        package: the folder of the package, such as `trl`.
    """
    files = [*places(), *(file for file, _, _ in RELIED_ON)]
    return sum(file.startswith(f"{package}/") for file in files)


def record() -> list[str]:
    """Add the fingerprints of the installed packages to `known_code.json`. Return the places that were new."""
    table, new = {place: dict(fingerprints.known().get(place, {})) for place in places()}, []
    for place in table:
        package, found = place.partition("/")[0], fingerprints.installed(place)
        if found and found not in table[place]:
            table[place][found] = str(versions.installed_version(package))
            new.append(place)
    fingerprints.KNOWN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    fingerprints.known.cache_clear()
    changes.cache_clear()
    return new


def main() -> None:
    """Print what differs from tested code, or record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="the installed code was read, and the tests pass on it")
    if parser.parse_args().record:
        for place in record():
            print(f"recorded: {place}")
        return
    for package in versions.TESTED:
        if versions.installed_version(package) is not None:
            print("".join(f"{sentence}\n" for sentence in changes(package)), end="")


if __name__ == "__main__":
    main()
