"""The latent phase against the official code (golden tensors), and what must hold whatever the weights."""

import pytest
import torch
import transformers

from tests import tiny
from tests.golden.load import load, model_of
from unsloth_ext import backbone_of
from unsloth_ext.latent.config import LatentConfig, attach_latent
from unsloth_ext.latent.phase import branch, latent_phase, prefill


FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(family="qwen3", **settings):
    model, tokenizer = tiny.model(family, std=0.1), tiny.tokenizer()  # louder ones amplify fp32's rounding
    torch.manual_seed(1)
    settings = {"num_latents": 5, "iterations": 3, "projection_dim": 16, **settings}
    attach_latent(model, tokenizer, LatentConfig(**settings))
    return model.eval()


def questions(pad=0):
    """Left-padded by 0, 3 and 5 tokens."""
    ids = torch.randint(3, 40, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 3, 5)):
        ids[row, :count], mask[row, :count] = pad, 0
    return ids, mask


def set_up(model, case, **settings):
    """Latent tokens of an official run: its ids stand in its inputs."""
    question, latents, _ = case["in.key_indices"].tolist()
    ids = case["in.input_ids"][0]
    backbone = backbone_of(model)
    backbone.latent_config = LatentConfig(**settings)
    backbone.latent_token_ids = (int(ids[question - 1]), int(ids[question]), int(ids[latents]))
    return case["in.input_ids"][:, : question - 1], case["in.attention_mask"][:, : question - 1]


@pytest.mark.parametrize("name", ["pccot_gpt2_T3_c5_eq", "pccot_gpt2_T5_c5_eq_sequential", "pccot_llama_T3_c5_eq"])
def test_pccot_is_the_official_code(name):
    """KV and latent inputs to 1e-5 (fp32). The official code lets latents attend left pads, and counts pads as positions on
    Llama: there only the row without pads can be compared."""
    case, config = load(name)
    model = model_of(case, config["kind"])
    ids, mask = set_up(model, case, num_latents=config["c"], iterations=config["T"])
    state = latent_phase(model, ids, mask, attend_pads=True)
    rows = torch.arange(3) if config["kind"] == "gpt2" else mask.all(-1).nonzero().flatten()
    assert len(rows)
    kv = torch.stack([torch.stack(layer) for layer in state.latent_kv()])
    assert (kv - case["mid.latent_kv"])[:, :, rows].abs().max() <= 1e-5
    assert (state.latents - case["mid.latent_inputs"][-1])[rows].abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_t_equal_to_m_is_sequential_and_more_changes_nothing(family):
    """KV and latent inputs to 1e-5 (fp32); T = 1 differs by more than 0.01, so the iterations matter."""
    ids, mask = questions()
    model = make(family)

    def run(iterations):
        backbone_of(model).latent_config = LatentConfig(5, iterations, 16)
        with torch.no_grad():
            state = latent_phase(model, ids, mask)
        return state, torch.stack([torch.stack(layer) for layer in state.latent_kv()])

    (sequential, wanted), (jacobi, same), (_, more), (_, early) = (run(t) for t in (None, 5, 8, 1))
    assert (same - wanted).abs().max() <= 1e-5 and (more - wanted).abs().max() <= 1e-5
    assert (jacobi.latents - sequential.latents).abs().max() <= 1e-5
    assert (early - wanted).abs().max() > 0.01
    assert (sequential.num_forwards, jacobi.num_forwards) == (6, 6)


@pytest.mark.parametrize("iterations", [None, 0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_single_and_pad_values_never_matter(family, iterations):
    """Next-token logits after the latent tokens, to 1e-5 (fp32)."""
    model = make(family, iterations=iterations)

    def logits(ids, mask):
        state = latent_phase(model, ids, mask)
        end = ids.new_full((len(ids), 1), backbone_of(model).latent_token_ids[2])
        full = torch.cat([state.attention_mask, torch.ones_like(end)], dim=1)
        return model(
            input_ids=end,
            attention_mask=full,
            position_ids=full.cumsum(-1)[:, -1:] - 1,
            past_key_values=state.cache,
        ).logits

    with torch.no_grad():
        together = logits(*questions())
        assert torch.equal(together, logits(*questions(pad=17)))
        ids, mask = questions()
        for row in range(3):
            real = mask[row].bool()
            alone = logits(ids[row : row + 1, real], mask[row : row + 1, real])
            assert (together[row] - alone[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("iterations", [None, 0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cache_of_the_question_it_is_the_same(family, iterations):
    """KV and latents to 1e-5 (fp32), and two branches of one cache do not see each other."""
    model = make(family, iterations=iterations)
    ids, mask = questions()
    with torch.no_grad():
        whole = latent_phase(model, ids, mask)
        shared = prefill(model, ids[:, :-1], mask[:, :-1])
        for _ in range(2):
            state = latent_phase(model, ids, mask, past_key_values=branch(shared))
            assert shared.get_seq_length() == ids.shape[1] - 1
            assert (state.latents - whole.latents).abs().max() <= 1e-5
            for ours, theirs in zip(state.latent_kv(), whole.latent_kv(), strict=True):
                assert all((a - b).abs().max() <= 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_t_0_is_pause_tokens():
    """The cache is that of one plain forward over question, <bot> and M times <latent>, exactly."""
    model = make(iterations=0)
    ids, mask = questions()
    bot, latent, _ = backbone_of(model).latent_token_ids
    full = torch.cat([ids, ids.new_tensor([[bot] + [latent] * 5]).expand(3, -1)], dim=1)
    mask_full = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    with torch.no_grad():
        plain = model(
            input_ids=full,
            attention_mask=mask_full,
            position_ids=(mask_full.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
        ).past_key_values
        ours = latent_phase(model, ids, mask)
    assert ours.num_forwards == 1
    for a, b in zip(plain.layers, ours.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("iterations", [None, 4])
def test_gradients_pass_through_every_iteration(iterations):
    """Of a function of the last latent's KV, with respect to the question's embeddings and the projection: by finite
    differences, fp64, relative 1e-6. GPT-2, because RMSNorm computes in fp32."""
    model = make("gpt2", num_latents=4, iterations=iterations).double()
    ids, mask = questions()
    backbone = backbone_of(model)
    weight = backbone.latent_projection[1].weight
    embedding = model.get_input_embeddings().weight

    def value():
        keys, values = latent_phase(model, ids, mask).latent_kv()[-1]
        return (keys[:, :, -1] * values[:, :, -1].flip(-1)).sum()

    value().backward()
    torch.manual_seed(4)
    for parameter, row in ((weight, 3), (embedding, int(ids[0, 0])), (embedding, backbone.latent_token_ids[0])):
        direction = torch.zeros_like(parameter)
        direction[row] = torch.randn(parameter.shape[1], dtype=torch.float64)
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = value()
            parameter -= 2e-6 * direction
            below = value()
            parameter += 1e-6 * direction
        assert slope.abs() > 1e-3
        assert abs((above - below) / 2e-6 - slope) <= 1e-6 * max(1, slope.abs())


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_notes_variants(iterations):
    """`own` and `feedback_residual` against a loop that re-encodes the whole sequence each time, to 1e-5 (fp32)."""
    model = make(iterations=iterations, update="own", feedback_residual=True)
    ids, mask = questions()
    ids, mask = ids[:1], mask[:1]
    backbone = backbone_of(model)
    bot, latent, _ = backbone.latent_token_ids
    embed = backbone.get_input_embeddings()
    with torch.no_grad():
        front = embed(torch.cat([ids, ids.new_tensor([[bot]])], dim=1))
        z = embed(ids.new_full((1, 5), latent))
        for _ in range(iterations):
            hidden = backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state[:, -5:]
            z = z + backbone.latent_projection(hidden)
        ours = latent_phase(model, ids, mask)
    assert (ours.latents - z).abs().max() <= 1e-5


def test_interventions_reach_every_pass():
    ids, mask = questions()
    for iterations in (None, 0, 3):
        model, seen = make(iterations=iterations), []

        def zero(z, seen=seen):
            seen.append(z.shape[1])
            return torch.zeros_like(z)

        state = latent_phase(model, ids, mask, intervene=zero)
        assert (state.latents == 0).all()
        assert seen == {None: [1] * 5, 0: [5], 3: [5] * 3}[iterations]


def test_what_cannot_work_is_refused():
    model = make().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing is on"):
        latent_phase(model, *questions())
    with pytest.raises(ValueError, match="already has the latent tokens"):
        attach_latent(model, tiny.tokenizer())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_latents": 0}, "num_latents=0"),
        ({"iterations": -1}, "iterations=-1"),
        ({"projection_dim": 0}, "projection_dim=0"),
        ({"projection_dropout": 1.0}, "projection_dropout=1.0"),
        ({"update": "both"}, "update='both'"),
        ({"update": "own", "iterations": None}, "need Jacobi iterations"),
        ({"bot_token": "<eot>"}, "must differ"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        LatentConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        transformers.RobertaConfig(is_decoder=True, **BERT),  # positions out of ids
        transformers.ElectraConfig(is_decoder=True, **BERT),  # embeddings of 128
        transformers.OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4),  # drops the cache
        transformers.CTRLConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, dff=64),  # scales its input in place
    ],
    ids=lambda config: config.model_type,
)
def test_decoders_that_do_not_go_on_from_a_padded_cache_are_refused(config):
    net, tokenizer = tiny.from_config(config, std=0.1).eval(), tiny.tokenizer()
    size = len(tokenizer)
    with pytest.raises(ValueError, match="cannot think in latent tokens: with a padded question"):
        attach_latent(net, tokenizer)
    assert len(tokenizer) == size and not hasattr(net.base_model, "latent_config")
