"""The study of the demo's heads: equal steps, seeds and start, and its table."""

from pathlib import Path

from sparsemae.demo import heads


def test_the_heads_differ_in_nothing_else() -> None:
    pretraining, *stages = heads.STAGES
    assert (pretraining.job, len(stages)) == ("pretrain", 9)
    for seed in range(3):
        alike = [stage.argv(Path("out"), 5) for stage in stages if stage.seed == seed]
        shortest, *others = ([*words[:2], *words[4:]] for words in alike)  # but for the folder
        assert sorted(words[len(shortest) :] for words in others) == [["--head.kind", kind] for kind in
                                                                      ("linear", "segformer")]  # fmt: skip
        assert all(words[: len(shortest)] == shortest for words in others)
        assert f"out/{pretraining.name}" in shortest


def test_the_table() -> None:
    scores = dict(zip(heads.HEADS, ([0.60, 0.62, 0.64], [0.61, 0.64, 0.64], [0.50, 0.52, 0.54]), strict=True))
    arms = {
        title: [
            {"seed": i, "miou": score, "pixel_accuracy": 0.9, "kept": 1000, "total": 2000} for i, score in enumerate(of)
        ]
        for title, of in scores.items()
    }
    upernet, segformer, linear = heads.rows(arms)
    assert segformer[:6] == ("SegFormer, 32 wide", "3", "63.0%", "1.0%", "+1.00 ± 0.58", "90.0%")
    assert linear[4] == "-10.00 ± 0.00"
    assert upernet[4] == ""
    assert [row[-1] for row in (upernet, segformer, linear)] == ["22.22 M", "1.72 M", "1.46 M"]
