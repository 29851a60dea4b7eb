"""Every private or undocumented name of vLLM that the plugin touches: what to read after an upgrade.

vLLM is read as source, not imported.
"""

import ast
import functools
import importlib.util
from pathlib import Path

import pytest


pytestmark = [pytest.mark.vllm, pytest.mark.v1]
FUNCTIONS = {
    # file, class: function: first parameters
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner._update_states"): "self, scheduler_output",
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner._preprocess"): (
        "self, scheduler_output, num_input_tokens, intermediate_tensors"
    ),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner._sample"): "self, logits, spec_decode_metadata",
    ("v1/worker/cpu_model_runner.py", "CPUModelRunner.load_model"): "self",
    ("v1/worker/cpu_worker.py", "CPUWorker.init_device"): "self",
    ("v1/worker/gpu_worker.py", "Worker.init_device"): "self",
    ("v1/worker/gpu_worker.py", "Worker.load_model"): "self",
    ("v1/worker/gpu_worker.py", "Worker.compile_or_warm_up_model"): "self",
    ("v1/worker/cpu_worker.py", "CPUWorker.compile_or_warm_up_model"): "self",
    ("v1/worker/gpu_worker.py", "Worker.execute_model"): "self, scheduler_output",
    ("v1/sample/sampler.py", "Sampler.sample"): "self, logits, sampling_metadata",
    ("v1/sample/ops/topk_topp_sampler.py", "TopKTopPSampler.forward_cpu"): "self, logits, generators, k, p",
    ("v1/sample/ops/topk_topp_sampler.py", "apply_top_k_top_p"): "logits, k, p",
    ("v1/worker/gpu/model_states/interface.py", "ModelState.__init__"): (
        "self, vllm_config, model, encoder_cache, device"
    ),
    ("v1/worker/gpu/model_states/interface.py", "ModelState.add_request"): "self, req_index, new_req_data",
    ("v1/worker/gpu/model_states/interface.py", "ModelState.remove_request"): "self, req_id",
    ("v1/worker/gpu/model_states/interface.py", "ModelState.apply_staged_writes"): "self",
    ("v1/worker/gpu/model_states/interface.py", "ModelState.prepare_inputs"): "self, input_batch, req_states",
    ("v1/worker/gpu/model_states/interface.py", "ModelState.prepare_dummy_inputs"): "self, num_reqs, num_tokens",
    ("v1/worker/gpu/model_states/interface.py", "ModelState.custom_sampler"): "self, sampler",
    ("v1/worker/gpu/sample/sampler.py", "Sampler.__call__"): "self, logits, input_batch",
    ("v1/worker/gpu/sample/sampler.py", "Sampler.sample"): "self, logits, expanded_idx_mapping, idx_mapping",
    ("distributed/communication_op.py", "tensor_model_parallel_all_reduce"): "input_",
    ("tokenizers/registry.py", "get_tokenizer"): "tokenizer_name",
    ("model_executor/model_loader/weight_utils.py", "default_weight_loader"): "param, loaded_weight",
    ("v1/engine/parallel_sampling.py", "ParentRequest.get_child_info"): "self, index",
    ("transformers_utils/config.py", "HFConfigParser.parse"): "self, model, trust_remote_code, revision",
}
TEXTS = [
    # file, text, why the plugin relies on it
    ("v1/worker/gpu/model_states/__init__.py", "return model.get_model_state_cls()", "a model brings its own state"),
    ("v1/worker/gpu/model_runner.py", "custom = self.model_state.custom_sampler(self.sampler)", "and its own sampler"),
    (
        "v1/worker/gpu/model_runner.py",
        "**self.model_state.prepare_inputs(input_batch, self.req_states),",
        "its inputs win",
    ),
    ("v1/worker/gpu/model_runner.py", "self.model_state.remove_request(req_id)", "as a request ends or is preempted"),
    ("v1/worker/gpu/model_runner.py", "self.model_state.add_request(req_index, new_req_data)", "also when it resumes"),
    ("v1/worker/gpu/model_runner.py", "sampler_output = self.sampler(logits, input_batch)", "right after the logits"),
    ("v1/worker/gpu/sample/sampler.py", "sampled, processed_logits = self.sample(", "the warped scores come back"),
    ("v1/worker/gpu/sample/sampler.py", "self.use_flashinfer = (", "a sampler that hides them can be turned off"),
    ("v1/worker/gpu/sample/sampler.py", "self.use_xpu_sampler = (", "and another one"),
    ("v1/worker/gpu/sample/sampler.py", "self.sampling_states.top_k.np[", "top-k of each request is on the host"),
    ("v1/worker/gpu/input_batch.py", "num_computed_tokens_np: np.ndarray", "how far each request is, on the host"),
    ("v1/worker/gpu/input_batch.py", "idx_mapping_np: np.ndarray", "its slot"),
    ("v1/worker/gpu/input_batch.py", "query_start_loc_np: np.ndarray", "its first token in the step"),
    (
        "v1/worker/gpu/input_batch.py",
        'req_ids = [f"req_{i}_{random_uuid()}" for i in range(num_reqs)]',
        "dummy batches",
    ),
    ("v1/core/sched/scheduler.py", "preempted_req_ids=self.reset_preempted_req_ids,", "which requests were preempted"),
    ("v1/core/sched/output.py", "resumed_req_ids: set[str]", "and which of them go on (V1)"),
    ("v1/core/sched/output.py", "num_output_tokens: list[int]", "and what they have (V1)"),
    ("v1/worker/gpu_input_batch.py", "self.num_computed_tokens_cpu = ", "how far each request is (V1)"),
    ("v1/worker/gpu_model_runner.py", "self.query_start_loc = ", "its first token in the step (V1)"),
    ("v1/worker/gpu_model_runner.py", "self.max_num_tokens = ", "the length of the buffer of embeddings (V1)"),
    ("model_executor/models/config.py", "MODELS_CONFIG_MAP: dict[str, type[VerifyAndUpdateConfig]] = {", "the check"),
    ("model_executor/models/registry.py", "class _LazyRegisteredModel(", "the stock class of a family"),
    ("model_executor/layers/vocab_parallel_embedding.py", "self.org_vocab_size = ", "the rows without padding"),
    ("lora/layers/vocab_parallel_embedding.py", "self.base_layer = base_layer", "the embedding inside LoRA"),
    ("model_executor/models/gemma.py", "self.normalizer", "Gemma's factor of its embeddings"),
    ("v1/engine/input_processor.py", 'f"{request.external_req_id}-{random_uuid():.8}"', "the form of a request's name"),
    (
        "v1/engine/parallel_sampling.py",
        'child_req_id = f"{index}_{self.request_id}"',
        "and of one of several completions",
    ),
]


@functools.cache
def source(file):
    root = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    return (root / file).read_text()


@pytest.mark.parametrize("file, name", FUNCTIONS)
def test_function(file, name):
    body, owner = ast.parse(source(file)).body, None
    for part in name.split("."):
        (owner,) = (one for one in body if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == part)
        body = owner.body
    wanted = FUNCTIONS[file, name].split(", ")
    assert [one.arg for one in owner.args.args][: len(wanted)] == wanted


@pytest.mark.parametrize("file, text, why", TEXTS)
def test_text(file, text, why):
    assert text in source(file), why
