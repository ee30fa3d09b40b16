"""Pushed to a stand-in of the hub, and loaded from there by timm and by `--init`; what fails is one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SAID
from hub_standin import TOKEN, hub

# Runs command lines in one process without the waits between tries; after each it prints what came of it.
DRIVER = (
    SAID
    + """
import time
from pathlib import Path
time.sleep = lambda seconds: None
import timm, torch
from sparsemae.models.start import start_from

for words in json.loads(sys.argv[1]):
    status, out, error = said(words)
    print(json.dumps([status, out, [line for line in error.splitlines() if "error:" in line]]))
there = timm.create_model("hf-hub:lab/model", pretrained=True)
here = timm.create_model(f"local-dir:{sys.argv[2]}", pretrained=True)
print(all(torch.equal(here.state_dict()[name], value) for name, value in there.state_dict().items()))
arguments = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 28, "global_pool": "avg"}
model = timm.create_model("vit_base_patch16_224", num_classes=4, **arguments)
for source in ("hf-hub:lab/model", "hf-hub:lab/mae", "hf-hub:lab/absent", "hf-hub:lab/conflict"):
    try:
        print(start_from(model, source).fraction)
    except ValueError as error:
        print(" ".join(str(error).split()))
"""
)


@pytest.mark.holds_only
@pytest.mark.slow
@pytest.mark.holds("take.2")
def test_push_and_load_through_a_stand_in_of_the_hub(runs: Path, tmp_path: Path, figure: Callable[[str], None]) -> None:
    words = [
        ["export", str(runs / "finetune"), str(tmp_path / name), "--push", f"lab/{name}", *more]
        for name, *more in (("model",), ("conflict",), ("dropped",), ("lost",), ("yaml", "--license", "no-such"))
    ]
    words.append(["export", str(runs / "pretrain"), str(tmp_path / "mae"), "--to", "hf", "--push", "lab/mae"])
    words.append(["export", str(runs / "finetune"), str(tmp_path / "again"), "--push", "lab/model"])
    with hub() as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", DRIVER, json.dumps(words), str(tmp_path / "model")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        refused = subprocess.run(
            [sys.executable, "-m", "sparsemae", "export", runs / "finetune", tmp_path / "other", "--push", "lab/other"],
            capture_output=True, text=True, check=False, env=environment | {"HF_TOKEN": "hf_theirs"},
        )  # fmt: skip
        files = server.repositories
    assert "other" not in files
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "401" in refused.stderr
    lines = done.stdout.splitlines()
    model, conflict, dropped, lost, yaml, mae, again = (json.loads(line) for line in lines[:7])
    for status, out, errors in (model, mae, again):
        assert (status, errors) == (0, [])
        assert f"{server.endpoint}/lab/" in out
    for (status, out, errors), said in ((conflict, "409"), (dropped, "commit"), (lost, "commit"), (yaml, "license")):
        assert status == 2
        (line,) = errors
        assert "no commit was confirmed" in line
        assert said in line
        assert f"{server.endpoint}/lab/" not in out
    assert files["lab/conflict"] == files["lab/dropped"] == files["lab/yaml"] == {}
    assert files["lab/lost"]  # of which the client cannot know
    for name in ("model", "conflict", "dropped"):  # the folder is whole, whatever came of the push
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
    assert {name: (tmp_path / "again" / name).read_bytes() for name in files["lab/model"]} == files["lab/model"]
    same, ours, theirs, absent, empty = lines[7:]
    assert (same, ours, theirs) == ("True", "1.0", "1.0")
    for line, name in ((absent, "absent"), (empty, "conflict")):
        assert line.startswith(f"--init hf-hub:lab/{name}: ")
    figure(f"{sum(map(len, files.values()))} files pushed, {len(server.asked)} requests")
