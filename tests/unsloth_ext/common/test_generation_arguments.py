"""Every argument of `generate` with every kind of model: as the plain way would have it, or refused by name.

The plain way is `generate` itself where a state can be made to say nothing (hybrid: a gate that is shut; latent: the
embedding of <latent>), decoding without a cache (concept), and a loop over whole texts (planner).
"""

import inspect
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from tests import tiny
from tests.marks import slow
from tests.unsloth_ext.concept import test_forward as concepts
from tests.unsloth_ext.latent import test_phase as latents
from tests.unsloth_ext.planner import setups as planners
from unsloth_ext import (
    ConceptModel,
    DelimiterMatcher,
    LatentModel,
    PlannerExecutorModel,
    attach_thinking,
    backbone_of,
    execute_plan,
    executor_forward,
    executor_prefix,
    hybrid_generate,
    latent_generate,
)
from unsloth_ext.common import generation_arguments as arguments
from unsloth_ext.common.generation_arguments import REFUSED, REFUSED_PARAMETERS, WITHOUT_EFFECT, WORKS


COMMON = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 1, "do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 1.5}
BEAMS = {"num_beams": 3}
DICT = {"return_dict_in_generate": True}
# Values that change something. One of several keywords belongs to the name, the others let it act
EXAMPLES = {
    "max_length": {"max_new_tokens": None, "max_length": 24},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 30, "eos_token_id": list(range(1, 60))},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(1, 60))},
    "max_time": {"max_time": 0.0},
    "stop_strings": {"stop_strings": list(tiny.CHARS), "tokenizer": tiny.tokenizer()},
    "do_sample": SAMPLED,
    "temperature": {**SAMPLED, "temperature": 0.5},
    "top_k": {**SAMPLED, "top_k": 3},
    "top_p": {**SAMPLED, "top_p": 0.3},
    "min_p": {**SAMPLED, "min_p": 0.5},
    "top_h": {**SAMPLED, "top_h": 0.3},
    "typical_p": {**SAMPLED, "typical_p": 0.2},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.2},
    "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.5},
    "renormalize_logits": {**SAMPLED, **DICT, "output_scores": True, "renormalize_logits": True},
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 3},
    "early_stopping": {**BEAMS, "early_stopping": True},
    "length_penalty": {**BEAMS, "length_penalty": -2.0, "eos_token_id": list(range(1, 20))},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(3, 50)]},
    "sequence_bias": {"sequence_bias": [[[7], 50.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 9.0)},
    "suppress_tokens": {"suppress_tokens": list(range(3, 50))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 63))},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "remove_invalid_values": {"remove_invalid_values": True},
    "watermarking_config": {"watermarking_config": {"bias": 30.0, "context_width": 1}},
    "output_scores": {**DICT, "output_scores": True},
    "output_logits": {**DICT, "output_logits": True},
    "return_dict_in_generate": DICT,
    "pad_token_id": {"pad_token_id": 5, "eos_token_id": list(range(1, 40))},
    "bos_token_id": {"bos_token_id": 4},
    "eos_token_id": {"eos_token_id": list(range(1, 40))},
    "disable_compile": {"disable_compile": True},
    "compile_config": {"compile_config": transformers.CompileConfig()},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "num_beams": BEAMS,
    "output_attentions": {**DICT, "output_attentions": True},  # SDPA has none
    "output_hidden_states": {**DICT, "output_hidden_states": True},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 20.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
}
FORBIDDEN = {  # what is refused and has no example above
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "cache_config": {"nbits": 4},
    "guidance_scale": 1.5,
    "token_healing": True,
}
ABSENT = {name: getattr(GenerationConfig(), name) for name in WITHOUT_EFFECT} | {
    "num_assistant_tokens": 7,
    "target_lookbehind": 3,
    "decoder_start_token_id": 4,
    "diversity_penalty": 0.5,
    "low_memory": True,
}
# Nothing to see in what comes out: of encoder-decoders, of compilation, of a prompt that is there
SILENT = {"bos_token_id", "disable_compile", "compile_config", "remove_invalid_values", "forced_bos_token_id"}
SILENT |= {"use_cache", "cache_implementation", "prefill_chunk_size", "encoder_no_repeat_ngram_size"}


class Hybrid:
    def __init__(self):
        self.net = attach_thinking(tiny.model("qwen3", dtype=torch.float64)).double()
        backbone = backbone_of(self.net)
        with torch.no_grad():
            backbone.thinking_residual_Lambda.Lambda.fill_(200.0)
            backbone.thinking_residual_gate_i.weight.zero_()
            backbone.thinking_residual_gate_i.bias.fill_(-1e4)
        self.ids, self.mask = latents.questions()
        self.matcher = DelimiterMatcher(tiny.tokenizer(), "#")

    def ours(self, **kwargs):
        return hybrid_generate(self.net, self.ids, self.matcher, attention_mask=self.mask, **kwargs)

    def plain(self, **kwargs):
        return self.net.generate(input_ids=self.ids, attention_mask=self.mask, **kwargs)


class Latent:
    def __init__(self):
        self.net = latents.make().double()
        self.ids, self.mask = latents.questions()
        backbone = backbone_of(self.net)
        bot, latent, eot = backbone.latent_token_ids
        nothing = backbone.get_input_embeddings()(torch.tensor(latent)).detach()
        self.intervene = lambda z: nothing.expand_as(z)
        self.thought = torch.tensor([[bot, *[latent] * 5, eot]]).expand(3, -1)

    def ours(self, **kwargs):
        return latent_generate(self.net, self.ids, self.mask, intervene=self.intervene, **kwargs)

    def plain(self, **kwargs):
        ids, mask = (torch.cat([a, b], dim=1) for a, b in ((self.ids, self.thought), (self.mask, self.thought != 0)))
        return self.net.generate(input_ids=ids, attention_mask=mask, **kwargs)


class Concept:
    def __init__(self):
        self.net = concepts.model("qwen3", (1, 1, 1), segmenter="fixed", stride=3)
        self.model = ConceptModel(self.net, tiny.tokenizer())
        self.ids, self.mask = latents.questions()
        self.model.tokenizer = Ids(self.ids, self.mask)

    def ours(self, **kwargs):
        return self.model.generate(["a", "b", "c"], **DICT | kwargs)

    def plain(self, **kwargs):
        return self.net.generate(input_ids=self.ids, attention_mask=self.mask, **DICT | kwargs | {"use_cache": False})


class Ids:
    """A tokenizer whose texts are these rows."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, ids, mask):
        self.rows = [row[real.bool()].tolist() for row, real in zip(ids, mask)]

    def __call__(self, texts):
        return {"input_ids": self.rows[: len(texts)]}


class Planner:
    def __init__(self):
        self.net, self.plans = planners.model(), planners.plans()

    def ours(self, **kwargs):
        return execute_plan(self.net, self.plans, **kwargs)

    def plain(self, tokenizer=None, **kwargs):
        """Whole texts again for every token, with transformers' own processors and criteria."""
        config, _ = self.net._prepare_generation_config(None, **kwargs)
        plans = self.plans.repeat_interleave(config.num_return_sequences or 1, dim=0)
        prefix = executor_prefix(self.net, plans)
        self.net._prepare_special_tokens(config, True, device="cpu", batch_size=len(plans))
        if config.max_new_tokens is None:  # the prompt of embeddings counts
            config.max_length -= prefix.mask.shape[1]
        else:
            config.max_length = config.max_new_tokens
        if config.min_length:
            config.min_length = max(config.min_length - prefix.mask.shape[1], 0)
        if config.min_new_tokens:
            config.min_length = config.min_new_tokens
        processors = self.net._get_logits_processor(config, 0, prefix.embeds, device="cpu", model_kwargs={})
        criteria = self.net._get_stopping_criteria(config, [], tokenizer)
        ids, going, logits, scores = plans.new_zeros(len(plans), 0), plans.new_ones(len(plans)), (), ()
        while going.any():
            text = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)  # its last token is not read
            hidden = executor_forward(self.net, prefix, text)[:, -1]
            logits += (self.net.get_output_embeddings()(hidden).float(),)
            scores += (processors(ids, logits[-1].clone()),)
            chosen = scores[-1].softmax(-1).multinomial(1)[:, 0] if config.do_sample else scores[-1].argmax(-1)
            chosen = chosen * going + config._pad_token_tensor * (1 - going)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            going = going & ~criteria(ids, None)
        if not config.return_dict_in_generate:
            return ids
        return transformers.generation.GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=scores if config.output_scores else None,
            logits=logits if config.output_logits else None,
        )


PLAIN = {"concept": Concept, "hrpo": Hybrid, "latent": Latent, "planner": Planner}
KINDS = list(PLAIN)  # a method that is added compares its decoding in its own tests
MADE = {}


def kind_of(kind):
    if kind not in MADE:
        MADE[kind] = PLAIN[kind]()
    return MADE[kind]


@torch.no_grad()
def run(function, kwargs):
    torch.manual_seed(0)
    return function(**{**COMMON, **kwargs})


def tensors(out):
    """Name to tensors, of a `ModelOutput` or ids."""
    if isinstance(out, torch.Tensor):
        return {"sequences": [out]}
    flat = {}
    for name in ("sequences", "scores", "logits"):
        value = getattr(out, name, None)
        if value is not None:
            flat[name] = [value] if isinstance(value, torch.Tensor) else list(value)
    if getattr(out, "hidden_states", None):
        flat["hidden_states"] = [step[-1][:, -1] for step in out.hidden_states]  # of the last layer and token
    return flat


def same(ours, plain):
    ours, plain = tensors(ours), tensors(plain)
    assert plain.keys() <= ours.keys()
    for name, wanted in plain.items():
        assert len(ours[name]) == len(wanted), name
        for a, b in zip(ours[name], wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def works(kind):
    names = (WORKS | WITHOUT_EFFECT | REFUSED.keys()) - {n for n, r in REFUSED.items() if r.concerns(n, kind)}
    return sorted(names)


@pytest.mark.parametrize("kind", [slow(k) if k == "concept" else k for k in KINDS])
def test_what_works_is_the_plain_way(kind):
    """Tokens equal, scores and logits to 1e-4 (fp32 in `generate`); and each example changes something in the plain way."""
    one = kind_of(kind)
    base = {name: run(one.plain, start) for name, start in (("greedy", {}), ("sampled", SAMPLED))}
    unseen = []
    for name in works(kind):
        kwargs = EXAMPLES.get(name, {name: ABSENT.get(name)})
        if "num_beams" in kwargs and REFUSED["num_beams"].concerns("num_beams", kind):
            kwargs = {name: kwargs[name]}  # without effect, as in `generate` without beams
        if kind == "planner" and "num_beams" in kwargs:
            continue  # `test_several_texts_and_beams_for_a_plan`
        plain = run(one.plain, kwargs)
        same(run(one.ours, kwargs), plain)
        if name in SILENT | WITHOUT_EFFECT or ("num_beams" in EXAMPLES[name] and "num_beams" not in kwargs):
            continue
        before = base["sampled" if kwargs.get("do_sample") and name != "do_sample" else "greedy"]
        a, b = tensors(before), tensors(plain)
        changed = a.keys() != b.keys() or "return_dict_in_generate" in kwargs
        changed |= any(x.shape != y.shape or not torch.equal(x, y) for n in a for x, y in zip(a[n], b[n]))
        if not changed:
            unseen.append(name)
    assert not unseen


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_work_is_refused_by_name(kind):
    """Beside the prompt, inside a `generation_config`, and inside the model's own."""
    one = kind_of(kind)
    refused = [name for name, refusal in REFUSED.items() if refusal.concerns(name, kind)]
    for name in refused:
        value = FORBIDDEN[name] if name in FORBIDDEN else EXAMPLES[name][name]
        with pytest.raises(ValueError, match=f"{name}="):
            run(one.ours, {name: value})
        settings = GenerationConfig(**COMMON)
        setattr(settings, name, value)
        with pytest.raises(ValueError, match=f"{name}="):
            one.ours(generation_config=settings)
    name = refused[-1]
    before = getattr(one.net.generation_config, name)
    setattr(one.net.generation_config, name, FORBIDDEN[name] if name in FORBIDDEN else EXAMPLES[name][name])
    try:
        with pytest.raises(ValueError, match=f"{name}="):
            run(one.ours, {})
    finally:
        setattr(one.net.generation_config, name, before)
    for name, refusal in REFUSED_PARAMETERS.items():
        if refusal.concerns(name, kind):
            with pytest.raises(ValueError, match=f"^{name}:"):
                run(one.ours, {name: torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"cache_implementation"):
        run(one.ours, {"cache_implementation": "paged"})
    with pytest.raises(ValueError, match="num_return_sequences"):
        run(one.ours, {"num_return_sequences": 2})  # greedy


def test_a_configuration_alone_is_no_mixture(monkeypatch):
    """transformers says that keywords beside a configuration are deprecated: latent decoding adds none."""
    said = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", lambda *text: said.extend(text))
    latent_generate(kind_of("latent").net, torch.tensor([[5, 6, 7]]), generation_config=GenerationConfig(**COMMON))
    assert not [text for text in said if "generation-related arguments" in text]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_grows_may_be_called_by_its_name(kind):
    """It is the one that each kind has; `generate` refuses the name beside a cache."""
    one = kind_of(kind)
    wanted = run(one.ours, {})
    same(run(one.ours, {"cache_implementation": "dynamic"}), wanted)
    same(one.ours(generation_config=GenerationConfig(**COMMON, cache_implementation="dynamic")), wanted)
    one.net.generation_config.cache_implementation = "dynamic"  # of its generation_config.json
    try:
        same(run(one.ours, {}), wanted)
    finally:
        one.net.generation_config.cache_implementation = None


class Streamed:
    """What a streamer is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("kind", KINDS)
def test_processors_criteria_and_streamers_are_the_loops_own(kind):
    """Each of `generate`'s parameters beside the generation config does what it is for."""
    one = kind_of(kind)

    def new(**kwargs):
        out = run(one.ours, kwargs | {"max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True})
        return out.sequences[:, -4:].tolist()

    def force(input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(7), 0.0)

    rows = len(new())
    assert new(logits_processor=LogitsProcessorList([force])) == [[7] * 4] * rows
    assert new(prefix_allowed_tokens_fn=lambda _, ids: [9]) == [[9] * 4] * rows
    calls = []

    def stop(input_ids, scores, **_):
        calls.append(input_ids.shape[1])
        return torch.full((len(input_ids),), len(calls) == 2)

    run(one.ours, {"stopping_criteria": StoppingCriteriaList([stop])})
    assert len(calls) == 2
    streamer = Streamed()
    wanted = new()
    assert new(streamer=streamer, synced_gpus=False) == wanted and streamer.ended
    assert [list(row) for row in zip(*streamer.tokens[1:])] == wanted  # the prompt comes first


def test_every_field_and_parameter_is_decided_on():
    """A field or parameter that transformers adds, or drops, fails here: decide, and give it an example."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    decided = [WORKS, WITHOUT_EFFECT, set(REFUSED)]
    assert set().union(*decided) == fields and sum(map(len, decided)) == len(fields)
    given = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    assert given <= arguments.PARAMETERS_THAT_WORK | REFUSED_PARAMETERS.keys()
    assert WORKS | REFUSED.keys() == EXAMPLES.keys() | FORBIDDEN.keys()


def test_the_docs_have_the_table():
    assert arguments.table() in Path(__file__).parents[3].joinpath("docs", "generation.md").read_text()


@pytest.mark.parametrize("kind", ["latent", "concept", "planner"])
def test_texts_come_in_lists_where_several_are_asked_for(kind):
    tok = tiny.tokenizer()
    net = {"latent": latents.make, "planner": planners.model}.get(kind, lambda: concepts.model("qwen3"))()
    made = {"latent": LatentModel, "concept": ConceptModel, "planner": PlannerExecutorModel}[kind](net, tok)
    several = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, "eos_token_id": None}
    torch.manual_seed(0)
    found = made.generate(["1+2=", "7="], **several)
    assert [len(texts) for texts in found] == [3, 3] and all(isinstance(text, str) for texts in found for text in texts)
    torch.manual_seed(0)
    inside = made.generate(["1+2=", "7="], generation_config=GenerationConfig(**several))
    assert inside == found
    torch.manual_seed(0)
    assert len(made.generate("1+2=", **several)) == 3
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    out = made.generate("1+2=", **settings, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 4 and tok.decode(out.sequences[0, -4:], True) == made.generate("1+2=", **settings)
    text = made.generate("1+2=", **settings)
    stop = text[0]
    assert made.generate("1+2=", **settings, stop_strings=stop) == stop  # with the model's own tokenizer
    assert made.generate("1+2=", generation_config=GenerationConfig(**settings, stop_strings=stop)) == stop


def test_stop_strings_of_hybrid_decoding_need_a_tokenizer_and_end_the_thinking():
    one = kind_of("hrpo")
    with pytest.raises(ValueError, match=r"stop_strings=.*pass tokenizer="):
        run(one.ours, {"stop_strings": ["1"]})
    out, trace = run(one.ours, {**EXAMPLES["stop_strings"], "return_trace": True, "max_new_tokens": 12})
    ended = False
    for row, mask in zip(out[:, 8:].tolist(), trace.thinking_mask.tolist()):
        stops = [t for t, token in enumerate(row) if set(tiny.tokenizer().decode([token])) & set(tiny.CHARS)]
        after = stops[0] + 1 if stops else len(row)
        assert not any(mask[after:])
        ended |= after < len(row) and mask[after - 1]
    assert ended


def test_through_peft_the_models_own_settings_count():
    one = kind_of("hrpo")
    net = get_peft_model(tiny.model("qwen3"), LoraConfig(task_type="CAUSAL_LM"))
    attach_thinking(net)
    net.generation_config = GenerationConfig(prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=2"):
        hybrid_generate(net, one.ids, one.matcher, attention_mask=one.mask, **COMMON)


@pytest.mark.parametrize("iterations", [None, 0, 3])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_latent_decoding_without_a_cache_is_decoding_with_one(family, iterations):
    net = latents.make(family, iterations=iterations).double()
    ids, mask = latents.questions()
    with torch.no_grad():
        cached = run(lambda **kw: latent_generate(net, ids, mask, **kw), {})
        assert torch.equal(run(lambda **kw: latent_generate(net, ids, mask, **kw), {"use_cache": False}), cached)
    assert not net.get_input_embeddings()._forward_hooks


class TestPrompts:
    """Empty, too long, and of tokenizers without an end or a pad."""

    def test_empty_prompts_are_named(self):
        tok = tiny.tokenizer()
        for made in (ConceptModel(concepts.model("qwen3"), tok), LatentModel(latents.make(), tok)):
            for texts in ([""], ["1+2=", ""]):
                with pytest.raises(ValueError, match=f"prompt {len(texts) - 1} is empty"):
                    made.generate(texts, max_new_tokens=3)
        one = kind_of("hrpo")
        with pytest.raises(ValueError, match="prompt 1 is empty"):
            hybrid_generate(one.net, one.ids, one.matcher, attention_mask=torch.tensor([[1] * 8, [0] * 8, [1] * 8]))
        with pytest.raises(ValueError, match="prompt 0 is empty"):
            hybrid_generate(one.net, one.ids[:, :0], one.matcher)

    @pytest.mark.parametrize("kind", KINDS)
    def test_prompts_behind_the_context_are_named(self, kind):
        one = kind_of(kind)
        context = one.net.config.max_position_embeddings
        around = {"latent": 7, "planner": 5}.get(kind, 0)
        room = context - around - (0 if kind == "planner" else 8)
        with pytest.raises(
            ValueError, match=rf"prompt 0 has .* up to {room + 1} new tokens: more than the model's {context}"
        ):
            run(one.ours, {"max_new_tokens": room + 1})
        run(one.ours, {"max_new_tokens": room, "max_time": 0.0})
        with pytest.raises(ValueError, match=rf"more than the model's {context} positions.*or max_length"):
            arguments.check_context(one.net, [3], GenerationConfig(max_length=context + 1))
        arguments.check_context(one.net, [3], GenerationConfig(max_length=context), around=9)  # as many as fit

    def test_a_context_that_rope_stretches(self):
        net = tiny.model("llama")
        assert arguments.context_of(net) == 256
        net.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
        assert arguments.context_of(net) == 1024

    @pytest.mark.parametrize("rope", ["dynamic", "longrope"])
    def test_a_rope_that_depends_on_the_length_is_one_and_the_same_up_to_a_length(self, rope):
        """Beyond it log-probs of a cached decode are not those of a forward."""
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
        config = tiny.config("llama")
        config.rope_parameters = {
            "rope_type": rope,
            "rope_theta": 1e4,
            "factor": 4.0,
            **(factors if rope == "longrope" else {}),
        }
        config.max_position_embeddings = 16 if rope == "dynamic" else 64
        net, ids = tiny.from_config(config).eval(), torch.arange(3, 13)[None]
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = net.generate(ids, output_logits=True, return_dict_in_generate=True, max_new_tokens=8, **settings)
        with torch.no_grad():
            at_once = net(input_ids=out.sequences[:, :-1], use_cache=False).logits[0, -8:]
        assert (torch.cat(out.logits) - at_once).abs().max() > 0.1  # once upstream has no such difference, allow them
        attach_thinking(net)
        matcher = DelimiterMatcher(tiny.tokenizer(), "##")
        hybrid_generate(net, ids, matcher, max_new_tokens=6, **settings)
        with pytest.raises(ValueError, match=r"more than the model's 16 positions, beyond which its RoPE changes"):
            hybrid_generate(net, ids, matcher, max_new_tokens=7, **settings)

    def test_a_tokenizer_without_end_and_pad(self):
        tok = tiny.tokenizer()
        settings = {"max_new_tokens": 4, "do_sample": False}
        for net, cls in (
            (concepts.model("qwen3"), ConceptModel),
            (latents.make(), LatentModel),
            (planners.model(), PlannerExecutorModel),
        ):
            net.generation_config.eos_token_id = net.generation_config.pad_token_id = None
            wanted = [cls(net, tok).generate(text, **settings) for text in ("1+2=", "7=")]
            bare = tiny.tokenizer()
            bare.eos_token = bare.pad_token = None
            assert cls(net, bare).generate(["1+2=", "7="], **settings) == wanted

    def test_what_a_tokenizer_adds_is_what_was_not_said(self):
        tok = tiny.tokenizer()
        said = GenerationConfig(pad_token_id=5, stop_strings=["#"])
        assert arguments.with_tokenizer(tok, {}) == {"pad_token_id": tok.pad_token_id}
        assert arguments.with_tokenizer(tok, {"pad_token_id": 7}) == {"pad_token_id": 7}
        assert arguments.with_tokenizer(tok, {"generation_config": said}) == {
            "generation_config": said,
            "tokenizer": tok,
        }
        tok.pad_token = None
        assert arguments.with_tokenizer(tok, {}) == {}

    def test_end_tokens(self):
        net, tok = tiny.model(), tiny.tokenizer()
        for own, wanted in ((None, [1]), (0, [0]), ([3, 4], [3, 4])):
            net.generation_config.eos_token_id = own
            assert arguments.end_tokens(net, tok) == wanted
        net.generation_config.eos_token_id, tok.eos_token = None, None
        assert arguments.end_tokens(net, tok) == []
