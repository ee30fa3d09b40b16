from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import tiny

from sparsemae.cli import main


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [value for name, value in attrs if name == "src"], "nothing from outside"

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []


@pytest.mark.slow
def test_two_runs_on_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other <b>"
    main(tiny("pretrain", one, "--trainer.max_steps", "2"))
    main(tiny("pretrain", other, "--trainer.max_steps", "2", "--seed", "1"))
    with (one / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # the run goes on
    main(["report", str(one), str(other)])
    assert f"wrote {one / 'report.html'}" in capsys.readouterr().out
    page = Page((one / "report.html").read_text())
    assert page.tags.count("svg") == 5 + 2  # loss, lr, rate, flips and SAD over both; layers of each
    assert str(other) in page.words
    settings = page.words[page.words.index("Settings that differ") : page.words.index("Machine")]
    assert settings == ["Settings that differ", str(one), str(other), "out", str(one), str(other), "seed", "0", "1"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["report", str(tmp_path)])
    assert exit_.value.code == 2
    assert f"{tmp_path}: wanted the folder of a run" in capsys.readouterr().err
