"""The three methods: public names, presets, files of a run."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import trl_ext
from tests import tiny
from trl_ext.latent.presets import PRESETS

from . import setups


METHODS = ("CODI", "PCCoT", "KAVA")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_the_public_names(tmp_path, method):
    config, trainer = getattr(trl_ext, f"{method}Config"), getattr(trl_ext, f"{method}Trainer")
    assert issubclass(trainer, SFTTrainer) and issubclass(config, SFTConfig)
    args = config(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        answer_prompt="##",
        step_separator=";",
        disable_tqdm=True,
        save_steps=1,
    )
    run = trainer(
        model=tiny.model(std=0.1),
        args=args,
        train_dataset=Dataset.from_list(setups.ROWS),
        processing_class=tiny.tokenizer(()),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    run.train()
    terms = {"loss/ce_student", "loss/ce_teacher", "loss/codi"} | ({"loss/kv"} if method == "KAVA" else set())
    logged = run.state.log_history[0].keys()
    assert terms == {name for name in logged if name.startswith("loss/")}
    names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "README.md" in names
    assert not {name for name in names if name.endswith((".pt", ".pth", ".pkl")) or name == "training_args.bin"}
    card = (tmp_path / "README.md").read_text()
    assert run._name in card and "latent-cot" in card and run._paper["title"] in card


BATCHES = {"sim-cot-coconut-gpt2": 64}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_config(tmp_path, name):
    config = getattr(trl_ext, PRESETS[name][0])
    made = config.preset(name, output_dir=str(tmp_path), use_cpu=True, bf16=False, num_train_epochs=1)
    assert made.num_train_epochs == 1 and made.learning_rate == PRESETS[name][1]["learning_rate"]
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == BATCHES.get(name, 128)
    assert made.w_step_decoder == name.startswith("sim-cot")
    if made.stages() is not None:  # all weights are trained
        assert not hasattr(config, "preset_lora") and made.lr_scheduler_type == "constant"
        sizes = {"lotus-gpt2": (13, 6, 6), "coconut-gpt2": (2, 3, None), "sim-cot-coconut-gpt2": (2, 5, None)}
        assert (made.latents_per_step, made.stages().steps, made.iterations) == sizes.get(name, (25, 6, 6))
        return
    lora = config.preset_lora()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (128, 32, 0.1, "all-linear")
    assert (made.num_latents, made.iterations) == ((6, None) if config is trl_ext.CODIConfig else (24, 3))


def test_unknown_presets_list_the_known_ones():
    with pytest.raises(ValueError, match="no preset 'llama'; it has codi-gpt2, codi-llama-1b"):
        trl_ext.CODIConfig.preset("llama")
