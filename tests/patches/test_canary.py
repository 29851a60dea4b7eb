"""Every private upstream name that this project touches, with the parameters it had: what to read after an upgrade.

Unsloth is read as source, not imported: importing it takes long and changes the process.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

import patches
from patches.base_model_forward import FAMILIES


COMPUTE_LOSS = "self, model, inputs, return_outputs, num_items_in_batch"
UNSLOTH = {
    # file, function: first parameters
    ("unsloth/models/llama.py", "LlamaModel_fast_forward"): (
        "self, input_ids, causal_mask, attention_mask, position_ids, past_key_values, inputs_embeds"
    ),
    ("unsloth/models/llama.py", "_norm_modules_to_save"): "model, name",
    ("unsloth/models/llama.py", "apply_logit_transforms"): "logits, logit_softcapping, logit_scaling",
    ("unsloth/models/llama.py", "resolve_logit_scaling"): "config",
    ("unsloth/models/llama.py", "mark_unsloth_fast_path"): "model",
    ("unsloth/models/llama.py", "_gated_method"): "cls, name, fast, original",
    ("unsloth/models/llama.py", "unsloth_fast_generate"): "self",
    ("unsloth/models/llama.py", "patch_peft_model"): "model, use_gradient_checkpointing",
    ("unsloth/models/llama.py", "for_training"): "model, use_gradient_checkpointing",
    ("unsloth/models/llama.py", "_build_rope_cache"): "self, device_index",
    ("unsloth/models/llama.py", "_ensure_rope_cache"): "self, device_index",
    ("unsloth/models/llama.py", "_set_cos_sin_cache"): "self, seq_len, device, dtype",
    ("unsloth/models/_utils.py", "_refuse_model_parallel_export"): "model, method",
    ("unsloth/save.py", "unsloth_generic_save_pretrained_merged"): (
        "self, save_directory, tokenizer, save_method, push_to_hub"
    ),
    ("unsloth/kernels/rms_layernorm.py", "fast_rms_layernorm"): "layernorm, X, gemma, save_output, reuse_grad",
    ("unsloth/kernels/rope_embedding.py", "fast_rope_embedding"): "Q, K, cos, sin, rope_embedding_indices",
    ("unsloth/models/rl.py", "PatchFastRL"): "algorithm, FastLanguageModel",
    ("unsloth/utils/prefix_grouper.py", "prefix_grouper_enabled"): "",
    ("unsloth/models/rl_replacements.py", "compute_loss"): COMPUTE_LOSS,
    ("unsloth/models/rl_replacements.py", "_get_per_token_logps_and_entropies"): (
        "self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_efficient"
    ),
    ("unsloth_zoo/rl_replacements.py", "grpo_accumulated_loss"): ", ".join(
        patches.get("grpo_accumulated_loss").parameters[:-1]
    ),
    ("unsloth/models/rl_replacements.py", "_unsloth_grpo_autocast"): "self",
    ("unsloth/models/rl_replacements.py", "_unsloth_grpo_autocast_unscored"): "self",
    ("unsloth_zoo/rl_replacements.py", "left_pack_padding"): "tensor, pad_id",
}
UNSLOTH_TEXT = [
    # file, text, why we rely on it
    ("unsloth/models/llama.py", '"UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1"', "hidden states in the logits' place"),
    ("unsloth/models/llama.py", 'getattr(self, "_unsloth_fast_path", False)', "the gate in transformers' classes"),
    ("unsloth/models/_decode_graphs.py", "ENABLED = None", "the switch of CUDA-graph decoding"),
    ("unsloth/models/_decode_graphs.py", "if ENABLED is not None:", "that it comes before the environment"),
    ("unsloth/models/rl.py", '"_unsloth_grpo_hidden_states_unsafe"', "the GRPO wrapper steps aside"),
    ("unsloth/models/rl.py", 'os.environ.get("UNSLOTH_ALLOW_CPU", "0") == "1"', "the CPU fixture"),
    ("unsloth/save.py", "_refuse_model_parallel_export(model, method)", "every export asks it first"),
    ("unsloth/utils/prefix_grouper.py", "return _ENABLED", "shared-prompt deduplication can be turned off"),
    ("unsloth_zoo/rl_replacements.py", "_pack_flat_ids = input_ids[_pack_keep].unsqueeze(0)", "packed row by row"),
    ("unsloth_zoo/rl_replacements.py", "input_ids = left_pack_padding(input_ids,", "left-packed in the batch's order"),
    ("unsloth_zoo/rl_replacements.py", "= UnslothEfficientGRPO.apply(", "the log-probs pass there"),
    ("unsloth/models/rl_replacements.py", "self._autocast_dtype", "our passes take the precision of Unsloth's"),
    ("unsloth/models/rl_replacements.py", "self._autocast_enabled", "and whether there is one"),
    ("unsloth/models/rl.py", "unsloth_grpo_mini_batch :", "how its config is told from TRL's"),
    ("unsloth_zoo/cpu/ops.py", "_unsloth_cpu_dispatch = True", "its CPU backend has a fused LM head of its own"),
    (
        "unsloth/models/rl_replacements.py",
        ") = grpo_accumulated_loss(",
        "the loss is looked up in the trainer's module",
    ),
]
TRAINER = "trl.trainer.grpo_trainer:GRPOTrainer."
HF = "transformers.trainer:Trainer."
IMPORTED = {
    # module:qualified name: first parameters
    TRAINER + "_generate_single_turn": "self, prompt_ids",
    TRAINER + "_generate_and_score_completions": "self, inputs",
    TRAINER
    + "_get_per_token_logps_and_entropies": "self, model, input_ids, attention_mask, logits_to_keep, batch_size",
    TRAINER + "_calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    TRAINER + "_get_train_sampler": "self, dataset",
    TRAINER + "_compute_loss": "self, model, inputs",
    TRAINER + "compute_loss": COMPUTE_LOSS,
    TRAINER + "log": "self, logs, start_time",
    HF + "create_optimizer": "self, model",
    HF + "_clip_grad_norm": "self, model",
    HF + "_load_from_checkpoint": "self, resume_from_checkpoint, model",
    HF + "_load_best_model": "self",
    "transformers.conversion_mapping:get_model_conversion_mapping": "model",
    HF + "_save": "self, output_dir, state_dict",
    HF + "_save_checkpoint": "self, model, trial",
    HF + "_save_optimizer_and_scheduler": "self, output_dir",
    HF + "_load_optimizer_and_scheduler": "self, checkpoint",
    HF + "_load_rng_state": "self, checkpoint",
    HF + "_load_scaler": "self, checkpoint",
    HF + "_get_output_dir": "self, trial",
    "trl.trainer.grpo_trainer:create_model_from_path": "model_id",
    "trl.trainer.utils:_ChunkedLogProbFunction": None,
    "transformers.generation.utils:GenerationMixin._sample": (
        "self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer"
    ),
    "transformers.generation.utils:GenerationMixin.generate": "self, inputs, generation_config",
    "transformers.generation.utils:GenerationMixin._prepare_generation_config": "self, generation_config, kwargs",
    "transformers.convert_slow_tokenizer:bytes_to_unicode": "",
    "transformers.modeling_utils:PreTrainedModel.get_decoder": "self",
    "transformers.generation.utils:_get_torch_distributed_world_size": "",
    "transformers.integrations.fsdp:is_fsdp_managed_module": "module",
    "transformers.integrations.deepspeed:is_deepspeed_zero3_enabled": "",
    "transformers.modeling_utils:PreTrainedModel.save_pretrained": "self, save_directory, is_main_process",
    "transformers.utils.hub:PushToHubMixin._upload_modified_files": "self, working_dir, repo_id",
    "peft.peft_model:PeftModel.save_pretrained": "self, save_directory",
    "transformers.cache_utils:Cache.activate_past_recording": "self",
    "transformers.cache_utils:get_layer_types_and_kwargs": "config",
    "peft.tuners.tuners_utils:BaseTuner._check_merge_allowed": "self",
    "peft.utils.other:_set_trainable": "model, adapter_name, module_names, inference_mode",
    "peft.utils.other:AuxiliaryTrainingWrapper": None,
    "peft.utils.other:ModulesToSaveWrapper": None,
    "torch.nn:Module._apply": "self, fn, recurse",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state": "self",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init": "self",
    "torch.distributed.fsdp._fully_shard._fsdp_common:TrainingState.PRE_BACKWARD": None,
    "trl.models.utils:_ForwardRedirection.__call__": "self, wrapper_module, original_module, method",
    HF + "_prepare_for_training": "self, max_steps, train_dataloader, resume_from_checkpoint",
    HF + "evaluation_loop": "self, dataloader, description",
}
TEXT = [
    ("trl.trainer.grpo_trainer", "self._buffered_inputs", "rollouts inside a generation cycle are saved"),
    ("trl.trainer.grpo_trainer", "self._step", "so is the place in it"),
    ("trl.trainer.grpo_trainer", "self._metrics", "our numbers are logged with the parent's"),
    ("trl.trainer.grpo_trainer", "self._tokenizer", "the delimiter is compiled for it"),
    (
        "trl.trainer.grpo_trainer",
        'model.add_adapter("ref", default_config)',
        "a PeftModel's reference is an adapter of it",
    ),
    ("transformers.trainer", "for subdir_name in adapter_subdirs:", "and is loaded in the trained adapter's place"),
    ("transformers.training_args", "doesn't support bf16/gpu", "our parser says what to do instead"),
    ("transformers.generation.utils", "_eos_token_tensor", "rows that have ended do not think"),
    ("transformers.generation.utils", "custom_generate", "hybrid decoding rides on generate"),
    ("trl.trainer.base_trainer", 'os.path.join(self.args.output_dir, "README.md")', "a run's card is completed there"),
    (
        "peft.peft_model",
        'card.data["tags"] = sorted(tags)',
        "PEFT drops a reader's tags, so the card of before is kept",
    ),
    ("bitsandbytes.nn.modules", "and self.support_avx512bf16_for_cpu", "evaluation packs no weights that are trained"),
    ("bitsandbytes.nn.modules", '"packing_format_for_cpu"', "and packed ones are refused"),
    ("transformers.cache_utils", "self.record_past", "Jacobi iterations crop layers with a window"),
    ("transformers.cache_utils", 'getattr(config, "sliding_window", None) is not None', "the rule of layer_kinds.py"),
    ("transformers.models.rwkv.modeling_rwkv", "_is_stateful = True", "recurrent models are told by their class"),
    ("transformers.models.llama4.modeling_llama4", 'base_model_prefix = "language_model"', "backbone_of goes round it"),
    (
        "transformers.generation.utils",
        "generation_mode_kwargs = {k: kwargs.pop(k) for k in new_custom_keys if k in kwargs}",
        "the tokenizer of stop strings, and whether ranks keep step, are dropped for it",
    ),
    ("peft.peft_model", "self.base_model.model.generation_config = self.generation_config", "whose config counts"),
    ("peft.utils.other", "disable_adapters", "the KL reference does not think"),
    ("trl.trainer.grpo_trainer", "self.state.global_step != self._last_loaded_step", "when weights go to vLLM"),
    ("peft.utils.other", "copy.deepcopy(self.original_module)", "a small module's copy has the original's digits"),
    ("trl.trainer.grpo_trainer", "param.data = param.data.to(torch.bfloat16)", "keeping_master_weights undoes it"),
    ("trl.trainer.sft_trainer", "param.data = param.data.to(torch.bfloat16)", "keeping_master_weights undoes it"),
]


def _positional(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]


@functools.cache
def _source(file: str) -> str:
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], rest).read_text()


@functools.cache
def _functions(file: str) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for node in ast.walk(ast.parse(_source(file))):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(_positional(node))
    return found


@pytest.mark.parametrize(("file", "name"), UNSLOTH)
def test_unsloth_function(file, name):
    wanted = [part for part in UNSLOTH[file, name].split(", ") if part]
    found = _functions(file).get(name)
    assert found, f"{file} has no function {name} any more"
    assert any(parameters[: len(wanted)] == wanted for parameters in found), f"{name} now takes {found}"


@pytest.mark.parametrize(("file", "text", "why"), UNSLOTH_TEXT)
def test_unsloth_text(file, text, why):
    assert text in _source(file), f"{file} lacks {text!r}: {why}"


@pytest.mark.parametrize("name", IMPORTED)
def test_function(name):
    module, _, path = name.partition(":")
    target = importlib.import_module(module)
    for part in path.split("."):
        target = getattr(target, part)
    if IMPORTED[name] is not None:
        wanted = [part for part in IMPORTED[name].split(", ") if part]
        assert list(inspect.signature(inspect.unwrap(target)).parameters)[: len(wanted)] == wanted


@pytest.mark.parametrize(("module", "text", "why"), TEXT)
def test_text(module, text, why):
    assert text in inspect.getsource(importlib.import_module(module)), f"{module} lacks {text!r}: {why}"


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_forward(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parameters = inspect.signature(inspect.unwrap(getattr(module, FAMILIES[family]).forward)).parameters
    assert list(parameters)[:2] == ["self", "input_ids"] and "inputs_embeds" in parameters
