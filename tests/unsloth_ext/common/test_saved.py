"""What a saved folder says of its method: to our loaders, to stock ones, and to a reader."""

import copy
import functools
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils.hub import PushToHubMixin

from tests import families, tiny
from tests.installed import OLD_NAMES
from unsloth_ext import (
    ConceptModel,
    FastThinkingModel,
    LatentConfig,
    LatentModel,
    OnlineConceptConfig,
    PlannerConfig,
    PlannerExecutorModel,
    attach_concepts,
    attach_latent,
    attach_planner,
    backbone_of,
    with_concept_modules,
    with_latent_modules,
    with_planner_modules,
)
from unsloth_ext.common import settings_file
from unsloth_ext.common.settings_file import FILE, METHODS
from unsloth_ext.hrpo.adapter import with_thinking_modules
from unsloth_ext.hrpo.residual import attach_thinking
from unsloth_ext.latent.config import remember_latent


WEIGHTS = {True: "adapter_model.safetensors", False: "model.safetensors"}
ATTACH = {
    "hrpo": (lambda m, t: attach_thinking(m), lambda c, m: with_thinking_modules(c)),
    "latent": (lambda m, t: attach_latent(m, t, LatentConfig(4, 2, projection_dim=16)), with_latent_modules),
    "concept": (
        lambda m, t: attach_concepts(m, OnlineConceptConfig(1, 1, 1, 16)),
        lambda c, m: with_concept_modules(c),
    ),
    "planner": (lambda m, t: attach_planner(m), lambda c, m: with_planner_modules(c)),
}
KINDS = [(method, peft) for method in ATTACH for peft in (True, False)]


def three_layers():
    config = tiny.config("qwen3")
    config.num_hidden_layers, config.layer_types = 3, ["full_attention"] * 3
    return tiny.from_config(config).eval()


def made(method, peft, root):
    """A model whose every trained tensor has moved, its tokenizer, and its base in `root / "base"`."""
    base, tokenizer = three_layers(), tiny.tokenizer(())
    if not (root / "base").exists():
        base.save_pretrained(root / "base")
        tiny.tokenizer(()).save_pretrained(root / "base")
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    attach, complete = ATTACH[method]
    torch.manual_seed(0)
    model = attach(base, tokenizer)
    if peft:
        lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        vars(lora).update(complete(lora, model))
        model = get_peft_model(model, lora)
        if method == "latent":
            remember_latent(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval(), tokenizer


@functools.cache
def _saved(method, peft, root):
    model, tokenizer = made(method, peft, root)
    model.save_pretrained(root / "saved")
    tokenizer.save_pretrained(root / "saved")
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(model, folder to spoil), saved once for each kind."""

    @functools.cache
    def root(method, peft):
        return tmp_path_factory.mktemp(f"{method}-{peft}")

    def get(method, peft, copy_to):
        model = _saved(method, peft, root(method, peft))
        shutil.copytree(root(method, peft) / "saved", copy_to, dirs_exist_ok=True)
        return model, copy_to

    return get


def load(method, folder):
    if method == "hrpo":
        return FastThinkingModel.from_pretrained(str(folder), use_unsloth=False)[0]
    return (
        {"latent": LatentModel, "concept": ConceptModel, "planner": PlannerExecutorModel}[method]
        .from_pretrained(str(folder))
        .model
    )


def tensors_of(model, method):
    """The method's trained tensors by name, through PEFT's wrappers, and where LoRA is its B."""
    names = METHODS[method].modules
    state = {
        k.replace("modules_to_save.default.", ""): v
        for k, v in model.state_dict().items()
        if "original_module" not in k
    }
    return {
        k.removeprefix("base_model.model."): v
        for k, v in state.items()
        if "lora_B" in k or "trainable_tokens_delta" in k or set(k.split(".")) & set(names)
    }


def same(ours, theirs, method):
    ours, theirs = (tensors_of(model, method) for model in (ours, theirs))
    assert ours and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("method, peft", KINDS)
def test_a_folder_has_its_settings_in_a_file_of_their_own_and_comes_back(kept, tmp_path, method, peft):
    model, folder = kept(method, peft, tmp_path)
    found = json.loads((folder / FILE).read_text())
    assert found == {"method": method, "version": 1, "settings": getattr(model.config, METHODS[method].key)}
    if peft:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert not config.keys() & {m.key for m in METHODS.values()}
    else:
        assert json.loads((folder / "config.json").read_text())[METHODS[method].key] == found["settings"]
    same(load(method, folder), model, method)


@pytest.mark.parametrize("method, peft", KINDS)
def test_folders_of_before_are_read(kept, tmp_path, method, peft):
    """As they were written until `latent_reasoning.json`: settings in PEFT's file, with the other methods' keys empty."""
    model, folder = kept(method, peft, tmp_path)
    settings = json.loads((folder / FILE).read_text())["settings"]
    (folder / FILE).unlink()
    if peft:
        file = folder / "adapter_config.json"
        old = {**{m.key: None for m in METHODS.values()}, METHODS[method].key: settings}
        file.write_text(json.dumps(json.loads(file.read_text()) | old))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OLD_NAMES)
        warnings.filterwarnings("ignore", message="You have passed exclude_modules")
        again = load(method, folder)
    same(again, model, method)
    again.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / FILE).read_text())["settings"] == settings


@pytest.mark.parametrize("method", ATTACH)
def test_stock_peft_opens_an_adapter_without_a_warning(kept, tmp_path, method):
    """It drops the modules, which the card says; see the next test for what transformers says."""
    model, folder = kept(method, True, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=OLD_NAMES)
        base = AutoModelForCausalLM.from_pretrained(model.peft_config["default"].base_model_name_or_path)
        stock = PeftModel.from_pretrained(base, folder)
    assert not any(set(name.split(".")) & set(METHODS[method].modules) for name in stock.state_dict())
    assert "`PeftModel` says nothing" in (folder / "README.md").read_text().replace("\n", " ")


@pytest.mark.parametrize("method, peft", KINDS)
def test_transformers_reports_what_it_drops(kept, tmp_path, method, peft, caplog):
    _, folder = kept(method, peft, tmp_path)
    transformers = logging.getLogger("transformers")
    transformers.propagate, before = True, transformers.propagate
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    finally:
        transformers.propagate = before
    report = "\n".join(record.getMessage() for record in caplog.records if "LOAD REPORT" in record.getMessage())
    assert "UNEXPECTED" in report and any(module in report for module in METHODS[method].modules)


@pytest.mark.parametrize("method, peft", KINDS)
def test_tensors_without_settings_and_settings_without_tensors(kept, tmp_path, method, peft):
    _, folder = kept(method, peft, tmp_path)
    text, config = (folder / FILE).read_text(), folder / "config.json"
    whole = config.read_text() if config.exists() else ""
    (folder / FILE).unlink()
    if whole:
        config.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != METHODS[method].key}))
    with pytest.raises(ValueError, match=f"a tensor of the method {method}, but no latent_reasoning.json"):
        load(method, folder)
    (folder / FILE).write_text(text)
    tensors = load_file(folder / WEIGHTS[peft])
    rest = {k: v for k, v in tensors.items() if not set(k.split(".")) & set(METHODS[method].modules)}
    assert len(rest) < len(tensors)
    save_file(rest, folder / WEIGHTS[peft], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks") as error:
        load(method, folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("method, other", [*zip(ATTACH, [*list(ATTACH)[1:], "hrpo"])])
@pytest.mark.parametrize("peft", [True, False])
def test_a_loader_refuses_another_methods_folder(kept, tmp_path, method, other, peft):
    _, folder = kept(method, peft, tmp_path)
    with pytest.raises(ValueError, match=f"method {method} .*{METHODS[method].loader}.from_pretrained"):
        load(other, folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"method": "hrpo", "version": 2, "settings": {"a": 1}}, "version=2"),
        ({"method": "dream", "version": 1, "settings": {"a": 1}}, "method='dream'"),
        ({"method": "hrpo", "version": 1, "settings": {"thinking_norm": "none"}}, "hold different settings"),
    ],
)
def test_a_settings_file_that_cannot_be_read(kept, tmp_path, content, message):
    _, folder = kept("hrpo", False, tmp_path)
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load("hrpo", folder)


@pytest.mark.parametrize("method", ATTACH)
def test_merged_and_saved_it_is_a_full_model(tmp_path, method):
    model, tokenizer = made(method, True, tmp_path)
    before = {k: v.clone() for k, v in tensors_of(model, method).items() if "lora" not in k and "delta" not in k}
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again = tensors_of(load(method, tmp_path / "merged"), method)
    assert before.keys() == again.keys() and all(torch.equal(before[k], again[k]) for k in before)


def test_a_folder_is_what_was_saved_into_it_last(tmp_path):
    """A whole model over one that other software wrote and we completed, and the other way round."""
    model, tokenizer = made("hrpo", False, tmp_path)
    folder = tmp_path / "full"
    tokenizer.save_pretrained(folder)
    for last in ("ours", "completed", "ours"):
        with torch.no_grad():
            backbone_of(model).thinking_projection.weight.add_(1.0)
        if last == "ours":
            model.save_pretrained(folder)
        else:
            backbone_of(model).complete_saved(model, folder)
        same(load("hrpo", folder), model, "hrpo")


def test_a_whole_model_beside_an_adapter_is_warned_of(tmp_path, monkeypatch):
    """Loaders, stock ones too, would open the adapter."""
    said = []
    monkeypatch.setattr(settings_file.logger, "warning", said.append)
    model, _ = made("hrpo", True, tmp_path)
    model.save_pretrained(tmp_path / "out")
    assert not said
    model.merge_and_unload().save_pretrained(tmp_path / "out")
    assert len(said) == 1 and "out also holds an adapter" in said[0]


def test_lora_on_top_of_a_full_thinking_model_finds_the_modules_in_its_base(tmp_path):
    full, tokenizer = made("hrpo", False, tmp_path)
    full.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    full = load("hrpo", tmp_path / "full")
    model = get_peft_model(full, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora")
    assert not any("thinking" in name for name in load_file(tmp_path / "lora" / WEIGHTS[True]))
    same(load("hrpo", tmp_path / "lora"), model, "hrpo")


def test_a_copy_writes_its_own_weights(tmp_path):
    model, _ = made("hrpo", False, tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        backbone_of(other).thinking_projection.weight.fill_(7.0)
    other.save_pretrained(tmp_path / "copy")
    assert (load_file(tmp_path / "copy" / WEIGHTS[False])["model.thinking_projection.weight"] == 7).all()


# -- the card -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, peft", KINDS)
def test_the_card_says_what_it_is_and_its_code_runs_word_for_word(tmp_path, monkeypatch, method, peft):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = made(method, peft, tmp_path)
    model.save_pretrained("runs/it")
    tokenizer.save_pretrained("runs/it")
    card = ModelCard.load("runs/it/README.md")
    assert card.data.method == method and card.data.library_name == "latent-reasoning-trl"
    assert {method, "latent-reasoning"} <= set(card.data.tags) and ("peft" in card.data.tags) == peft
    assert getattr(card.data, "base_model", None) is None, "a path is no base that the hub could show"
    assert "More Information Needed" not in card.text and "`base`" in card.text and str(tmp_path) not in card.text
    for name, value in getattr(model.config, METHODS[method].key).items():
        assert f'"{name}": {json.dumps(value)}' in card.text or isinstance(value, list), name
    (code,) = card.text.split("```python\n")[1:]
    code = code.split("```")[0]
    assert 'from_pretrained("runs/it")' in code
    exec(compile(code, "card", "exec"), {})


def test_a_card_tells_of_no_home_directory(kept, tmp_path):
    model, _ = kept("hrpo", False, tmp_path)
    model.save_pretrained(tmp_path / "elsewhere")
    text = (tmp_path / "elsewhere" / "README.md").read_text()
    assert 'from_pretrained(".")' in text and str(tmp_path / "elsewhere") not in text


@pytest.mark.parametrize("peft", [True, False])
def test_what_a_reader_has_written_into_a_card_stays(kept, tmp_path, caplog, peft):
    model, folder = kept("hrpo", peft, tmp_path)
    file = folder / "README.md"
    card = ModelCard.load(file)
    card.data.license, card.data.tags = "mit", [*card.data.tags, "mine"]
    card.text = f"My notes.\n\n{card.text}\n\n## More of mine\n"
    card.save(file)
    model.save_pretrained(folder)
    again = ModelCard.load(file)
    assert "My notes." in again.text and "## More of mine" in again.text and again.text.count("## How to open it") == 1
    assert again.data.license == "mit" and "mine" in again.data.tags and "hrpo" in again.data.tags
    file.write_text(file.read_text().replace("## How to open it", "## How I open it"))
    kept_text = file.read_text()
    model.save_pretrained(folder)
    assert ModelCard.load(file).text == ModelCard(kept_text).text
    assert "changed by hand" in caplog.text


def test_what_is_pushed_has_settings_and_card(kept, tmp_path, monkeypatch):
    """The upload itself is replaced: no hub is asked."""
    from huggingface_hub import HfApi
    from transformers.utils import hub

    model, _ = kept("hrpo", True, tmp_path)
    seen = {}

    def commit(self, repo_id, operations, **_):
        seen.update(
            {
                op.path_in_repo: Path(op.path_or_fileobj).read_text()
                for op in operations
                if ".safe" not in op.path_in_repo
            }
        )

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(
        hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\nlicense: mit\n---\n\nOf the hub.\n")
    )
    model.push_to_hub("us/model")
    assert json.loads(seen[FILE])["method"] == "hrpo"
    card = ModelCard(seen["README.md"])
    assert "Of the hub." in card.text and 'from_pretrained("us/model")' in card.text and card.data.license == "mit"
    assert "describe_saved" not in vars(PushToHubMixin)


def test_a_model_with_a_method_is_refused_by_the_others_before_anything_changes():
    attach = {
        "hrpo": attach_thinking,
        "latent": lambda net: attach_latent(net, tiny.tokenizer(()), LatentConfig(num_latents=3)),
        "concept": lambda net: attach_concepts(net, OnlineConceptConfig(1, 2, 1, num_concepts=8)),
        "planner": lambda net: attach_planner(net, PlannerConfig([{"name": "a", "num_concepts": 5, "quota": 3}])),
    }
    for first, give in attach.items():
        net = families.model("qwen3")
        give(net)
        names, config = list(net.state_dict()), net.config.to_dict()
        for second in attach.keys() - {first}:
            with pytest.raises(
                ValueError, match=rf"has the settings of {first}: a model can have only one method.* for {second}"
            ):
                attach[second](net)
        assert list(net.state_dict()) == names and net.config.to_dict() == config


def test_settings_of_two_methods_are_not_saved(tmp_path):
    """Where another program has joined two models' configurations."""
    net = attach_thinking(families.model("qwen3"))
    net.config.planner = {"types": []}
    with pytest.raises(
        ValueError, match="the model has the settings of hrpo and planner: a model can have only one method"
    ):
        net.save_pretrained(tmp_path)
