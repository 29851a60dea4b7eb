"""Method by family: it works, against a plain reference, or it is refused by name before it changes anything."""

from pathlib import Path

import pytest
import torch
import transformers

from tests import families, tiny
from tests.trl_ext.hrpo import setups
from unsloth_ext import (
    DelimiterMatcher,
    LatentConfig,
    OnlineConceptConfig,
    PlannerConfig,
    attach_concepts,
    attach_latent,
    attach_planner,
    attach_thinking,
    backbone_of,
    hybrid_generate,
)
from unsloth_ext.common.layer_kinds import SLIDING, LayerKind, check_layers, layer_kinds
from unsloth_ext.common.padded_batches import check_batches
from unsloth_ext.kv_compression.cache import CompressedCache
from unsloth_ext.kv_compression.compression import KVScoring
from unsloth_ext.latent.phase import branch, latent_phase, prefill, project_latent
from unsloth_ext.planner.executor import executor_prefix, text_nll
from unsloth_ext.planner.planning import plan


PADS = (0, 3, 6)


def questions(length=16):
    """Left-padded by 0, 3 and 6 tokens, longer than a window of 8."""
    ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADS):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


@torch.no_grad()
def latent(family, iterations):
    """The phase and an answer token, from a shared prefill, are those of rows alone without a cache."""
    net = families.model(family)
    attach_latent(net, tiny.tokenizer(), LatentConfig(num_latents=4, iterations=iterations, projection_dim=8))
    backbone, (ids, mask) = backbone_of(net), questions()
    bot, token, eot = backbone.latent_token_ids
    shared = prefill(net, ids[:, :-1], mask[:, :-1])
    state = latent_phase(net, ids, mask, past_key_values=branch(shared))
    full = torch.cat([state.attention_mask, mask.new_ones(3, 1)], 1)
    answer = net(
        input_ids=ids.new_full((3, 1), eot),
        attention_mask=full,
        position_ids=full.cumsum(1)[:, -1:] - 1,
        past_key_values=state.cache,
        use_cache=True,
    ).logits[:, -1]
    embed = backbone.get_input_embeddings()
    for row, pads in enumerate(PADS):
        begin = torch.cat([ids[row, pads:], ids.new_tensor([bot])])
        z, prompt = embed(ids.new_full((1, 4), token)), embed(begin)[None]

        def run(z, prompt=prompt, **more):
            return backbone(inputs_embeds=torch.cat([prompt, z], 1), use_cache=False).last_hidden_state

        if iterations is None:
            z = z[:, :0]
            for _ in range(4):
                z = torch.cat([z, project_latent(backbone, run(z)[:, -1:])], 1)
        for _ in range(iterations or 0):
            z = project_latent(backbone, run(z)[:, len(begin) - 1 : -1])
        assert (state.latents[row] - z[0]).abs().max() <= 1e-4
        alone = net(inputs_embeds=torch.cat([prompt, z, embed(ids.new_tensor([[eot]]))], 1), use_cache=False).logits
        assert (answer[row] - alone[0, -1]).abs().max() <= 1e-4


@torch.no_grad()
def hrpo(family):
    """Log-probs of a padded, cached decode are those of one forward over each row with the states of the decode."""
    net = attach_thinking(families.model(family))
    tiny.loud_gates(backbone_of(net))
    ids, mask = questions()
    out, trace = hybrid_generate(
        net,
        ids,
        DelimiterMatcher(tiny.tokenizer(), "##"),
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_trace=True,
        keep=("thinking_states", "log_probs"),
    )
    assert trace.thinking_mask.any()
    for row, pads in enumerate(PADS):
        text = out[row : row + 1, pads:]
        logits = net(
            input_ids=text,
            thinking_mask=trace.thinking_mask[row : row + 1],
            thinking_embeds=trace.thinking_states[row : row + 1],
            use_cache=False,
        ).logits[:, -9:-1]
        found = logits.log_softmax(-1).gather(-1, text[:, -8:, None])[0, :, 0]
        assert (found - trace.log_probs[row]).abs().max() <= 1e-4, row


def compressed(family):
    """Never more than budget and buffer, each row as alone; below the budget the plain cache."""
    net = families.model(family)
    ids, mask = questions()

    def decode(cache, ids, mask):
        return net.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            past_key_values=cache,
        )[:, ids.shape[1] :]

    scoring = KVScoring("rkv", window=4)
    assert torch.equal(decode(None, ids, mask), decode(CompressedCache(net, 50, 50, scoring), ids, mask))
    cache = CompressedCache(net, 8, 6, scoring)
    out = decode(cache, ids, mask)
    assert all(layer.keys.shape[2] < 14 for layer in cache.layers)
    for row, pads in enumerate(PADS):
        alone = decode(CompressedCache(net, 8, 6, scoring), ids[row : row + 1, pads:], mask[row : row + 1, pads:])
        assert torch.equal(alone[0], out[row])


@torch.no_grad()
def concepts(family):
    """Padded and token by token: the same states as each row alone at once; codewords are as large as layer 0's inputs."""
    net = attach_concepts(families.model(family), OnlineConceptConfig(1, 2, 1, num_concepts=8, max_tail=4)).eval()
    backbone, (ids, mask) = backbone_of(net), questions()
    batch = backbone(ids, attention_mask=mask, use_cache=False).last_hidden_state
    start = backbone(ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
    steps, cache = [], start.past_key_values
    for t in range(12, 16):
        steps.append(
            backbone(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).last_hidden_state
        )
    assert (torch.cat(steps, 1) - batch[:, 12:]).abs().max() <= 1e-4
    for row, pads in enumerate(PADS):
        alone = backbone(ids[row : row + 1, pads:], use_cache=False).last_hidden_state
        assert (alone[0] - batch[row, pads:]).abs().max() <= 1e-4


@torch.no_grad()
def planner(family):
    """What comes late in a text still depends on its plan; rows are as alone; plans are as alone."""
    types = [{"name": "a", "num_concepts": 5, "quota": 3}, {"name": "b", "num_concepts": 4, "quota": 2}]
    net = attach_planner(families.model(family), PlannerConfig(types)).eval()
    ids, mask = questions()
    plans = plan(net, ids, mask)
    for row, pads in enumerate(PADS):
        assert torch.equal(plan(net, ids[row : row + 1, pads:], mask[row : row + 1, pads:])[0], plans[row])
    text, valid = ids.flip(1), mask.flip(1)
    nll = text_nll(net, executor_prefix(net, plans), text, valid)
    none = text_nll(net, executor_prefix(net, torch.full_like(plans, -1)), text, valid)
    assert (plans >= 0).any() and (nll - none)[0, 15].abs() > 1e-6
    for row, pads in enumerate(PADS):
        one = slice(row, row + 1)
        alone = text_nll(net, executor_prefix(net, plans[one]), text[one, : 16 - pads])
        assert (alone[0] - nll[row, : 16 - pads]).abs().max() <= 1e-4


METHODS = {
    "hrpo": hrpo,
    "latent, sequential": lambda family: latent(family, None),
    "latent, jacobi": lambda family: latent(family, 3),
    "compressed cache": compressed,
    "concepts": concepts,
    "planner": planner,
}
WHOLE = "every layer to see the whole text"
STATES = "needs keys and values of every token in every layer"
SDPA, SPLIT, SEEN = "attn_implementation='eager'", "not built like llama", "no attention is observed in layers 0 to 3"
REFUSED = {
    "gpt2": {"concepts": SPLIT},
    "gpt_neox": {"concepts": SPLIT},
    "opt": {"concepts": SPLIT},
    "bloom": {"compressed cache": SDPA, "concepts": SDPA, "planner": "cannot plan"},
    "falcon": {"compressed cache": SEEN, "concepts": SPLIT},
    "deepseek_v3": {"compressed cache": "MLA"},
}
for name in families.CONFIGS:
    if "window" in name or "chunks" in name:
        REFUSED[name] = dict.fromkeys(("compressed cache", "concepts", "planner"), WHOLE)
for name in ("mamba", "rwkv", "qwen3_next", "jamba", "falcon_h1"):
    REFUSED[name] = dict.fromkeys([*METHODS][1:], STATES)
# In every run; the others are slow ones
QUICK = (
    ("gemma", "concepts"),
    ("granite", "concepts"),
    ("gemma", "planner"),
    ("mistral, window", "latent, jacobi"),
    ("gemma2, window", "latent, jacobi"),
    ("llama4, chunks", "latent, sequential"),
    ("gemma2, window", "hrpo"),
)
PAIRS = [
    pytest.param(family, method, marks=() if (family, method) in QUICK else pytest.mark.slow)
    for family in families.CONFIGS
    for method in METHODS
    if method not in REFUSED.get(family, ()) and (family, method) not in families.UNDECIDED
]


@pytest.mark.parametrize("family, method", PAIRS)
def test_it_works_as_the_plain_reference_says(family, method):
    """States and log-probs to 1e-4 (fp32), tokens and plans exactly."""
    METHODS[method](family)


@pytest.mark.parametrize("family", REFUSED)
def test_it_is_refused_by_name_and_nothing_has_changed(family):
    for method, message in REFUSED[family].items():
        with pytest.raises(ValueError, match=message):
            METHODS[method](family)


def test_a_batch_of_a_model_whose_rows_share_a_state_is_refused(tmp_path):
    """Its row alone is right, as the table says; another recurrent model's batch is."""
    net = attach_thinking(families.model("rwkv"))
    tiny.loud_gates(backbone_of(net))
    ids, matcher = questions()[0], DelimiterMatcher(tiny.tokenizer(), "##")
    ways = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="RwkvForCausalLM decodes a batch differently from its rows"):
        hybrid_generate(net, ids[:2], matcher, **ways)
    out, trace = hybrid_generate(
        net, ids[:1], matcher, return_trace=True, keep=("thinking_states", "log_probs"), **ways
    )
    logits = net(
        input_ids=out, thinking_mask=trace.thinking_mask, thinking_embeds=trace.thinking_states, use_cache=False
    ).logits[:, -9:-1]
    found = logits.log_softmax(-1).gather(-1, out[:, -8:, None])[..., 0]
    assert (found - trace.log_probs).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="and train another family"):
        setups.hrpo(tmp_path, peft=False, model=families.model("rwkv"))
    pads = transformers.RecurrentGemmaConfig(**families.SMALL, attention_window_size=64)
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM decodes a batch differently from"):
        check_batches(tiny.from_config(pads, std=0.1).eval())
    for dtype in (torch.float32, torch.bfloat16):
        check_batches(families.model("mamba", dtype=dtype))


def test_the_page_has_this_table():
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    for family in families.CONFIGS:
        row = next(line for line in page.splitlines() if line.startswith(f"| {family} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:7]
        wanted = ["no" if method in REFUSED.get(family, ()) else "yes" for method in METHODS]
        for method, cell, want in zip(METHODS, cells, wanted, strict=True):
            assert cell == want or (family, method) in families.UNDECIDED, (family, method)


@pytest.mark.parametrize("family", ["mistral, window", "gemma2, window", "qwen2, window", "gpt_neox"])
def test_the_remedy_that_a_refusal_names_changes_nothing_within_the_window(family):
    """Exact. A window as long as what is read is none; beyond it texts are refused by their length."""
    net = families.model(family)
    check_layers(net, "a plan", longest=families.WINDOW)
    if family == "gpt_neox":
        return check_layers(net, "a plan")
    with pytest.raises(ValueError, match=r"load the model with sliding_window=256, which changes nothing .* up to 8"):
        check_layers(net, "a plan")
    wide = families.model(family, sliding_window=256)
    ids = questions()[0][:1]
    assert torch.equal(net(ids[:, :8]).logits, wide(ids[:, :8]).logits)
    assert not torch.equal(net(ids).logits, wide(ids).logits)
    attach_planner(families.model(family, sliding_window=256))
    wide, concepts = (
        families.model(family, sliding_window=256),
        OnlineConceptConfig(1, 2, 1, num_concepts=8, max_tail=4),
    )
    if not wide._supports_sdpa:  # Gemma2 since transformers 5.24: SDPA cannot cap scores
        with pytest.raises(ValueError, match="works only with 'sdpa'"):
            attach_concepts(wide, concepts)
        return
    net = attach_concepts(wide, concepts).eval()
    with pytest.raises(ValueError, match="257 tokens: the model has sliding-window attention over 256 tokens"):
        net(torch.ones(1, 257, dtype=torch.long))


def test_layers_of_a_configuration_inside_another():
    """As in models that also see: the text's part decides, wrapped or not."""
    net = families.model("gemma3, window")
    kinds = layer_kinds(net)
    assert kinds == [LayerKind(SLIDING, 8, "sliding_window")] * 4
    outer = type("Outer", (), {"get_text_config": lambda self, decoder=True: net.config})()
    backbone_of(net).config = outer
    assert layer_kinds(net) == kinds


def test_what_a_decoder_does_before_its_layers_is_not_dropped():
    """A multiplier goes into embeddings and codewords (exact); a norm there, or one layer run twice, is refused by name."""
    for family, scale in (("granite", 6.0), ("gemma", 32**0.5), ("llama", 1.0)):
        net = families.model(family)
        plain = net(*questions()[:1], output_hidden_states=True, use_cache=False).hidden_states[1]
        size = net.get_input_embeddings().weight.square().mean().sqrt() * scale  # as the first layer reads it
        torch.manual_seed(0)
        config = OnlineConceptConfig(1, 2, 1, num_concepts=500, max_tail=4)
        backbone = backbone_of(attach_concepts(net, config).eval())
        shallow = backbone(questions()[0], use_cache=False).shallow
        assert (shallow - plain).abs().max() <= 1e-5 * scale
        assert abs(backbone.concept_embedding.weight.std() / size - 1) < 0.05
    net = families.model("llama")
    backbone = backbone_of(net)
    plain = type(backbone).forward

    class Normed(type(backbone)):
        def forward(self, input_ids=None, inputs_embeds=None, **others):
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            return plain(self, inputs_embeds=torch.nn.functional.layer_norm(embeds, embeds.shape[-1:]), **others)

    class Twice(type(backbone)):
        def forward(self, **others):
            out = plain(self, **others)
            out.last_hidden_state = 2 * out.last_hidden_state
            return out

    for other, message in ((Normed, "before its first layer"), (Twice, "do not give the decoder's result")):
        backbone.__class__ = other
        with pytest.raises(ValueError, match=message):
            attach_concepts(net, OnlineConceptConfig(1, 2, 1, num_concepts=8))
        assert not hasattr(backbone, "concept_head")


@pytest.mark.parametrize("family, weight", [("gemma", 0.0), ("gemma", 1.5), ("llama", 2.5), ("gpt2", 0.5)])
def test_first_logits_know_what_the_last_norm_makes(family, weight):
    """Gemma's norm multiplies with 1 + w, 0 at first; a planner's first logits have a standard deviation of 3, to 10%."""
    net = families.model(family, std=0.02)
    norm = next(m for name, m in backbone_of(net).named_modules() if name in ("norm", "ln_f"))
    with torch.no_grad():
        norm.weight.fill_(weight)
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()
    net = attach_planner(net, PlannerConfig([{"name": "a", "num_concepts": 500, "quota": 3}])).eval()
    states = backbone_of(net)(questions()[0]).last_hidden_state.detach()
    head = backbone_of(net).unified_head
    assert abs(head(states, 0).std() / 3 - 1) < 0.1
    tokens = backbone_of(net).get_input_embeddings()(torch.arange(49))
    assert abs(head.table[1:5].std() / tokens.std() - 1) < 0.3, "new rows are read as large as tokens"


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_concepts_read_in_chunks_are_those_read_at_once_and_pads_stay_pads(chunk):
    """A left-padded batch whose first chunk is all padding for some rows. Tokens exactly."""
    net = attach_concepts(families.model("qwen3"), OnlineConceptConfig(1, 2, 1, num_concepts=8, max_tail=4)).eval()
    ids, mask = questions()
    ways = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    once = net.generate(ids, attention_mask=mask, **ways)
    assert torch.equal(once, net.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **ways))
