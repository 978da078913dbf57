import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import SchemeError
from bitgrain.numerics import (
    Granularity,
    QuantSpec,
    get_format,
    parse_granularity,
    per_block,
    per_channel,
    per_group,
    per_row_group,
    per_run,
    per_tensor,
    per_token,
)
from bitgrain.numerics.granularity import from_tiles, to_tiles
from bitgrain.recipes import Scheme

SIZES = st.one_of(st.none(), st.integers(1, 6))


@given(SIZES, SIZES, st.lists(st.integers(1, 5), min_size=0, max_size=3))
def test_tiles_hold_the_elements_that_loops_find(rows, cols, shape):
    granularity = Granularity(rows, cols)
    x = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    tiles = to_tiles(x, granularity, fill=-1.0)
    assert tuple(tiles.shape[:2]) == granularity.tiles(tuple(shape))
    assert torch.equal(from_tiles(tiles, granularity, tuple(shape)), x)
    matrix = x.reshape(-1, shape[-1] if shape else 1)
    tile_rows, tile_cols = rows or matrix.shape[0], cols or matrix.shape[1]
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            block = matrix[i * tile_rows : (i + 1) * tile_rows, j * tile_cols : (j + 1) * tile_cols]
            assert tiles[i, j][tiles[i, j] >= 0].tolist() == block.flatten().tolist()
    whole = matrix.shape[0] % tile_rows == 0 and matrix.shape[1] % tile_cols == 0
    assert granularity.divides(tuple(shape)) == whole == (not bool((tiles < 0).any()))


@pytest.mark.parametrize(
    "granularity",
    [per_tensor(), per_channel(), per_channel(1), per_token(), per_group(128), per_row_group(4), per_block(64, 128)],
)
def test_names_read_back(granularity):
    assert parse_granularity(granularity.name) == granularity
    assert parse_granularity(str(granularity).upper().replace(",", " ,")) == granularity


@pytest.mark.parametrize("text", ["", "group", "per_group", "per_group()", "per_group(1,2)", "per_group(all)", "a(3)"])
def test_unknown_forms_list_the_known_ones(text):
    with pytest.raises(SchemeError, match=r"per_block\(128, 128\)"):
        parse_granularity(text)


def test_empty_tiles_are_refused():
    with pytest.raises(SchemeError, match="at least one row"):
        per_group(0)
    with pytest.raises(SchemeError, match="channel axis"):
        per_channel(2)


def test_runs_go_on_over_the_ends_of_rows():
    x = torch.arange(3 * 10).view(3, 10).float()
    runs = per_run(8)
    assert (runs.name, parse_granularity("per_run(8)"), runs.tiles((3, 10))) == ("per_run(8)", runs, (1, 4))
    assert runs.divides((4, 10))
    assert not runs.divides((3, 10))
    tiles = to_tiles(x, runs)
    assert tiles[0, 1].tolist() == list(range(8, 16))
    assert tiles[0, 3].tolist() == [*range(24, 30), 0, 0]
    assert torch.equal(from_tiles(tiles, runs, (3, 10)), x)


def test_runs_are_for_scales_of_scales():
    with pytest.raises(SchemeError, match="runs over the ends of rows"):
        Scheme("runs", QuantSpec(get_format("int4"), per_run(64)))
