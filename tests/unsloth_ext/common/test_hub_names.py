"""Names of models that cannot be loaded, and what is said of each."""

import json

import httpx
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config

from tests import tiny
from trl_ext import ConceptConfig, ConceptTrainer
from unsloth_ext import ConceptModel, FastThinkingModel, LatentModel, PlannerExecutorModel
from unsloth_ext.common import hub, settings_file


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://hub"))


@pytest.fixture
def base(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fast(name, **options):
    return FastThinkingModel.from_pretrained(name, use_unsloth=False, **options)


LOADERS = [fast, LatentModel.from_pretrained, ConceptModel.from_pretrained, PlannerExecutorModel.from_pretrained]


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_that_is_not_there_asks_no_hub(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for module in (hub, settings_file):
        monkeypatch.setattr(module, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("runs/missing", "./missing", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=f"there is no folder {name}"):
            load(name)


@pytest.mark.parametrize(
    "error, message",
    [
        (RepositoryNotFoundError("404", response=RESPONSE), "no folder Qwen/Qwne2.5 in .*, and there is no such model"),
        (GatedRepoError("403", response=RESPONSE), "Qwen/Qwne2.5 is gated"),
        (LocalEntryNotFoundError("offline"), "no folder Qwen/Qwne2.5 in .*, and the hub cannot be reached"),
        (EntryNotFoundError("404"), "Qwen/Qwne2.5 on the hub holds no model"),
    ],
)
def test_a_typo_in_a_hub_id(error, message, tmp_path, monkeypatch):
    def ask(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "hf_hub_download", ask)
    with pytest.raises(ValueError, match=message):
        fast("Qwen/Qwne2.5")
    with pytest.raises(ValueError, match=message):
        hub.load_tokenizer("Qwen/Qwne2.5")


def test_folders_that_hold_no_model(tmp_path, base):
    for name, message in {
        tmp_path: f"holds no model: .*; there is one in {base}",
        base / "config.json": "is a file; give the folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            hub.check_name(str(name))
    with pytest.raises(ValueError, match="no valid name for the hub"):
        hub.check_name("no such/model/at all")


@pytest.mark.parametrize("lost", ["*token*", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer(base, lost):
    for file in base.glob(lost):
        file.unlink()
    for load in (fast, hub.load_tokenizer):
        with pytest.raises(ValueError, match=r"has no tokenizer_config\.json: the tokenizer was not saved"):
            load(str(base))


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_folder_with_half_a_tokenizer(base, kind):
    """transformers refuses one class, and makes a tokenizer of special tokens alone for the other."""
    (base / "tokenizer.json").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    said = "its tokenizer has no vocabulary" if kind == "Qwen2Tokenizer" else "its tokenizer.json or .* cannot be read"
    for load in (fast, hub.load_tokenizer):
        with pytest.raises(ValueError, match=said):
            load(str(base))


@pytest.mark.parametrize("dtype", ["bf16", "int8", "half", 16, torch.int8, "cuda"])
def test_dtypes_go_by_torchs_names(base, dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype!r}: choose one of 'float32', 'float16', 'bfloat16'"):
        fast(str(base), dtype=dtype)
    with pytest.raises(ValueError, match="dtype="):  # which is what the other loaders call
        hub.load_causal_lm(str(base), dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_by_any_of_its_names(base, dtype):
    for name in ("dtype", "torch_dtype"):
        assert fast(str(base), **{name: dtype})[0].dtype == torch.bfloat16
        assert hub.load_causal_lm(str(base), **{name: dtype}).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"and torch_dtype=.*: they are the same setting; give only dtype"):
        fast(str(base), dtype=dtype, torch_dtype="float32")
    assert hub.as_dtype("auto") == "auto" and hub.as_dtype(None) is None


def spoilt(base, change):
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def nan(tensors):
    tensors["model.norm.weight"][0] = torch.nan


DAMAGED = {
    "nan": (lambda f: spoilt(f, nan), "model.norm.weight holds NaN or infinity"),
    "lost": (lambda f: spoilt(f, lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]), "truncated"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_base_weights_that_are_damaged(base, case):
    damage, message = DAMAGED[case]
    damage(base)
    for load in (fast, hub.load_causal_lm):
        with pytest.raises(ValueError, match=message) as error:
            load(str(base))
        assert str(base) in str(error.value)


def rewritten(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


WRONG = {
    "no tokenizer.json": (
        lambda f: (f / "tokenizer.json").unlink(),
        "its tokenizer.json or tokenizer_config.json cannot",
    ),
    "cut tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{ cut"),
        "its tokenizer.json or .*: Expecting property",
    ),
    "cut settings": (
        lambda f: (f / "tokenizer_config.json").write_text("{ cut"),
        "its tokenizer.json or .*: Expecting",
    ),
    "width": (
        lambda f: rewritten(f / "config.json", intermediate_size=32),
        r"mlp\.down_proj\.weight has the shape "
        r"\(32, 64\), but config.json gives \(32, 32\)",
    ),
    "layers": (lambda f: rewritten(f / "config.json", num_hidden_layers=9), r"/config\.json: .*num_hidden_layers. .9."),
    "type": (lambda f: rewritten(f / "config.json", hidden_size="x"), r"/config\.json: .*'hidden_size' expected int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_do_not_fit_together_name_their_folder(base, case):
    spoil, message = WRONG[case]
    spoil(base)
    with pytest.raises(ValueError, match=f"{base}.*{message}") as error:
        fast(str(base))
    assert len(" ".join(str(error.value).split())) < 500
    with pytest.raises(ValueError, match=f"{base}.*{message}"):
        hub.load_tokenizer(str(base))
        hub.load_causal_lm(str(base))


def test_adapters_that_lack_their_file_or_are_of_no_known_kind(base, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(tiny.model(), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(adapter)
    rewritten(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    hub.load_causal_lm(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter/adapter_model\.safetensors is missing"):
        hub.load_causal_lm(str(adapter))
    rewritten(adapter / "adapter_config.json", peft_type="NEW")
    with pytest.raises(ValueError, match=r"adapter_config\.json has peft_type='NEW', which PEFT does not know"):
        hub.load_causal_lm(str(adapter))


def test_an_encoder_is_no_causal_language_model(tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    T5Config(d_model=32, num_layers=1).save_pretrained(tmp_path / "t5")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"no causal language model .BertForMaskedLM.*later tokens, as in an encoder"):
        fast(str(tmp_path / "bert"))
    with pytest.raises(ValueError, match="is a t5 model, which is no causal language model"):
        fast(str(tmp_path / "t5"))
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")  # without a head, of which TRL opens the class
    args = ConceptConfig(str(tmp_path), use_cpu=True, bf16=False)
    for load in (fast, lambda name: ConceptTrainer(name, args, train_dataset=Dataset.from_list([{"text": "1"}] * 4))):
        with pytest.raises(ValueError, match=r"no causal language model .BertModel."):
            load(str(tmp_path / "bert"))


def test_a_keyword_that_no_loader_has(base):
    with pytest.raises(ValueError, match=r"base: from_pretrained has no such keyword: .*'foo'"):
        fast(str(base), foo=1)


def test_a_model_type_that_nobody_knows(base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "foo9"}))
    with pytest.raises(ValueError, match=r"its model_type 'foo9' is unknown to transformers [\d.]+$"):
        fast(str(base))


def test_the_default_length_is_what_the_model_has(base):
    """qwen3's table of positions says 256 here, fewer than 2048."""
    assert json.loads((base / "config.json").read_text())["max_position_embeddings"] == 256
    fast(str(base))
    with pytest.raises(ValueError, match=r"max_seq_length=257 .*max_position_embeddings=256"):
        fast(str(base), max_seq_length=257)
    fast(str(base), max_seq_length=256)


def test_a_decoder_of_an_unknown_class_is_no_encoder():
    """What it says of a token differs much with the token, and not at all with those behind it."""
    net = tiny.model(std=0.5)
    net.config.architectures = ["Mine"]
    hub.check_model(net, "mine")
