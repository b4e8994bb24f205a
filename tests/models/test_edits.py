"""Where an activation is read and changed: values computed by hand, then laws on every axis."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mechmem.models.edits import LATE, At, Edit, axes_of, lacks, layer_of, replacing
from mechmem.spec.errors import InputError

RESID, HEADS = "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z"
PATTERN = "blocks.1.attn.hook_pattern"
SCORES = "blocks.0.attn.hook_attn_scores"
SHAPES = {RESID: (3, 4, 5), HEADS: (3, 4, 6, 2), PATTERN: (3, 6, 4, 4), SCORES: (3, 6, 4, 4)}
ROWS = torch.tensor([4, 0, 2])
"""Numbers of the three rows in a set of five examples."""
POSITIONS = {
    "every": None,
    "shared": torch.tensor([[2]]),
    "two shared": torch.tensor([[3, 0]]),
    "own": torch.tensor([[0], [1], [2], [3], [1]]),
    "two of one's own": torch.tensor([[0, 1], [1, 0], [2, 3], [3, 1], [1, 2]]),
    "lacking": torch.tensor([[0, -1], [1, 0], [-1, -1], [3, 1], [-1, 2]]),
    "shared and lacking": torch.tensor([[1, -1]]),
}
UNITS = {"all": None, "one": (1,), "several": (4, 0, 3)}


def activation(hook: str) -> Tensor:
    """Distinct numbers."""
    shape = SHAPES[hook]
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def places() -> list[At]:
    return [
        At(hook, pos, units)
        for hook, pos, units in itertools.product(SHAPES, POSITIONS.values(), UNITS.values())
        if units is None or hook != RESID
    ]


def positions_of(at: At, row: int) -> list[int]:
    """The positions of a row, in their order; -1 where it lacks one."""
    if at.pos is None:
        return list(range(4))
    return at.pos[0 if len(at.pos) == 1 else int(ROWS[row])].tolist()


def chosen_cells(at: At) -> Tensor:
    """A mask of the chosen places, by a loop over rows and positions."""
    mask = torch.zeros(SHAPES[at.hook], dtype=torch.bool)
    pos_axis, _ = axes_of(at.hook)
    for row in range(3):
        for pos in positions_of(at, row):
            if pos >= 0:
                # Without the axes of rows and positions, that of units is the first.
                cell = mask[row].select(pos_axis - 1, pos)
                cell[slice(None) if at.units is None else list(at.units)] = True
    return mask


def written(at: At) -> str:
    name = next(k for k, v in POSITIONS.items() if v is at.pos)
    return f"{at.hook.split('_', 1)[1]}-{name}-{at.units}"


every_place = pytest.mark.parametrize("at", places(), ids=written)


# Values computed by hand


def test_take_gives_the_positions_of_each_row():
    x = torch.tensor([[[1.0], [2], [3]], [[4], [5], [6]]])
    rows = torch.tensor([1, 0])
    own = At(RESID, torch.tensor([[0, 2], [1, 0]]))
    assert own.take(x, rows)[..., 0].tolist() == [[2, 1], [4, 6]]
    assert At(RESID, torch.tensor([[2, 1]])).take(x, rows)[..., 0].tolist() == [[3, 2], [6, 5]]


def test_take_gives_the_first_position_where_there_is_none():
    x = torch.tensor([[[1.0], [2], [3]], [[4], [5], [6]]])
    at = At(RESID, torch.tensor([[1], [-1]]))
    assert at.take(x, torch.tensor([0, 1]))[..., 0].tolist() == [[2], [4]]


def test_take_gives_units_in_the_order_that_they_are_named():
    x = torch.tensor([[[10.0, 11, 12], [20, 21, 22]]])
    at = At("blocks.0.mlp.hook_post", torch.tensor([[1]]), (2, 0))
    assert at.take(x, torch.tensor([0])).tolist() == [[[22, 20]]]


def test_put_writes_the_positions_of_each_row():
    x = torch.tensor([[[1.0], [2], [3]], [[4], [5], [6]]])
    at = At(RESID, torch.tensor([[0, 2], [-1, 1]]))
    part = torch.tensor([[[70.0], [80]], [[90], [100]]])
    changed = at.put(x, part, torch.tensor([0, 1]))
    assert changed[..., 0].tolist() == [[70, 2, 80], [4, 100, 6]]


def test_a_pattern_is_changed_at_its_queries_and_heads():
    x = activation(PATTERN)
    at = At(PATTERN, torch.tensor([[2]]), (5,))
    part = torch.full((3, 1, 1, 4), -1.0, dtype=torch.float64)
    changed = at.put(x, part, ROWS)
    expected = x.clone()
    expected[:, 5, 2, :] = -1  # batch head pos key_pos
    assert torch.equal(changed, expected)


def test_the_mean_leaves_out_examples_that_lack_the_position():
    part = torch.tensor([[[1.0]], [[math.nan]], [[5]]])
    assert At(RESID, torch.tensor([[0], [-1], [1]])).mean(part).tolist() == [[[3]]]
    assert At(RESID, torch.tensor([[0]])).mean(torch.tensor([[[1.0]], [[2]]])).tolist() == [[[1.5]]]
    assert At(RESID).mean(torch.tensor([[[1.0], [2]], [[3], [6]]])).tolist() == [[[2], [4]]]


def test_a_mean_does_not_hide_what_is_no_number_where_no_position_is_missing():
    part = torch.tensor([[[1.0]], [[math.nan]]])
    assert At(RESID, torch.tensor([[0], [1]])).mean(part).isnan().all()


# Laws


@every_place
def test_take_is_what_a_loop_takes(at):
    x, pos_axis = activation(at.hook), axes_of(at.hook)[0]
    found = at.take(x, ROWS)
    for row in range(3):
        for i, pos in enumerate(positions_of(at, row)):
            expected = x[row].select(pos_axis - 1, max(pos, 0))
            expected = expected if at.units is None else expected[list(at.units)]
            assert torch.equal(found[row].select(pos_axis - 1, i), expected)


@every_place
def test_what_is_taken_is_a_copy(at):
    x = activation(at.hook)
    at.take(x, ROWS).fill_(-1)
    assert torch.equal(x, activation(at.hook))


@every_place
def test_putting_back_what_was_taken_changes_nothing(at):
    x = activation(at.hook)
    assert torch.equal(at.put(x, at.take(x, ROWS), ROWS), x)


@every_place
def test_put_touches_the_chosen_places_only_and_leaves_its_argument(at):
    x = activation(at.hook)
    changed = at.put(x, torch.full_like(at.take(x, ROWS), -1), ROWS)
    assert torch.equal(x, activation(at.hook))
    assert changed is not x
    assert torch.equal(changed == -1, chosen_cells(at))
    assert torch.equal(changed[changed != -1], x[~chosen_cells(at)])


@every_place
def test_what_was_put_is_taken_again(at):
    x = activation(at.hook)
    part = -1 - at.take(x, ROWS)
    again = at.take(at.put(x, part, ROWS), ROWS)
    pos_axis = axes_of(at.hook)[0]
    for row in range(3):
        for i, pos in enumerate(positions_of(at, row)):
            if pos >= 0:
                found, expected = (t[row].select(pos_axis - 1, i) for t in (again, part))
                assert torch.equal(found, expected)


@every_place
def test_the_rows_of_a_part_are_those_of_the_whole(at):
    """Chunks give what all rows together give."""
    x = activation(at.hook)
    part = -1 - at.take(x, ROWS)
    whole = at.put(x, part, ROWS)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(at.put(x[one], part[one], ROWS[one]), whole[one])
        assert torch.equal(at.take(x[one], ROWS[one]), at.take(x, ROWS)[one])


# Edits


@every_place
def test_an_edit_in_place_gives_what_a_pure_one_gives(at):
    x = activation(at.hook)
    pure = Edit(at, lambda own, rows: own * 2 + 1)

    def in_place(own: Tensor, rows: Tensor) -> Tensor:
        own *= 2
        own += 1
        return own

    known = pure.function(at.take(x, ROWS), ROWS)
    for edit in (Edit(at, in_place), Edit(at, in_place, constant=known)):
        assert torch.equal(edit(x, ROWS), pure(x, ROWS))
        assert torch.equal(x, activation(at.hook))
    assert torch.equal(pure(x, ROWS) != x, chosen_cells(at))


def test_an_edit_is_told_its_rows():
    told = []
    Edit(At(RESID), lambda own, rows: told.append(rows.tolist()) or own)(activation(RESID), ROWS)
    assert told == [[4, 0, 2]]


def test_an_edit_keeps_the_dtype_of_the_activation():
    assert (
        Edit(At(RESID), lambda own, _: own.float())(activation(RESID), ROWS).dtype == torch.float64
    )


def test_what_an_edit_returns_is_not_handed_on_itself():
    """Whoever keeps it may change it later, and it may be expanded."""
    kept = torch.ones(3, 4, 5, dtype=torch.float64)
    changed = Edit(At(RESID), lambda own, _: kept)(activation(RESID), ROWS)
    kept.zero_()
    assert (changed == 1).all()
    assert Edit(At(RESID), lambda own, _: kept[:, :1].expand(3, 4, 5))(
        activation(RESID), ROWS
    ).is_contiguous()


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda own, _: own[:1], r"\(1, 4, 5\)"),
        (lambda own, _: None, "NoneType"),
        (lambda own, _: 0.0, "float"),
        (lambda own, _: own.transpose(1, 2), r"\(3, 5, 4\)"),
    ],
    ids=["fewer rows", "nothing", "a number", "other axes"],
)
def test_an_edit_that_returns_another_shape_is_refused(function, found):
    message = rf"the edit at {RESID} returned {found} for \(3, 4, 5\): it must return"
    with pytest.raises(InputError, match=message):
        Edit(At(RESID), function)(activation(RESID), ROWS)


@every_place
def test_replacing_puts_the_values_of_the_rows(at):
    x = activation(at.hook)
    of_five = torch.stack([-1 - i - torch.zeros_like(at.take(x, ROWS)[0]) for i in range(5)])
    edit = replacing(at, of_five)
    changed = edit(x, ROWS)
    for row, number in enumerate(ROWS.tolist()):
        mask = chosen_cells(at)[row]
        assert (changed[row][mask] == -1 - number).all()
        assert torch.equal(changed[row][~mask], x[row][~mask])
    assert edit.constant is of_five
    assert edit.rowwise


@every_place
def test_replacing_by_one_value_is_for_all_rows_alike(at):
    x = activation(at.hook)
    value = torch.zeros_like(at.take(x, ROWS)[:1]) - 7
    assert torch.equal(replacing(at, value)(x, ROWS) == -7, chosen_cells(at))


def test_a_source_of_another_architecture_is_refused_by_its_name():
    edit = replacing(At(RESID), torch.zeros(5, 4, 6), source="the donor")
    with pytest.raises(InputError, match=r"at blocks.0.hook_resid_pre the donor has shape .* 6"):
        edit(activation(RESID), ROWS)


@pytest.mark.parametrize(
    ("missing", "pos", "expected"),
    [
        ([], [[0], [1]], False),
        ([0], [[0], [1]], True),
        ([0], [[-1], [1]], False),
        ([0], None, False),  # NaN that is no missing position: it is put as it is
        ([1], [[-1], [1]], True),
    ],
)
def test_a_value_lacks_what_is_missing_at_a_position_of_the_edited(missing, pos, expected):
    value = torch.ones(2, 1, 5)
    value[missing] = math.nan
    assert lacks(value, At(RESID, None if pos is None else torch.tensor(pos))) == expected


@pytest.mark.parametrize(("second", "expected"), [(1, True), (-1, False)])
def test_a_value_of_a_pattern_is_missing_at_a_query(second, expected):
    value = torch.ones(1, 6, 2, 4)
    value[:, :, 1] = math.nan
    assert lacks(value, At(PATTERN, torch.tensor([[0, second]]))) == expected


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("hook_embed", -1),
        ("hook_pos_embed", -1),
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.12.attn.hook_z", 12),
        ("ln_final.hook_normalized", LATE),
        ("unembed.hook_out", LATE),
    ],
)
def test_an_edit_knows_its_layer(hook, layer):
    edit = Edit(At(hook), lambda own, _: own)
    assert (layer_of(hook), edit.layer, edit.hook, edit.at.layer) == (layer, layer, hook, layer)
