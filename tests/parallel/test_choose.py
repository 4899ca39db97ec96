"""Keys and a number of processes give one layout, or a sentence that names the key."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plmtune.config.sections import ParallelConfig
from plmtune.errors import UserError
from plmtune.parallel.choose import choose_layout
from plmtune.parallel.layout import Layout


def chosen(world_size: int, strategy: Any = "auto", shard_size: int | None = None, **sizes: Any) -> Layout:
    return choose_layout(ParallelConfig(**sizes), strategy, shard_size, world_size=world_size, of_machine=4)[0]


class TestShorthand:
    @pytest.mark.parametrize(
        ("strategy", "layout"),
        [
            ("auto", Layout(dp_replicate=8)),
            ("ddp", Layout(dp_replicate=8)),
            ("fsdp", Layout(dp_shard=8)),
            ("hsdp", Layout(dp_replicate=2, dp_shard=4)),
        ],
    )
    def test_a_strategy_stands_for_sizes(self, strategy: str, layout: Layout) -> None:
        assert chosen(8, strategy) == layout
        assert layout.strategy == ("ddp" if strategy == "auto" else strategy)

    def test_a_strategy_shares_what_tp_and_pp_leave(self) -> None:
        assert chosen(8, "ddp", tp=2) == Layout(dp_replicate=4, tp=2)
        assert chosen(8, "fsdp", tp=2, pp=2) == Layout(dp_shard=2, tp=2, pp=2)
        assert chosen(16, "hsdp", tp=2) == Layout(dp_replicate=4, dp_shard=2, tp=2)  # of 4 processes of a machine 2

    def test_without_a_strategy_weights_are_sharded_beside_tp(self) -> None:
        assert chosen(8, tp=2) == Layout(dp_shard=4, tp=2)

    def test_one_of_the_data_sizes_determines_the_other(self) -> None:
        assert chosen(8, dp_replicate=2) == Layout(dp_replicate=2, dp_shard=4)
        assert chosen(8, dp_shard=2, tp=2) == Layout(dp_replicate=2, dp_shard=2, tp=2)


class TestProduct:
    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 64))
    def test_a_layout_has_as_many_processes_as_run(self, shard: int, tp: int, pp: int, cp: int, world: int) -> None:
        try:
            layout = chosen(world, dp_shard=shard, tp=tp, pp=pp, cp=cp)
        except UserError:
            assert world % (shard * tp * pp * cp)
        else:
            assert layout.num_processes == world
            assert (layout.dp_shard, layout.tp, layout.pp, layout.cp) == (shard, tp, pp, cp)

    def test_sizes_that_the_processes_do_not_make_are_named(self) -> None:
        with pytest.raises(UserError, match=r"key parallel: tp=2 x pp=2 needs a multiple of 4 processes, and 6 run"):
            chosen(6, tp=2, pp=2)
        with pytest.raises(UserError, match=r"dp_replicate=2 x dp_shard=2 needs 4 processes, and 8 run"):
            chosen(8, dp_replicate=2, dp_shard=2)
        with pytest.raises(UserError, match=r"and one runs. Start as many \(plmtune launch local --processes 2"):
            chosen(1, tp=2)

    def test_a_strategy_beside_sizes_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"key runtime.strategy: fsdp is shorthand .* parallel.dp_shard=2"):
            chosen(2, "fsdp", dp_shard=2)
