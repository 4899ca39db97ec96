from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group import in_group
from safetensors.torch import save_file
from torch import Tensor

from plmtune.errors import UserError
from plmtune.losses.log_probs import log_probs
from plmtune.models.digest import model_digest
from plmtune.models.llama import llama
from plmtune.modules.decoder import Decoder
from plmtune.preference import batches as comparisons_of_data
from plmtune.preference.batches import PreferenceBatches
from plmtune.preference.comparisons import Comparison, ComparisonBatch
from plmtune.preference.reference import reference_log_probs
from plmtune.registry import component
from plmtune.training.runtime import Runtime

NUM = 7


@pytest.fixture(autouse=True)
def one_row_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons_of_data, "_TOKENS", 1)


@functools.cache
def model() -> Decoder:
    torch.manual_seed(0)
    return llama(
        40,
        attention=component("attention", "gqa", num_kv_heads=1),
        ffn=component("ffn", "swiglu", hidden_dim=16),
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        max_seq_len=32,
        init_std=0.3,
    )


@functools.cache
def comparisons() -> list[Comparison]:
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> Any:
        return draw.integers(0, 40, draw.integers(low, high), dtype=np.int32)

    made = [Comparison(0, ids(3, 6), ids(1, 8), ids(1, 8), pair, f"row {pair}") for pair in range(NUM)]
    return [*made[:-1], replace(made[-1], rejected=None)]


def share(rank: int = 0, world_size: int = 1, size: int = 1) -> Callable[[], Iterator[ComparisonBatch]]:
    return PreferenceBatches(
        comparisons(),
        seq_len=16,
        global_batch_size=4,
        micro_batch_size=size,
        seed=1,
        rank=rank,
        world_size=world_size,
    ).all


def compute(batch: ComparisonBatch) -> Tensor:
    hidden = model()(batch.tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
    at = hidden.flatten(0, 1)[batch.positions]
    return log_probs(at, model().head_weight, batch.targets, batch.completion, 2 * len(batch.index))


def never(batch: ComparisonBatch) -> Tensor:
    raise AssertionError("computed although it was kept")


def naive() -> list[list[float]]:
    """Each answer alone behind its prompt, all logits at once."""

    def one(prompt: Any, answer: Any) -> float:
        if answer is None:
            return 0.0
        tokens = torch.from_numpy(np.concatenate([prompt, answer])).long()[None]
        with torch.no_grad():
            log_p = torch.log_softmax(model()(tokens)[0, :-1], dim=1)
        return float(log_p.gather(1, tokens[0, 1:, None])[-len(answer) :].sum())

    return [[one(c.prompt, c.chosen), one(c.prompt, c.rejected)] for c in comparisons()]


class Cache:
    """A directory, and what is asked of it with everything but one thing as it was."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.told = directory, list[str]()

    def ask(self, how: Callable[[ComparisonBatch], Tensor] = never, **other: Any) -> Tensor:
        asked = {"model_digest": "m", "batches": share(), "num": NUM, "arithmetic": "cpu float32", **other}
        return reference_log_probs(compute=how, directory=self.directory, log=self.told.append, **asked)

    def files(self) -> list[Path]:
        return sorted(self.directory.iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "reference")


class TestReferenceLogProbs:
    def test_are_those_of_each_answer_alone_behind_its_prompt(self, cache: Cache) -> None:
        values = cache.ask(compute)
        assert values.shape == (NUM, 2) and values.dtype == torch.float32 and not values.requires_grad
        for ours, theirs in zip(values.tolist(), naive(), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)

    def test_are_computed_once_and_then_read_bit_for_bit(self, cache: Cache) -> None:
        first = cache.ask(compute)
        assert torch.equal(cache.ask(never), first)
        assert [path.suffix for path in cache.files()] == [".json", ".safetensors"]
        assert not cache.told

    def test_do_not_depend_on_the_size_of_micro_batches(self, cache: Cache) -> None:
        first = cache.ask(compute)
        assert torch.equal(cache.ask(never, batches=share(size=3)), first)

    def test_that_are_not_finite_are_refused_and_not_kept(self, cache: Cache) -> None:
        with pytest.raises(UserError, match=r"comparison \d .* not finite. Has the model's training diverged"):
            cache.ask(lambda batch: compute(batch) / 0)
        assert not cache.directory.exists()

    def test_that_cannot_be_written_are_told_in_a_sentence(self, cache: Cache) -> None:
        cache.directory.write_text("a file where the directory should be")
        with pytest.raises(UserError, match="cannot be kept"):
            cache.ask(compute)


class TestStaleness:
    """Whatever the numbers follow from is in the key: with any bit of it changed they are computed again."""

    def changed(self, **fields: Any) -> Callable[[], list[ComparisonBatch]]:
        """All batches, with fields of the second one given by functions of the old."""

        def batches() -> list[ComparisonBatch]:
            held = list(share()())
            held[1] = replace(held[1], **{name: change(getattr(held[1], name)) for name, change in fields.items()})
            return held

        return batches

    @staticmethod
    def one_more(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] += 1
        return tensor

    @pytest.mark.parametrize("name", ["tokens", "input_pos", "targets"])
    def test_an_id_or_a_position(self, cache: Cache, name: str) -> None:
        self.is_another_key(cache, batches=self.changed(**{name: self.one_more}))

    def test_where_an_answer_is_predicted_and_whose_it_is(self, cache: Cache) -> None:
        self.is_another_key(cache, batches=self.changed(positions=lambda places: places.roll(1)))
        self.is_another_key(cache, batches=self.changed(completion=lambda owner: owner ^ 1))

    def test_a_bit_of_a_mask(self, cache: Cache) -> None:
        def unmask(mask: Tensor) -> Tensor:
            mask = mask.clone()
            mask.view(-1)[1] ^= True
            return mask

        self.is_another_key(cache, batches=self.changed(mask=unmask))

    def test_the_same_ids_in_rows_of_another_shape(self, cache: Cache) -> None:
        self.is_another_key(cache, batches=self.changed(tokens=lambda tokens: tokens.T))

    def test_the_order_of_the_comparisons(self, cache: Cache) -> None:
        turned = [replace(batch, index=NUM - 1 - batch.index) for batch in share()()]
        self.is_another_key(cache, batches=lambda: turned)

    def test_the_model_and_the_arithmetic(self, cache: Cache) -> None:
        self.is_another_key(cache, model_digest="n")
        self.is_another_key(cache, arithmetic="cpu bfloat16")

    def test_the_version_of_torch(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.ask(compute)
        monkeypatch.setattr(torch, "__version__", "2.99.0")
        with pytest.raises(AssertionError, match="although it was kept"):
            cache.ask(never)

    def is_another_key(self, cache: Cache, **other: Any) -> None:
        first = cache.ask(compute)
        asked = list[int]()

        def zeros(batch: ComparisonBatch) -> Tensor:
            asked.append(1)
            return torch.zeros(2 * len(batch.index))

        assert not cache.ask(zeros, **other).any() and asked
        assert torch.equal(cache.ask(never), first)


class TestDamage:
    @pytest.mark.parametrize("suffix", [".json", ".safetensors"])
    def test_any_flipped_byte_is_found_and_the_numbers_made_again(self, cache: Cache, suffix: str) -> None:
        first = cache.ask(compute)
        (path,) = (path for path in cache.files() if path.suffix == suffix)
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            assert torch.equal(cache.ask(compute), first)
            assert path.read_bytes() == whole
            assert "cannot be used" in cache.told.pop() and not cache.told

    @pytest.mark.parametrize("kept", [0, 9, 60])
    def test_a_file_that_was_cut_is_made_again(self, cache: Cache, kept: int) -> None:
        first = cache.ask(compute)
        for path in cache.files():
            path.write_bytes(path.read_bytes()[:kept])
            assert torch.equal(cache.ask(compute), first)
            assert torch.equal(cache.ask(never), first)
        assert len(cache.told) == 2

    def test_numbers_that_a_kill_left_without_their_note_count_for_nothing(self, cache: Cache) -> None:
        first = cache.ask(compute)
        note, numbers = cache.files()
        note.unlink()
        save_file({"log_probs": torch.zeros(NUM, 2)}, numbers)
        assert torch.equal(cache.ask(compute), first) and not cache.told

    def test_numbers_of_another_key_under_this_name_are_not_used(self, cache: Cache) -> None:
        first = cache.ask(compute)
        mine = cache.files()
        cache.ask(lambda batch: torch.zeros(2 * len(batch.index)), model_digest="n")
        others = [path for path in cache.files() if path not in mine]
        for other, own in zip(others, mine, strict=True):
            own.write_bytes(other.read_bytes())
        assert torch.equal(cache.ask(compute), first)
        assert "it is of the key" in cache.told[0]

    def test_nothing_half_written_is_left_when_the_disk_is_full(
        self, cache: Cache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left"):
            cache.ask(compute)
        assert not cache.files()


def on_ranks(directory: Path) -> dict[str, Any]:
    comparisons_of_data._TOKENS = 1
    with Runtime.choose(device="cpu", precision="fp32", strategy="fsdp").start() as runtime:
        batches = share(runtime.rank, runtime.world_size)
        counted = list[int]()

        def counting(batch: ComparisonBatch) -> Tensor:
            counted.append(len(batch.index))
            return compute(batch)

        digest = model_digest(model())
        place = directory / "reference"
        sharded = functools.partial(reference_log_probs, digest, batches, directory=place, num=NUM, log=print)
        first = sharded(counting, arithmetic="x")
        second = sharded(never, arithmetic="x")
        runtime.distribute(model())
        return {
            "equal": torch.equal(first, second),
            "values": first.tolist(),
            "computed": counted,
            "digests": [digest, model_digest(model())],
            "kept": sorted(path.name for path in (directory / "reference").iterdir()),
        }


class TestManyProcesses:
    def test_share_the_work_know_all_numbers_and_hash_a_sharded_model_as_a_whole_one(self, tmp_path: Path) -> None:
        ranks = in_group(on_ranks, 2, tmp_path)
        assert all(rank["equal"] for rank in ranks)
        assert ranks[0]["values"] == ranks[1]["values"]
        for ours, theirs in zip(ranks[0]["values"], naive(), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        first, second = (rank["computed"] for rank in ranks)
        assert len(first) == len(second) and 0 < sum(first) < NUM and sum(first) + sum(second) == NUM
        assert len(ranks[0]["kept"]) == 2
        alone = Cache(tmp_path / "reference").ask(never, model_digest=model_digest(model()), arithmetic="x")
        assert alone.tolist() == ranks[0]["values"]  # one process finds what two have kept
        assert {digest for rank in ranks for digest in rank["digests"]} == {model_digest(model())}
