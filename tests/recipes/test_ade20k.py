"""The recipes of Table 3 as they are, ViT-B at 512 px, on photographs of full size: minutes, and gigabytes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import Figure, scene_folder

SCRIPT = """
import sys
from pathlib import Path
from sparsemae.cli import main
main(sys.argv[1:])
line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print("peak", int(line.split()[1]) * 1024)
"""


@pytest.mark.holds("ade20k.1")
@pytest.mark.holds_only
@pytest.mark.parametrize(("recipe", "kept"), [("segment_t", 5_308_416), ("segment_s", 10_616_832)])
def test_a_recipe_runs_on_a_cpu(tmp_path: Path, recipe: str, kept: int, figure: Figure) -> None:
    root = scene_folder(tmp_path / "ADEChallengeData2016", train=4, val=1)
    start = tmp_path / "vit.pth"  # stands for runs/pretrain_t
    torch.save(timm.create_model("vit_base_patch16_224").state_dict(), start)
    words = [
        "segment", "--config", recipe, "--data.root", str(root), "--init", str(start), "--out", str(tmp_path / "run"),
        "--trainer.accelerator", "cpu", "--trainer.max_steps", "3", "--trainer.global_batch", "4",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    assert peak < 24e9
    printed = " ".join(done.stderr.split())
    assert "UperNet 512 wide: " in printed
    assert re.search(r"multiply-adds per 512 px image: [\d.]+ G with the kept weights, [\d.]+ G with all", printed)
    assert f"{kept:,} 84,934,656" in printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    assert 0 <= lines[-1]["miou"] <= 1
    cost = re.findall(r"UperNet 512 wide.*in the head", printed)[0]
    figure(f"{recipe}: peak {peak / 1e9:.1f} GB; {cost}")
