"""Merging whole models: the formulas, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plmtune.errors import UserError
from plmtune.models import merging
from plmtune.models.adapters import load_model
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte
from plmtune.tokenizers.train_bpe import train_bpe


def drawn(count: int, shape: tuple[int, ...] = (3, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def model(directory: Path, seed: int = 1, *, hidden_dim: int = 40, rope_theta: float = 1e4, **sizes: Any) -> Path:
    attention = component("attention", "gqa", num_kv_heads=2, rope_theta=rope_theta)
    ffn = component("ffn", "swiglu", hidden_dim=hidden_dim)
    sizes = {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "max_seq_len": 32} | sizes
    made = llama(257, attention=attention, ffn=ffn, **sizes)
    made.init_weights(torch.Generator().manual_seed(seed))
    save_model(made, None, directory)
    byte().save(directory)
    return directory


class TestFormulas:
    def test_average_is_the_weighted_mean(self) -> None:
        a, b, c = drawn(3)
        assert torch.allclose(merging.average([a, b, c], None, [1, 2, 1]), (a + 2 * b + c) / 4)

    def test_slerp_keeps_the_length_and_divides_the_angle(self) -> None:
        a, b = (t / t.norm() for t in drawn(2))
        third = merging.slerp([a, b], None, [2, 1])
        assert float(third.norm()) == pytest.approx(1, abs=1e-6)
        whole = math.acos(float((a * b).sum()))
        assert math.acos(float((a * third).sum())) == pytest.approx(whole / 3, abs=1e-5)

    @pytest.mark.parametrize("factor", [2.0, 0.0, -1.0])
    def test_slerp_of_parallel_tensors_is_their_average(self, factor: float) -> None:
        (a,) = drawn(1)
        assert torch.allclose(merging.slerp([a, factor * a], None, [1, 1]), a * (1 + factor) / 2)

    def test_task_arithmetic_adds_the_differences_to_the_base(self) -> None:
        base, a, b = drawn(3)
        assert torch.allclose(merging.task_arithmetic([a, b], base, [0.5, -2]), base + (a - base) / 2 - 2 * (b - base))

    @pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
    def test_ties_equals_the_formula_written_naively(self, density: float) -> None:
        base, *tensors = drawn(4)
        weights = [1.0, 2.0, 0.5]
        expected = base.clone().flatten()
        deltas = [(t - base).flatten().tolist() for t in tensors]
        count = math.ceil(density * len(expected))
        kept = []
        for delta in deltas:
            largest = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[:count]
            kept.append([value if i in largest else 0.0 for i, value in enumerate(delta)])
        for i in range(len(expected)):
            total = sum(w * k[i] for w, k in zip(weights, kept, strict=True))
            agree = [(w, k[i]) for w, k in zip(weights, kept, strict=True) if k[i] * total > 0]
            if agree:
                expected[i] += sum(w * v for w, v in agree) / sum(w for w, _ in agree)
        assert torch.allclose(merging.ties(density)(tensors, base, weights).flatten(), expected, atol=1e-6)


class TestMergeModels:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> list[Path]:
        """Two models of one shape."""
        return [model(tmp_path / str(seed), seed) for seed in (1, 2)]

    def test_each_parameter_is_merged_once_and_saved_as_the_first_was(self, pair: list[Path], tmp_path: Path) -> None:
        merged = merging.merge_models(pair, merging.average, [1, 3])
        states = [dict(load_model(directory).named_parameters()) for directory in pair]
        for name, parameter in merged.named_parameters():
            assert torch.allclose(parameter, (states[0][name] + 3 * states[1][name]) / 4, atol=1e-6), name
        save_model(merged, None, tmp_path / "out")
        assert (tmp_path / "out/config.json").read_bytes() == (pair[0] / "config.json").read_bytes()

    def test_the_base_alone_is_what_equal_models_give(self, pair: list[Path]) -> None:
        merged = merging.merge_models([pair[0], pair[0]], merging.ties(0.3), [1, 1], base=pair[0])
        for ours, theirs in zip(merged.parameters(), load_model(pair[0]).parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_another_shape_is_named_by_its_tensor(self, pair: list[Path], tmp_path: Path) -> None:
        other = model(tmp_path / "wide", hidden_dim=24)
        with pytest.raises(UserError, match=r"wide: layers.0.ffn.\w+.weight is \[\d+, \d+\], and in .* models of one"):
            merging.merge_models([pair[0], other], merging.average, [1, 1])

    def test_another_computation_of_the_same_shapes_is_refused(self, pair: list[Path], tmp_path: Path) -> None:
        other = model(tmp_path / "other", rope_theta=500.0)
        with pytest.raises(UserError, match=r"model\.attention\.rope_theta is 500\.0, and there 10000\.0\. Merge"):
            merging.merge_models([pair[0], other], merging.average, [1, 1])

    def test_another_context_or_initial_deviation_changes_nothing(self, pair: list[Path], tmp_path: Path) -> None:
        other = model(tmp_path / "other", max_seq_len=64, init_std=0.5)
        assert merging.merge_models([pair[0], other], merging.average, [1, 1]).max_seq_len == 32

    def test_another_tokenizer_is_refused(self, pair: list[Path]) -> None:
        train_bpe(["some text"], 260).save(pair[1])
        with pytest.raises(UserError, match="another tokenizer"):
            merging.merge_models(pair, merging.average, [1, 1])

    @pytest.mark.parametrize("place", [0, 1, "base"])
    @pytest.mark.parametrize("number", [math.nan, -math.inf])
    def test_a_number_that_is_not_finite_is_refused_by_its_model(
        self, pair: list[Path], tmp_path: Path, place: int | str, number: float
    ) -> None:
        base = model(tmp_path / "base", 3)
        wrong = base if isinstance(place, str) else pair[place]
        weights = load_file(wrong / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 2] = number
        save_file(weights, wrong / "model.safetensors")
        with pytest.raises(UserError, match=rf"{wrong}: its weights are not finite \(layers.1.ffn.up_proj.weight"):
            merging.merge_models(pair, merging.ties(0.2), [1, 1], base=base)
