"""Any text comes back, training is deterministic, and TRL trains what an assistant says and its end, no more."""

import logging

import pytest
from datasets import Dataset
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import is_chat_template_stop_token_trained

from tests.processes import fresh
from unsloth_ext.minimind.tokenizer import train_tokenizer


TEXTS = [
    "What is 12 plus 7? 12 + 7 = 19, so the answer is 19.\n\nAnother paragraph,  with two spaces.\n",
    "def add(a, b):\n    return a + b  # 42\n\n\nassistant\n\nuser\n",
    "你好，世界！今天天气很好。\r\n你好吗？",
] * 3
START, STOP = 1, 2
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "\n12 plus 7?"},
    {"role": "assistant", "content": "\n\n19, so the answer\n"},  # could merge with the newlines around it
    {"role": "user", "content": "你好 "},
    {"role": "assistant", "content": "  👩‍👩‍👧 你好！  "},
    {"role": "tool", "content": "{}"},
    {"role": "assistant", "content": "1"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 330)


@pytest.mark.parametrize(
    "text",
    [
        "  two  spaces   and a tab\t, then \r\n\r\n CRLF \n\n\n and more \n ",
        "for i in range(10):\n\tprint(f'{i:>3}', \"don 't\")  # x ,. !\n",
        "你好，世界",
        "👩‍👩‍👧 ☃️ e\u0301 \u2028 \x00 \x7f \ufeff \U0010ffff",
        "a <|im_start|> b<|im_end|>\n<|endoftext|> <|im_start",
        " ",
        "",
    ],
)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False).input_ids


def test_special_tokens_and_what_splits(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [0, START, STOP]
    named = tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert named == (0, 0, START, STOP)
    assert len(tokenizer) == 330 and tokenizer.model_max_length == 32768
    assert tokenizer.backend_tokenizer.model.unk_token is None
    assert set(tokenizer.encode(bytes(range(128)).decode() + "ÿ€𐍈")).isdisjoint({0, START, STOP})
    assert tokenizer.tokenize("12\n\n7") == ["1", "2", "Ċ", "Ċ", "7"]  # although "12" and "\n\n" come often
    assert tokenizer.tokenize("the")[0][0] != "Ġ"
    assert any(len(token) > 3 for token in tokenizer.tokenize("the answer is"))  # it did merge


def test_it_is_deterministic_and_loads_in_a_fresh_process(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    code = f"""
from transformers import AutoTokenizer
from tests.unsloth_ext.minimind.test_tokenizer import TALK, TEXTS
from unsloth_ext.minimind.tokenizer import train_tokenizer
loaded = AutoTokenizer.from_pretrained({str(tmp_path)!r})
again = train_tokenizer(TEXTS, 330)
assert again.backend_tokenizer.to_str() == loaded.backend_tokenizer.to_str()
print(loaded.apply_chat_template(TALK, return_dict=False), loaded.encode(TEXTS[2]), loaded.model_max_length)
"""
    done = fresh("-c", code)
    assert done.returncode == 0, done.stderr
    found = f"{tokenizer.apply_chat_template(TALK, return_dict=False)} {tokenizer.encode(TEXTS[2])} 32768"
    assert done.stdout.strip() == found
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_too_little_text_is_said(monkeypatch):
    said = []
    logger = logging.getLogger("unsloth_ext.minimind.tokenizer")
    monkeypatch.setattr(logger, "warning", said.append)
    made = train_tokenizer(["abc abc"])
    assert len(said) == 1 and f"the tokenizer has {len(made)} tokens, not 6400" in said[0]
    assert len(made) == 259 + 3  # ab, abc, Ġabc


@pytest.mark.parametrize(
    "texts, size, message",
    [
        ([], 300, "no text"),
        (["", ""], 300, "no text"),
        (["a"], 258, "vocab_size=258: must be at least 259"),
        ("one text", 300, "texts is one string"),
        (["a", None], 300, "text 1 is not a string: None"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(texts, size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size)


def by_hand(tokenizer, talk):
    """Each part tokenized alone: ids, and the labels of what an assistant says and of its end."""
    ids, labels = [], []
    for message in talk:
        header = [START, *tokenizer.encode(message["role"] + "\n")]
        said, newline = [*tokenizer.encode(message["content"]), STOP], tokenizer.encode("\n")
        ids += header + said + newline
        trained = message["role"] == "assistant"
        labels += [-100] * len(header) + (said if trained else [-100] * len(said)) + [-100] * len(newline)
    return ids, labels


def prepared(tokenizer, talks, tmp_path):
    """Rows as the trainer's data path makes them."""
    config = Qwen3Config(
        vocab_size=330,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=START,
        eos_token_id=STOP,
    )
    args = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, report_to="none", use_cpu=True, bf16=False)
    data = Dataset.from_list([{"messages": talk} for talk in talks])
    trainer = SFTTrainer(Qwen3ForCausalLM(config), args, train_dataset=data, processing_class=tokenizer)
    return trainer.train_dataset


def test_trl_trains_exactly_what_the_assistant_says_and_its_end(tokenizer, tmp_path):
    talks = [TALK, TALK[1:3], TALK[:5]]
    rows = prepared(tokenizer, talks, tmp_path)
    for row, talk in zip(rows, talks):
        assert (row["input_ids"], row["labels"]) == by_hand(tokenizer, talk)
    assert is_chat_template_stop_token_trained(tokenizer)


def tutorial_mask(tokenizer, ids, header, max_length):
    """Which tokens of a padded row are trained by the tutorial's formula: from the header's end + 1 to EOS's + 1."""
    ids = ids + [0] * (max_length - len(ids))
    head, mask, i = tokenizer.encode(header), [0] * max_length, 0
    while i < max_length:
        if ids[i : i + len(head)] != head:
            i += 1
            continue
        start = i + len(head)
        end = next((j for j in range(start, max_length) if ids[j] == STOP), max_length)
        for j in range(start + 1, min(end + 2, max_length)):
            mask[j] = 1
        i = end + 1
    return mask


PLAIN = [
    {"role": "user", "content": "12 plus 7?"},
    {"role": "assistant", "content": "19, the answer"},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "23"},
]


@pytest.mark.parametrize(
    "header, first_untrained",
    [("<|im_start|>assistant\n", True), ("<|im_start|>assistant", False)],  # the tutorial's, the published code's
)
def test_the_tutorials_mask_is_off_by_one(tokenizer, tmp_path, header, first_untrained):
    """Token for token: one after EOS in every turn; and, where its header has the newline, the first answer token is not
    trained. The published code's header lacks the newline, which its + 1 skips."""
    row = prepared(tokenizer, [PLAIN], tmp_path)[0]
    ids, ours = row["input_ids"], [int(label != -100) for label in row["labels"]]
    theirs = tutorial_mask(tokenizer, ids, header, len(ids))
    ends = [i for i, token in enumerate(ids) if token == STOP and ours[i]]
    firsts = [i for i in range(1, len(ids)) if ours[i] and not ours[i - 1]]
    assert len(ends) == len(firsts) == 2
    assert {i for i in range(len(ids)) if theirs[i] > ours[i]} == {i + 1 for i in ends}
    assert {i for i in range(len(ids)) if theirs[i] < ours[i]} == (set(firsts) if first_untrained else set())


def test_the_tutorials_dangling_header_trains_padding(tokenizer, tmp_path):
    """A generation prompt at the end of a training row: its mask runs on through the padding. Ours has no header."""
    row = prepared(tokenizer, [PLAIN], tmp_path)[0]
    dangling = tokenizer.apply_chat_template(PLAIN, add_generation_prompt=True, return_dict=False)
    prompt = tokenizer.encode("<|im_start|>assistant\n")
    assert dangling == row["input_ids"] + prompt
    size = len(dangling) + 5
    whole = tutorial_mask(tokenizer, dangling, "<|im_start|>assistant\n", size)
    assert whole[len(dangling) :] == [0, 1, 1, 1, 1]  # padding
    assert tutorial_mask(tokenizer, row["input_ids"], "<|im_start|>assistant\n", size)[len(dangling) :] == [0] * 5


def test_what_was_said_stays_the_same_when_more_follows(tokenizer):
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    for n in range(1, len(TALK)):
        ids = tokenizer.apply_chat_template(TALK[:n], return_dict=False)
        assert whole[: len(ids)] == ids
        if TALK[n]["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(TALK[:n], add_generation_prompt=True, return_dict=False)
            assert whole[: len(prompt)] == prompt and tokenizer.decode(prompt[len(ids) :]) == "<|im_start|>assistant\n"


def test_the_template_is_chatml_and_adds_nothing(tokenizer):
    text = tokenizer.apply_chat_template(TALK[1:3], tokenize=False)
    assert (
        text == "<|im_start|>user\n\n12 plus 7?<|im_end|>\n<|im_start|>assistant\n\n\n19, so the answer\n<|im_end|>\n"
    )


@pytest.mark.parametrize(
    "message, tools, error",
    [
        ({"role": "human", "content": "x"}, None, "role human: system, user, assistant or tool"),
        ({"role": "user", "content": None}, None, "content of role user is no text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, None, "tool_calls.*into the content"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, None, "reasoning_content: write"),
        ({"role": "user", "content": "x"}, [{"name": "f"}], "tools: write them into the system content"),
    ],
)
def test_what_the_template_would_drop_it_refuses(tokenizer, message, tools, error):
    with pytest.raises(TemplateError, match=error):
        tokenizer.apply_chat_template([message], tools=tools)
