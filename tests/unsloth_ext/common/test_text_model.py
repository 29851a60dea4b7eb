"""Models of every kind, opened by one class, complete texts as their own loaders do."""

import json

import pytest
import torch

from tests.kinds import ALL, saved
from unsloth_ext import DelimiterMatcher, LatentModel, PlannerExecutorModel, hybrid_generate
from unsloth_ext.common.completions import lengths_of
from unsloth_ext.common.settings_file import saved_method
from unsloth_ext.common.text_model import TextModel


PROMPTS = ["1+2=", "3+4+5=", "7="]
NEW = 10


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A model of a kind as `TextModel` opens it, and the folder."""
    found = {}

    def get(method, peft):
        if (method, peft) not in found:
            folder = saved(method, peft, tmp_path_factory.mktemp("model"))
            found[method, peft] = TextModel.from_pretrained(str(folder)), folder
        return found[method, peft]

    return get


def written(model, prompts, state="on", **how):
    out = model.complete(**model.tokenize(prompts), state=state, max_new_tokens=NEW, do_sample=False, **how)
    return out, [row[:length].tolist() for row, length in zip(out.tokens, out.lengths)]


@pytest.mark.parametrize("method, peft", ALL)
def test_the_kind_is_that_of_the_folder(opened, method, peft):
    model, folder = opened(method, peft)
    assert model.kind == method and (saved_method(str(folder)) is None) == (method == "plain")
    assert not model.model.training and model.tokenizer.padding_side == "left"


@pytest.mark.parametrize("method, peft", ALL)
def test_a_batch_writes_what_each_row_writes_alone(opened, method, peft):
    """The same tokens, and the same costs."""
    model, _ = opened(method, peft)
    together, texts = written(model, PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone, (text,) = written(model, [prompt])
        assert text == texts[i]
        for name in ("lengths", "forwards", "latent"):
            assert getattr(alone, name)[0] == getattr(together, name)[i], name
    assert len({tuple(text) for text in texts}) > 1


@pytest.mark.parametrize("peft", [True, False])
def test_it_writes_what_the_methods_own_function_writes(opened, peft):
    model, folder = opened("latent", peft)
    out, _ = written(model, PROMPTS)
    assert model.decode(out) == LatentModel.from_pretrained(str(folder)).generate(PROMPTS, max_new_tokens=NEW)
    assert (out.latent == 4).all() and (out.forwards == out.lengths + 3).all()  # a pass over the question, T = 2

    model, folder = opened("planner", peft)
    out, _ = written(model, PROMPTS)
    theirs = PlannerExecutorModel.from_pretrained(str(folder))
    assert model.decode(out) == theirs.generate(PROMPTS, max_new_tokens=NEW)
    assert out.latent.tolist() == (theirs.plan(PROMPTS) >= 0).sum((1, 2)).tolist()

    model, _ = opened("hrpo", peft)
    out, _ = written(model, PROMPTS)
    matcher = DelimiterMatcher(model.tokenizer, "####", 64)
    plain, trace = hybrid_generate(
        model.model, matcher=matcher, return_trace=True, max_new_tokens=NEW, do_sample=False, **model.tokenize(PROMPTS)
    )
    assert out.tokens.tolist() == plain[:, -out.tokens.shape[1] :].tolist()
    assert out.latent.tolist() == trace.thinking_mask.sum(1).tolist() and out.latent.sum() > 0

    model, _ = opened("plain", peft)
    out, _ = written(model, PROMPTS)
    inputs = model.tokenize(PROMPTS)
    plain = model.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert out.tokens.tolist() == plain[:, inputs["input_ids"].shape[1] :].tolist() and not out.latent.any()


@pytest.mark.parametrize("method", ["hrpo", "latent", "planner"])
def test_every_state_does_something(opened, method):
    model, _ = opened(method, False)
    torch.manual_seed(0)
    texts = {state: written(model, PROMPTS, state)[1] for state in model.states}
    assert all(texts[state] != texts["on"] for state in model.states if state != "on")
    if "off" in texts:
        inputs = model.tokenize(PROMPTS)
        plain = model.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert written(model, PROMPTS, "off")[0].tokens.tolist() == plain[:, inputs["input_ids"].shape[1] :].tolist()
        assert not written(model, PROMPTS, "off")[0].latent.any()


@pytest.mark.parametrize("method", ["concept", "plain"])
def test_a_state_that_a_kind_has_not_is_refused(opened, method):
    model, _ = opened(method, False)
    with pytest.raises(ValueError, match=f"state='off': a {method} model has on"):
        written(model, PROMPTS, "off")


@pytest.mark.parametrize("method, state", [("latent", "shuffle"), ("hrpo", "interpolate"), ("planner", "shuffle")])
def test_one_row_has_no_other(opened, method, state):
    model, _ = opened(method, False)
    with pytest.raises(ValueError, match="it takes the latent steps of another row, and this batch has one row"):
        written(model, PROMPTS[:1], state)


def test_the_delimiter_is_the_one_of_the_training(opened):
    _, folder = opened("hrpo", False)
    assert TextModel.from_pretrained(str(folder)).delimiter == "####"
    (folder / "training_args.json").write_text(json.dumps({"answer_delimiter": "=>"}))
    assert TextModel.from_pretrained(str(folder)).delimiter == "=>"
    assert TextModel.from_pretrained(str(folder), delimiter="##").delimiter == "##"
    (folder / "training_args.json").unlink()


def test_an_ordinary_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path):
    folder = saved("plain", True, tmp_path)
    own = TextModel.from_pretrained(str(folder))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    again = TextModel.from_pretrained(str(folder))
    assert again.tokenizer.get_vocab() == own.tokenizer.get_vocab() and again.tokenizer.padding_side == "left"
    assert written(again, PROMPTS)[1] == written(own, PROMPTS)[1]


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match="no/such"):
        TextModel.from_pretrained("./no/such")


@pytest.mark.parametrize(
    "row, ends, pad, length",
    [
        ([5, 6, 7], [1], 0, 3),
        ([5, 1, 0], [1], 0, 2),  # its end counts
        ([5, 1, 1], [1], 1, 2),  # padded with its end
        ([5, 0, 0], [1], 0, 1),  # a stop string ended it
        ([1, 0, 0], [1, 2], 0, 1),
        ([2, 5, 1], [1, 2], None, 1),
        ([5, 0, 5], [], None, 3),
        ([5, 0, 6], [1], 0, 3),  # the model wrote it
    ],
)
def test_lengths(row, ends, pad, length):
    assert lengths_of(torch.tensor([row]), ends, pad).tolist() == [length]


CONTEXTS, CONTINUATIONS = ["1+2=", "3+4+5=", "7="], ["3#", "1 2 =", "7"]


@pytest.mark.parametrize("method, peft", [cell for cell in ALL if cell[0] != "hrpo"])
def test_the_likelihood_of_a_batch_is_that_of_each_row(opened, method, peft):
    """1e-4: float32, another padding."""
    model, _ = opened(method, peft)
    pairs = [[model.tokenizer(text)["input_ids"] for text in texts] for texts in (CONTEXTS, CONTINUATIONS)]
    together = model.log_likelihood(*pairs)
    alone = [model.log_likelihood([context], [text])[0] for context, text in zip(*pairs)]
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    assert all(value < 0 for value, _ in together)


@pytest.mark.parametrize("method, peft", [cell for cell in ALL if cell[0] != "hrpo"])
def test_what_greedy_decoding_writes_has_the_likelihood_of_its_choices(opened, method, peft):
    """By `generate`: the sum of the largest log-probabilities, and greedy; one changed token is not greedy. 1e-4."""
    model, _ = opened(method, peft)
    context = model.tokenizer("3+4=")["input_ids"]

    def likelihoods(texts):
        return [value for value, _ in model.log_likelihood([context] * len(texts), texts)]

    _, (text,) = written(model, ["3+4="])
    ((value, greedy),) = model.log_likelihood([context], [text])
    assert greedy
    first, whole = likelihoods([text[:1], text])
    others = [
        max(likelihoods([[*text[:n], token] for token in range(2, 64) if token != text[n]])) for n in (0, len(text) - 1)
    ]
    assert value == pytest.approx(whole, abs=1e-4)
    assert others[0] < first + 1e-4 and others[1] < whole + 1e-4
    assert not model.log_likelihood([context], [[*text[:-1], (text[-1] + 1) % 60 + 2]])[0][1]


@pytest.mark.parametrize("method, state", [("hrpo", "on"), ("hrpo", "zero"), ("latent", "noise")])
def test_a_likelihood_without_a_meaning_is_refused(opened, method, state):
    model, _ = opened(method, False)
    with pytest.raises(ValueError, match=f"state='{state}': a continuation that is given has no likelihood under a"):
        model.log_likelihood([[5]], [[6]], state=state)


@pytest.mark.parametrize("method", ["hrpo", "latent"])
def test_without_latent_steps_the_likelihood_is_that_of_the_plain_forward(opened, method):
    model, _ = opened(method, False)
    context, text = [5, 6, 7], [8, 9]
    ((value, _),) = model.log_likelihood([context], [text], state="off")
    with torch.no_grad():
        log_probs = model.model(torch.tensor([[*context, *text]])).logits.log_softmax(-1)[0]
    assert value == pytest.approx((log_probs[2, 8] + log_probs[3, 9]).item(), abs=1e-4)


@pytest.mark.parametrize("method", ["hrpo", "latent", "plain"])
def test_a_base_model_is_opened_in_4_bits(method, tmp_path):
    """Its linear layers are bitsandbytes' and it still writes; without being asked none is."""
    folder = str(saved(method, True, tmp_path))
    for asked in (False, True):
        opened = TextModel.from_pretrained(folder, load_in_4bit=asked)
        assert any(type(module).__name__ == "Linear4bit" for module in opened.model.modules()) is asked
        batch = opened.tokenize(["1+1=", "2+3="])
        assert len(opened.complete(batch["input_ids"], batch["attention_mask"], max_new_tokens=3).tokens) == 2
