"""The record of planner and executor, which plan in typed concepts and write text from the plan alone."""

from ..common.method import Method


METHOD = Method(
    name="planner",
    exports={
        "ConceptTypeConfig": "config",
        "PlannerConfig": "config",
        "PlannerExecutorModel": "model",
        "SharedBackboneUnifiedHead": "head",
        "SoftPlan": "planning",
        "attach_planner": "head",
        "execute_plan": "model",
        "executor_forward": "executor",
        "executor_prefix": "executor",
        "plan": "planning",
        "plan_lengths": "vocabulary",
        "plan_log_prob": "planning",
        "plan_log_probs": "planning",
        "plan_soft": "planning",
        "text_log_prob": "executor",
        "text_nll": "executor",
        "with_planner_modules": "head",
    },
    what="planner",
    key="planner",
    settings="PlannerConfig",
    attribute="planner_config",
    modules=("unified_head",),
    attach="attach_planner",
    loader="PlannerExecutorModel",
    about="It plans in concepts and writes the text from the plan alone.",
    dropped="the planner's head: what is left writes without a plan",
    example="""\
from unsloth_ext import PlannerExecutorModel

model = PlannerExecutorModel.from_pretrained({where})
print(model.plan("1+2="), model.generate("1+2=", max_new_tokens=32))""",
    completion="completion:complete",
    likelihood="completion:log_likelihood",
    states=("on", "shuffle"),
    refused_arguments=(
        "use_cache",
        "cache_implementation",
        "prefill_chunk_size",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "position_ids",
        "past_key_values",
        "cache",
    ),
    without_vllm="vLLM counts positions up from 0, and those of a plan begin again with each type of concept",
)
