"""Pushing to a hub and opening by hub id, with the real client and a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub_server import serving
from tests.kinds import ALL


ROOT = Path(__file__).parents[1]
NAMES = [f"{method}-{'adapter' if peft else 'whole'}" for method, peft in ALL]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """What the script found, and the hub's repositories."""
    folder = tmp_path_factory.mktemp("hub")
    with serving() as hub:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTEST_"))}
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        call = [sys.executable, "-m", "tests.hub_script", folder]
        done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), hub.repositories, hub.requests


@pytest.mark.parametrize("name", NAMES)
def test_a_pushed_model_opens_by_its_id_and_writes_the_same(pushed, name):
    found, repositories, requests = pushed
    assert found[name]["kind"] == name.partition("-")[0] and found[name]["before"] == found[name]["after"]
    assert {"README.md", "tokenizer.json"} <= repositories[f"us/{name}"].files.keys()
    assert any(f"/us/{name}/resolve/" in request for request in requests)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("plain")])
def test_the_uploaded_card_opens_the_model_from_the_hub(pushed, name):
    """It names the repository, and no folder of the machine that pushed."""
    card = ModelCard(pushed[1][f"us/{name}"].files["README.md"].decode())
    assert f'from_pretrained("us/{name}")' in card.text
    assert card.data.library_name == "latent-reasoning-trl" and "/tmp" not in str(card.data)


def test_trainers_push_what_opens(pushed):
    found, repositories, _ = pushed
    assert found["trained"] == {"kind": "hrpo", "delimiter": "#"} and found["ordinary"] == "plain"
    text = repositories["us/trained"].files["README.md"].decode()
    assert "HRPO" in text and 'from_pretrained("us/trained")' in text and "Cite HRPO as" in text
    assert "training_args.json" in repositories["us/trained"].files


def test_a_hub_id_is_evaluated_and_a_missing_one_is_named(pushed):
    assert pushed[0]["evaluated"] == 2
    assert "us/nowhere" in pushed[0]["missing"]
