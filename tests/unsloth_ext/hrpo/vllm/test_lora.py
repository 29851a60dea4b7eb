"""vLLM's LoRA requests on a model that thinks, against `hybrid_generate` with the same LoRA merged."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from .engines import check, checkpoint, engine, prompts, run, sampling


pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = 12
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("source, norm", [("projection", "embedding_rms"), ("soft_embedding", "unit")])
def test_requests_with_and_without_lora_in_one_batch(tmp_path, source, norm):
    from vllm.lora.request import LoRARequest

    plain, folder, tokenizer = checkpoint("qwen3", source=source, norm=norm)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LAYERS), init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.3)
    adapted.save_pretrained(tmp_path)
    # Its settings of the thinking modules are the base model's, and vLLM does not read them
    merged = adapted.merge_and_unload()
    lora = LoRARequest("mine", 1, str(tmp_path))
    # vLLM's LoRA for CPUs takes the last place for a request without LoRA, so one place stays empty
    with engine(folder, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        params = [sampling(max_tokens=STEPS) for _ in range(4)]
        found = run(llm, params, lora_request=[lora, None, lora, None])
        config.target_modules = {"embed_tokens"}
        get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path / "embedding")
        with pytest.raises(Exception, match="embed_tokens"):
            run(llm, params[:1], lora_request=LoRARequest("embedding", 2, str(tmp_path / "embedding")))
    for i, (text, out, (trace,)) in enumerate(zip(prompts(4), *found, strict=True)):
        check(out.outputs[0], trace, text, plain if i % 2 else merged, tokenizer, max_new_tokens=STEPS)
