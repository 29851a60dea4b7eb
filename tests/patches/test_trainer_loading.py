"""How trainers load models by name while one of ours is constructed: nested, in threads, and undone."""

import threading

import pytest
import transformers
import trl.trainer.grpo_trainer as grpo
import trl.trainer.sft_trainer as sft

import patches
from patches.trainer_model_loading import watching_models
from patches.trainer_reward_models import loading_reward_models
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    return str(tmp_path)


def test_models_are_seen_with_the_tensors_their_files_lack(folder):
    seen = []
    before = grpo.create_model_from_path
    with watching_models(grpo.GRPOTrainer.__init__, lambda *args: seen.append(args)):
        assert patches.status()["trainer_model_loading"].live
        model = grpo.create_model_from_path(folder)
        other, found = grpo.create_model_from_path(folder, output_loading_info=True)
    assert grpo.create_model_from_path is before and not patches.status()["trainer_model_loading"].live
    assert [(name, list(missing)) for _, name, missing in seen] == [(folder, []), (folder, [])]
    assert [given for given, _, _ in seen] == [model, other] and not found["missing_keys"]


def test_nested_blocks_of_one_trainer_see_outermost_first(folder):
    order = []
    with watching_models(grpo.GRPOTrainer.__init__, lambda *_: order.append("outer")):
        with watching_models(grpo.GRPOTrainer.__init__, lambda *_: order.append("inner")):
            grpo.create_model_from_path(folder)
        grpo.create_model_from_path(folder)
    assert order == ["outer", "inner", "outer"]


def test_a_trainer_inside_another_ones_constructor_has_its_own_models(folder):
    order = []
    with watching_models(grpo.GRPOTrainer.__init__, lambda *_: order.append("grpo")):
        sft.create_model_from_path(folder)
        with watching_models(sft.SFTTrainer.__init__, lambda *_: order.append("sft")):
            sft.create_model_from_path(folder)
        grpo.create_model_from_path(folder)
    assert order == ["sft", "grpo"]


def test_another_thread_loads_as_usual(folder):
    """The name is replaced for all threads; what is done with the model is not."""
    seen, loaded = [], []
    with watching_models(grpo.GRPOTrainer.__init__, lambda *args: seen.append(args)):
        thread = threading.Thread(target=lambda: loaded.append(grpo.create_model_from_path(folder)))
        thread.start()
        thread.join()
        with watching_models(sft.SFTTrainer.__init__, lambda *args: seen.append(args)):
            pass
    assert isinstance(loaded[0], transformers.PreTrainedModel) and not seen


def test_an_error_in_between_leaves_nothing(folder):
    before = grpo.create_model_from_path, grpo.AutoModelForSequenceClassification, grpo.AutoTokenizer

    def refuse(*_):
        raise ValueError("refused")

    init = grpo.GRPOTrainer.__init__
    with pytest.raises(ValueError, match="refused"), watching_models(init, refuse), loading_reward_models(init, 1, 2):
        assert before[0] is not grpo.create_model_from_path and before[1] is not grpo.AutoModelForSequenceClassification
        grpo.create_model_from_path(folder)
    assert before == (grpo.create_model_from_path, grpo.AutoModelForSequenceClassification, grpo.AutoTokenizer)


def test_reward_models_and_their_tokenizers_are_loaded_by_ours(tmp_path):
    init, loaded = grpo.GRPOTrainer.__init__, []
    tiny.tokenizer().save_pretrained(tmp_path)
    with loading_reward_models(init, lambda *a, **k: ("model", a, k), lambda *a, **k: ("tokenizer", a, k)):
        assert grpo.AutoModelForSequenceClassification.from_pretrained("x", num_labels=1) == (
            "model",
            ("x",),
            {"num_labels": 1},
        )
        assert grpo.AutoTokenizer.from_pretrained("y") == ("tokenizer", ("y",), {})
        assert issubclass(grpo.AutoTokenizer, transformers.AutoTokenizer)
        thread = threading.Thread(target=lambda: loaded.append(grpo.AutoTokenizer.from_pretrained(tmp_path)))
        thread.start()
        thread.join()
    assert len(loaded[0]) == len(tiny.tokenizer())  # another thread has transformers' own


@pytest.mark.parametrize("name", ["trainer_model_loading", "trainer_reward_models", "grpo_log_probs"])
def test_they_need_the_module_they_are_for(name):
    with pytest.raises(patches.PatchError, match=rf"one (trainer|module): use patches\.{name}\.\w+$"):
        patches.apply(name)
