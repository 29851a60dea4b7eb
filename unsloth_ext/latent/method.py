"""The record of latent tokens: CODI, PCCoT and KaVa."""

from ..common.method import Method


METHOD = Method(
    name="latent",
    exports={
        "LatentConfig": "config",
        "LatentEngine": "engine",
        "LatentModel": "model",
        "LatentReasoningModule": "reasoning_module",
        "attach_latent": "config",
        "kv_similarity": "probe",
        "latent_generate": "model",
        "latent_phase": "phase",
        "probe_latents": "probe",
        "with_latent_modules": "config",
    },
    what="latent tokens",
    key="latent",
    settings="LatentConfig",
    attribute="latent_config",
    modules=("latent_projection", "latent_kv_projection"),
    attach="attach_latent",
    loader="LatentModel",
    about="It thinks in latent tokens between question and answer (CODI, PCCoT, KaVa, LOTUS, Coconut).",
    dropped="the latent tokens and their projection: what is left answers without thinking",
    example="""\
from unsloth_ext import LatentModel

model = LatentModel.from_pretrained({where})
print(model.generate("1+2=", max_new_tokens=32))""",
    completion="completion:complete",
    likelihood="completion:log_likelihood",
    states=("on", "zero", "shuffle", "noise", "interpolate", "off"),
    newer=("projection", "kv_projection", "kv_layer_norm", "feedback_onto"),
    refused_arguments=(
        "num_beams",
        "cache_implementation",
        "prefill_chunk_size",
        "inputs_embeds",
        "position_ids",
        "past_key_values",
        "cache",
    ),
)
