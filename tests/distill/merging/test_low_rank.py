"""Low-rank patches: near in the sense of the SVD, applied and taken off to the last bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from xlstm_distill.cli.patch import app
from xlstm_distill.errors import UserError
from xlstm_distill.merging.low_rank import decompose, product, rows_of, saves
from xlstm_distill.merging.patches import Patch, make_patch
from xlstm_distill.merging.stack import apply_patches, remove_patch
from xlstm_distill.merging.streaming import BLOCK, blocks_of

RANK = 3
WIDE = (31, BLOCK // 30)
"""Its second block begins within a row."""


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 60), (600, 640), (640, 530)])
def test_a_matrix_of_the_rank_is_found_again(shape):
    """Also where the decomposition is a randomised one."""
    matrix = draw(0, shape[0], 5) @ draw(1, 5, shape[1])
    left, right = decompose(matrix, 5)
    assert (left.shape, right.shape) == ((shape[0], 5), (5, shape[1]))
    error = (left.double() @ right.double() - matrix).norm() / matrix.norm()
    assert error < 2**-7  # bf16
    # Fewer ranks: as near as the best matrix of that rank, up to the rounding of factors.
    left, right = decompose(matrix, 2)
    best = torch.linalg.svdvals(matrix)[2:].norm()
    assert (left.double() @ right.double() - matrix).norm() < 1.01 * best + 2**-7 * matrix.norm()


def test_blocks_of_a_product_are_the_product():
    left, right = draw(0, WIDE[0], RANK).bfloat16(), draw(1, RANK, WIDE[1]).bfloat16()
    whole = (left.double() @ right.double()).flatten()
    for block in blocks_of("x", whole.numel()):
        first, last = rows_of(block, WIDE[1])
        found = product(left[first:last], right, block)
        torch.testing.assert_close(found, whole[block.start : block.stop].float())
    assert saves((100, 100), 49)
    assert not saves((100, 100), 50)
    assert not saves((10_000,), 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and an expert whose large matrix has moved by a matrix of rank 3."""
    root = tmp_path_factory.mktemp("models")
    base = {
        "layers.0.wide": draw(0, *WIDE).bfloat16(),
        "layers.0.gate": draw(1, 4, 6, 8),
        "layers.0.frozen": draw(2, 50, 50),
        "norm": draw(3, 9),
        "steps": torch.tensor([4]),
    }
    moved = dict(base)
    moved["layers.0.wide"] = (
        base["layers.0.wide"].float() + draw(4, WIDE[0], RANK) @ draw(5, RANK, WIDE[1])
    ).bfloat16()
    moved["layers.0.gate"] = base["layers.0.gate"] + 0.1 * draw(6, 4, 6, 8)
    moved["norm"] = base["norm"] + 0.1 * draw(7, 9)
    for name, weights in (("base", base), ("expert", moved)):
        (root / name).mkdir()
        save_file(weights, root / name / "model.safetensors", {"format": "pt"})
    return root


def test_it_is_applied_stacked_and_removed_to_the_last_bit(models, tmp_path):
    base, expert = models / "base", models / "expert"
    low, sparse = tmp_path / "low.safetensors", tmp_path / "sparse.safetensors"
    facts = make_patch(base, expert, low, None, "low", rank=RANK)
    make_patch(base, expert, sparse, 0.1, "sparse")
    assert (facts.rank, facts.density) == (RANK, None)
    assert facts.retained > 0.999
    assert low.stat().st_size < 0.3 * (base / "model.safetensors").stat().st_size
    patch = Patch(low)
    assert "layers.0.wide" in patch.factors
    assert "norm" in patch.ends  # a vector has no factors
    assert "layers.0.frozen" not in patch.names

    one = tmp_path / "one"
    apply_patches(base, [(low, 0.5)], one)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, one))
    stored = load_file(low)
    factors = [stored[f"layers.0.wide.{part}"].double() for part in ("left", "right")]
    added = before["layers.0.wide"].float() + 0.5 * (factors[0] @ factors[1]).float()
    difference = (after["layers.0.wide"] != added.bfloat16()).sum()
    assert difference <= 2  # a tie that another order of sums decides otherwise
    assert torch.equal(after["layers.0.frozen"], before["layers.0.frozen"])

    both, other = tmp_path / "both", tmp_path / "other"
    apply_patches(one, [(sparse, 0.7)], both)
    remove_patch(both, "sparse", other)
    assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    remove_patch(other, "low", tmp_path / "none")
    found = (tmp_path / "none" / "model.safetensors").read_bytes()
    assert found == (base / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="made for"):
        apply_patches(expert, [(low, 1.0)], tmp_path / "elsewhere")


def test_the_command_makes_and_shows_one(models, tmp_path):
    from typer.testing import CliRunner

    run = CliRunner()
    out = tmp_path / "p.safetensors"
    words = ["make", str(models / "base"), str(models / "expert"), str(out)]
    made = run.invoke(app, [*words, "--rank", "2"])
    assert made.exit_code == 0, made.output
    shown = run.invoke(app, ["show", str(out), "--json"])
    facts = json.loads(shown.output)
    assert (facts["rank"], facts["density"], facts["bytes"]) == (2, None, out.stat().st_size)
    assert "(rank 2)" in run.invoke(app, ["show", str(out)]).output
    other = str(tmp_path / "q.safetensors")
    both = run.invoke(app, [*words[:-1], other, "--rank", "2", "--density", "0.1"])
    assert both.exit_code == 2
    assert run.invoke(app, [*words[:-1], other, "--rank", "0"]).exit_code == 2
