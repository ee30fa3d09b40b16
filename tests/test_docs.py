"""The commands that the documents show: run, or at least understood."""

import re
import shlex
from pathlib import Path

import pytest
import timm
from conftest import ROOT, Figure
from safetensors.torch import save_file

from sparsemae.cli import main
from sparsemae.config import read_config
from sparsemae.jobs import training_jobs


def commands(document: str) -> list[list[str]]:
    """Words of the shell commands in a document's blocks, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
@pytest.mark.holds("imagenet.7")
def test_from_a_timm_vit_and_a_folder_to_predictions_in_four_commands(
    tmp_path: Path,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure: Figure,
) -> None:
    """As written, but for the size of the model, weights that need no download, and three steps of four images."""
    monkeypatch.chdir(tmp_path)
    source = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    save_file(source.state_dict(), tmp_path / "deit.safetensors")
    shorter = ["--model.name", "deit_tiny_patch16_224", "--trainer.global_batch", "4", "--trainer.max_steps", "3",
               "--trainer.precision", "fp32", "--data.workers", "0"]  # fmt: skip
    chain = commands("own-images.md")
    assert [words[1] for words in chain] == ["check", "finetune", "pack", "predict"]
    for _, *words in chain:
        here = ["deit.safetensors" if word.startswith("timm:") else word for word in words]
        main(here + shorter if here[0] == "finetune" else here)
    shown = capsys.readouterr().out
    predicted = re.findall(r"images/val/(\w+)/\d\.png: (\w+) [\d.]+%, (\w+) [\d.]+%", shown)
    assert len(predicted) == 6
    assert all({first, second} == {"cat", "dog"} for _, first, second in predicted)
    figure(f"{len(chain)} commands, {len(predicted)} predictions")


def test_the_commands_for_several_machines_are_understood() -> None:
    chain = [words for words in commands("scale-out.md") if "sparsemae" in " ".join(words)]
    for words in chain:
        at = next(i for i, word in enumerate(words) if word in ("sparsemae", "sparsemae.cli"))
        config = read_config(training_jobs()[words[at + 1]], words[at + 2 :])
        nodes = words[words.index("--nnodes") + 1] if "--nnodes" in words else str(config.trainer.num_nodes)
        assert int(nodes) == config.trainer.num_nodes
    assert len(chain) == 3
