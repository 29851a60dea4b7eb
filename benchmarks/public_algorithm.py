"""The peer of the decode benchmark: HRPO's published decoding taken literally, from its description.

Each step decodes every row's whole completion to text to look for the delimiter, and forms the soft embedding as a dense
(B, V) x (V, d) product. Sampling, cache and gate are as cheap as ours.
"""

import torch

from unsloth_ext.residual import backbone_of
from unsloth_ext.states import Warper


@torch.no_grad()
def literal_decode(model, tokenizer, input_ids, attention_mask, new_tokens: int, delimiter: str, top_k: int):
    """Sampled ids (B, P + new_tokens). top_k=50 is what the public code samples with; 0 is the whole vocabulary."""
    warp = Warper(temperature=None, top_k=top_k, top_p=None, min_p=None)
    backbone, embedding = backbone_of(model), model.get_input_embeddings()
    prompt_length, embeds, cache = input_ids.shape[1], embedding(input_ids), None
    ids, mask = input_ids, attention_mask
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(new_tokens):
        out = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, probs = out.past_key_values, warp(out.logits[:, -1].float()).softmax(-1)
        token = torch.multinomial(probs, 1)
        ids = torch.cat([ids, token], dim=1)
        texts = tokenizer.batch_decode(ids[:, prompt_length:])
        thinking = torch.tensor([[delimiter not in text] for text in texts], device=ids.device)
        state = (probs.to(embedding.weight.dtype) @ embedding.weight) / probs.pow(2).sum(-1, keepdim=True).sqrt()
        embeds = backbone.fuse_thinking(embedding(token), thinking, state[:, None].to(embedding.weight.dtype))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position[:, -1:] + 1
    return ids
