"""The record of concept tokens, with which middle layers read discrete concepts instead of tokens."""

from ..common.method import Method


MODULES = ("concept_head", "concept_embedding")

METHOD = Method(
    name="concept",
    exports={
        "ConceptCache": "cache",
        "ConceptEmbedding": "modules",
        "ConceptHead": "modules",
        "ConceptModel": "model",
        "OnlineConceptConfig": "config",
        "attach_concepts": "modules",
        "has_concepts": "modules",
        "with_concept_modules": "modules",
    },
    what="concepts",
    key="concepts",
    settings="OnlineConceptConfig",
    attribute="concept_config",
    modules=MODULES,
    linear_modules=MODULES,
    attach="attach_concepts",
    loader="ConceptModel",
    about="It compresses what it reads and writes into concept tokens.",
    dropped="the concept head and embedding: what is left reads every token in every layer",
    example="""\
from unsloth_ext import ConceptModel

model = ConceptModel.from_pretrained({where})
print(model.generate("1+2=", max_new_tokens=32))""",
    likelihood="forward",
    refused_arguments=(
        "cache_implementation",
        "prefill_chunk_size",
        "output_attentions",
        "output_hidden_states",
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "position_ids",
        "past_key_values",
        "cache",
    ),
    without_vllm="vLLM keeps the same tokens in every layer, and the middle layers of a model with concepts hold fewer",
)
