"""Views and the columns that follow them, against slices, loops in NumPy, torchvision and rendered planes."""

from functools import reduce
from math import floor, nan

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch.utils._python_dispatch import TorchDispatchMode

from mtl.random import stream
from mtl.views.moves import Directions, Fixed, Metres, Picture, Pixels, see
from mtl.views.view import Crop, Flip, ScaleCrop, View

SEED, EPOCH = 3, 5
CHAINS = [
    (Crop(4),),
    (Flip(),),
    (Crop(2), Flip()),
    (Flip(), Crop(2)),
    (ScaleCrop((1.0, 1.2, 1.5)), Flip()),
    (Flip(), ScaleCrop((1.6,)), Crop(3)),
]


def named(name: str) -> torch.Generator:
    return stream(SEED, name, EPOCH)


def drawn(augments, size: int, shape: tuple[int, int]) -> View:
    return reduce(View.then, (a.draw(size, shape, named) for a in augments), View.identity(size))


def scaled(scales, corners) -> View:
    return View(1 / torch.tensor(scales)[:, None].expand(-1, 2), torch.tensor(corners, dtype=torch.float32))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def looped(column: np.ndarray, rows, view: View, fill: float, bilinear: bool) -> np.ndarray:
    """The definition, one pixel after another, in float64."""
    height, width = column.shape[1:3]
    a, b = view.a.double().numpy(), view.b.double().numpy()
    out = np.full((len(rows), *column.shape[1:]), fill, np.float64)
    for n, row in enumerate(rows):
        for i in range(height):
            for j in range(width):
                # A view is float32: what lies on the edge between two pixels may be 1e-7 beside it.
                y, x = round(a[n, 0] * (i + 0.5) + b[n, 0], 5), round(a[n, 1] * (j + 0.5) + b[n, 1], 5)
                if not (0 <= y < height and 0 <= x < width):
                    continue
                if not bilinear:
                    out[n, i, j] = column[row, floor(y), floor(x)]
                    continue
                top, left, value = floor(y - 0.5), floor(x - 0.5), 0.0
                for r in (top, top + 1):
                    for c in (left, left + 1):
                        weight = (1 - abs(y - 0.5 - r)) * (1 - abs(x - 0.5 - c))
                        inside = min(max(r, 0), height - 1), min(max(c, 0), width - 1)
                        value = value + weight * column[(row, *inside)].astype(np.float64)
                out[n, i, j] = value
    return out


# The draws


def test_crop_and_flip_draw_todays_numbers():
    crops = torch.randint(0, 2 * 4 + 1, (2, 50), generator=named("crop"))
    flips = torch.rand(50, generator=named("flip")) < 0.5
    crop, flip = Crop(4).draw(50, (20, 30), named), Flip().draw(50, (20, 30), named)
    assert torch.equal(crop.b, torch.stack([crops[0] - 4, crops[1] - 4], 1).float()) and (crop.a == 1).all()
    assert torch.equal(flip.a[:, 1] == -1, flips) and torch.equal(flip.b[:, 1], 30.0 * flips)
    assert (flip.a[:, 0] == 1).all() and (flip.b[:, 0] == 0).all()


def test_scale_crop_draws_every_scale_and_corner_and_nothing_outside():
    view = ScaleCrop((1.0, 1.25, 2.0)).draw(4000, (10, 20), named)
    assert view.a.dtype == view.b.dtype == torch.float32 and not view.whole
    for scale, rows, columns in ((1.0, 0, 0), (1.25, 2, 4), (2.0, 5, 10)):
        mine = view.a[:, 0] == 1 / scale
        assert 1200 < mine.sum() < 1470
        assert set(view.b[mine, 0].tolist()) == set(range(rows + 1))
        assert set(view.b[mine, 1].tolist()) == set(range(columns + 1))
    assert torch.equal(view.a[:, 0], view.a[:, 1])


@pytest.mark.parametrize("shape", [(288, 384), (32, 32), (31, 47), (7, 5)])
def test_scale_crop_stays_inside_at_every_size(shape):
    view = ScaleCrop((1.2, 1.5, 1.7, 3.0)).draw(500, shape, named)
    assert (view.b >= 0).all() and (view.a * torch.tensor(shape) + view.b <= torch.tensor(shape) + 1e-3).all()
    assert (see(torch.ones(1, *shape), torch.zeros(500, dtype=torch.int64), view, 0) == 1).all()


def test_wrong_arguments_are_refused():
    for padding in (-1, 1.5):
        with pytest.raises(ValueError, match="padding: "):
            Crop(padding)
    for scales in ((), (1.2, 0.5), (nan,), (float("inf"),)):
        with pytest.raises(ValueError, match="scales: "):
            ScaleCrop(scales)


# Whole views: bit for bit


def todays(padded, index, top, left, flip, padding):
    """`crop_and_flip` of mtl/data/batches.py, as it was before views."""
    height, width = padded.shape[1] - 2 * padding, padded.shape[2] - 2 * padding
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


@pytest.mark.parametrize("padding", [0, 1, 4, 40])
def test_crop_and_flip_of_images_equal_todays_and_torchvisions(padding):
    images = numbers(60, 12, 9, 3)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:48]
    view = drawn((Crop(padding), Flip()), 48, (12, 9))
    seen = Picture()(images, rows, view)

    (top, left), flip = (view.b[:, 0], torch.where(view.a[:, 1] < 0, view.b[:, 1] - 9, view.b[:, 1])), view.a[:, 1] < 0
    top, left = (t.long() + padding for t in (top, left))
    crops = torch.randint(0, 2 * padding + 1, (2, 48), generator=named("crop"))
    assert torch.equal(torch.stack([top, left]), crops)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    expected = todays(padded, rows, top, left, flip, padding)
    assert seen.dtype == torch.uint8 and torch.equal(seen, expected) and seen.stride() == expected.stride()
    for n, row in enumerate(rows):
        one = TF.crop(padded[row].permute(2, 0, 1), int(top[n]), int(left[n]), 12, 9)
        one = TF.hflip(one) if flip[n] else one
        assert torch.equal(seen[n].permute(2, 0, 1), one)
        sliced = padded[row, top[n] : top[n] + 12, left[n] : left[n] + 9]
        assert torch.equal(seen[n], sliced.flip(1) if flip[n] else sliced)


def test_whole_views_are_exact_to_the_last_of_4096_pixels():
    column = torch.arange(4096, dtype=torch.int32)[None, None, :].repeat(1, 3, 1)
    for shift in (-4095, -1, 0, 2047, 4095):
        crop = View(torch.ones(1, 2), torch.tensor([[0.0, shift]]), whole=True)
        flip = View(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 4096.0]]), whole=True)
        expected = torch.arange(4096) + shift
        expected[(expected < 0) | (expected >= 4096)] = -100
        zero = torch.zeros(1, dtype=torch.int64)
        assert torch.equal(Pixels()(column, zero, crop)[0, 1], expected)
        assert torch.equal(Pixels()(column, zero, crop.then(flip))[0, 1], expected.flip(0))


@pytest.mark.parametrize("augments", CHAINS)
def test_the_host_knows_whether_a_view_is_whole(augments):
    view = drawn(augments, 20, (12, 9))
    numbers_whole = bool((view.a.abs() == 1).all() and (view.b == view.b.round()).all())
    assert view.whole == numbers_whole == view.take(slice(3)).whole == view.to(torch.device("cpu")).whole


# Any view, against the definition


@pytest.mark.parametrize("augments", CHAINS)
def test_every_chain_equals_the_definition(augments):
    view, rows = drawn(augments, 12, (12, 9)), torch.arange(12).flip(0)
    images, labels = numbers(12, 12, 9, 3), numbers(12, 12, 9)
    picture = Picture()(images, rows, view)
    assert picture.dtype == (torch.uint8 if view.whole else torch.float32)
    np.testing.assert_allclose(picture, looped(images.numpy(), rows, view, 0, not view.whole), rtol=0, atol=0.01)
    np.testing.assert_array_equal(Pixels()(labels, rows, view), looped(labels.numpy(), rows, view, -100, False))


@pytest.mark.parametrize("augments", CHAINS)
def test_composing_views_equals_looking_twice(augments):
    """Where both lie inside: a composed view has no border in between."""
    marked = torch.arange(1, 12 * 9 + 1).view(1, 12, 9).repeat(6, 1, 1)
    *first, last = augments
    one, two = drawn(first, 6, (12, 9)), last.draw(6, (12, 9), named)
    twice = Pixels()(Pixels()(marked, torch.arange(6), one), torch.arange(6), two)
    once = Pixels()(marked, torch.arange(6), one.then(two))
    if not first or one.whole:
        assert torch.equal(twice[twice != -100], once[twice != -100])
    else:  # the middle of a pixel twice rounded: at most a pixel away
        both = (twice != -100) & (once != -100)
        away = (twice - once)[both]
        assert (((away + 4) % 9 - 4).abs() <= 1).all() and ((away + 4).div(9, rounding_mode="floor").abs() <= 1).all()


def test_take_gives_the_views_of_the_samples():
    view, images = drawn((Crop(2), Flip()), 30, (12, 9)), numbers(30, 12, 9, 3)
    index = torch.tensor([7, 7, 0, 29])
    assert torch.equal(Picture()(images, index, view.take(index)), Picture()(images, torch.arange(30), view)[index])


@pytest.mark.parametrize("scale, crop", [(1.2, (240, 320)), (1.5, (192, 256)), (2.0, (144, 192))])
@pytest.mark.parametrize("mirrored", [False, True])
def test_scale_crop_of_a_label_map_equals_interpolate_in_every_pixel(scale, crop, mirrored):
    """MTAN's NYUv2: 288 × 384. At scale 1.5, a third of the centres lie on the edge between two pixels."""
    labels, (height, width) = numbers(2, 288, 384), crop
    corners = [(0, 0), (288 - height, 384 - width), (17, 31), (5, 0)]
    view, rows = scaled([scale] * 4, corners), torch.tensor([0, 1, 1, 0])
    if mirrored:
        view = view.then(View(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 384.0]]), whole=True))
    seen = Pixels()(labels, rows, view)
    for n, (i, j) in enumerate(corners):
        cut = labels[rows[n], i : i + height, j : j + width].float()
        expected = F.interpolate(cut[None, None], (288, 384), mode="nearest-exact")[0, 0].long()
        assert torch.equal(seen[n], expected.flip(1) if mirrored else expected)


SCALES = [  # s, (height, width) of a crop of 288 × 384, tolerance
    (2.0, (144, 192), 0.0),
    (4 / 3, (216, 288), 0.0),
    # 1/s is no float32 number: positions up to 384 are wrong by 3e-5 of a pixel, and neighbours differ by up to 255.
    (1.2, (240, 320), 0.01),
    (1.5, (192, 256), 0.01),
]


def resized(image: torch.Tensor, corner: tuple[int, int], crop: tuple[int, int], size: tuple[int, int]):
    """(H, W, C) float64, the crop enlarged by F.interpolate. Its neighbours are the picture's own pixels.

    F.interpolate knows nothing outside its argument. So a larger crop is enlarged, and its margin is cut off.
    """
    (i, j), (height, width), m = corner, crop, 30
    margin = m * size[0] // height  # without a rest, for all scales here
    around = F.pad(
        image.permute(2, 0, 1)[None].double(), (m, m, m, m), mode="replicate"
    )  # beyond the picture: its edge
    cut = around[:, :, i : i + height + 2 * m, j : j + width + 2 * m]
    seen = F.interpolate(cut, [n + 2 * margin for n in size], mode="bilinear", align_corners=False)
    return seen[0, :, margin:-margin, margin:-margin].permute(1, 2, 0)


@pytest.mark.parametrize("scale, crop, tolerance", SCALES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_scale_crop_of_an_image_equals_interpolate_in_every_pixel(scale, crop, tolerance, mirrored):
    images, size = numbers(1, 288, 384, 3), (288, 384)
    corners = [(0, 0), (288 - crop[0], 384 - crop[1]), (17, 31), (0, 31)]
    view = scaled([scale] * 4, corners)
    if mirrored:
        view = view.then(View(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 384.0]]), whole=True))
    seen = Picture()(images, torch.zeros(4, dtype=torch.int64), view)
    for found, corner in zip(seen, corners, strict=True):
        expected = resized(images[0], corner, crop, size)
        expected = expected.flip(1) if mirrored else expected
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale, crop", [one[:2] for one in SCALES])
def test_scale_crop_is_torchvisions_except_at_the_crops_edge(scale, crop):
    """torchvision cuts first, and repeats the crop's edge. Our edge pixels see the picture's pixels beside the crop."""
    images = numbers(1, 288, 384, 3)
    (seen,) = Picture()(images, torch.zeros(1, dtype=torch.int64), scaled([scale], [(17, 31)]))
    expected = TF.resized_crop(images[0].permute(2, 0, 1).float(), 17, 31, *crop, [288, 384], antialias=False)
    differ = (seen - expected.permute(1, 2, 0)).abs().amax(2) > 0.02
    assert not differ[1:-1, 1:-1].any() and differ[0].any() and differ[:, -1].any()


@pytest.mark.parametrize("scale, crop", [one[:2] for one in SCALES])
def test_a_crop_shows_almost_what_mtans_code_shows(scale, crop):
    """MTAN's code aligns the centres of the corners, and a label is that of the pixel's upper left corner.

    In these maps each pixel's value is its column, so differences are distances: up to (1 - 1/s) / 2 of a pixel in
    images, up to one pixel in labels.
    """
    column = torch.arange(384.0).expand(288, 384)
    view, row = scaled([scale], [(17, 31)]), torch.zeros(1, dtype=torch.int64)
    cut = column[None, None, 17 : 17 + crop[0], 31 : 31 + crop[1]]
    theirs = F.interpolate(cut, (288, 384), mode="bilinear", align_corners=True)[0, 0]
    apart = (Picture()(column[None, ..., None], row, view)[0, ..., 0] - theirs).abs().max()
    assert apart == pytest.approx((1 - 1 / scale) / 2, abs=1e-3)
    theirs = F.interpolate(cut, (288, 384), mode="nearest")[0, 0]
    apart = Pixels()(column.long()[None], row, view)[0] - theirs
    assert ((apart == 0) | (apart == 1)).all()


def test_a_bilinear_picture_at_scale_1_is_the_picture():
    images = numbers(2, 12, 9, 3)
    assert torch.equal(Picture()(images, torch.arange(2), scaled([1.0, 1.0], [(0, 0), (0, 0)])), images.float())


# What a label means


FLIPPED = View(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 9.0]]), whole=True)
MOVED = [
    (Picture(), lambda: numbers(1, 12, 9, 3)),
    (Pixels(), lambda: numbers(1, 12, 9)),
    (Metres(), lambda: torch.rand(1, 12, 9)),
    (Directions(), lambda: F.normalize(torch.randn(1, 12, 9, 3), dim=3)),
    (Fixed(), lambda: torch.rand(1)),
]


@pytest.mark.parametrize("moves, column", MOVED)
def test_a_flip_twice_is_the_identity(moves, column):
    column, row = column(), torch.zeros(1, dtype=torch.int64)
    once = moves(column, row, FLIPPED)
    assert torch.equal(moves(once, row, FLIPPED), column.to(once.dtype))
    assert torch.equal(moves(column, row, FLIPPED.then(FLIPPED)), column.to(once.dtype))


@pytest.mark.parametrize("moves, column", MOVED)
def test_without_a_view_the_rows_are_gathered(moves, column):
    column = torch.cat([column() for _ in range(4)])
    rows = torch.tensor([3, 1, 1])
    plain, identity = moves(column, rows, None), moves(column, rows, View.identity(3))
    assert torch.equal(plain, column[rows].to(plain.dtype))
    assert torch.equal(plain, identity) and plain.dtype == identity.dtype


def plane(normal: np.ndarray, distance: float, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(depth (H, W), normals (H, W, 3)) of the plane normal · point = distance, in a pinhole camera of 90° width."""
    x = (np.arange(width) + 0.5) / width * 2 - 1
    y = ((np.arange(height) + 0.5) / height * 2 - 1) * height / width
    rays = np.stack([*np.broadcast_arrays(x[None, :], y[:, None]), np.ones((height, width))], 2)
    return torch.tensor(distance / (rays @ normal)), torch.tensor(np.broadcast_to(normal, rays.shape).copy())


def test_a_mirrored_tilted_plane_is_the_plane_tilted_the_other_way():
    normal = np.array([0.3, -0.2, 0.933])
    normal /= np.linalg.norm(normal)
    row = torch.zeros(1, dtype=torch.int64)
    depth, normals = plane(normal, 2.0, 6, 9)
    other_depth, other_normals = plane(normal * [-1, 1, 1], 2.0, 6, 9)
    torch.testing.assert_close(Metres()(depth[None], row, FLIPPED)[0], other_depth)
    assert torch.equal(Directions()(normals[None], row, FLIPPED)[0], other_normals)
    upside_down = View(torch.tensor([[-1.0, 1.0]]), torch.tensor([[6.0, 0.0]]), whole=True)
    assert torch.equal(Directions()(normals[None], row, upside_down)[0], plane(normal * [1, -1, 1], 2.0, 6, 9)[1])


@pytest.mark.parametrize("scale", [1.2, 1.5])
def test_depth_is_divided_by_the_scale_and_normals_stay(scale):
    depth, normals = plane(np.array([0.6, 0.0, 0.8]), 2.0, 30, 60)
    view, row = scaled([scale], [(3, 4)]).then(View(torch.ones(1, 2), torch.tensor([[-6.0, 0.0]]))), torch.tensor([0])
    expected = looped(depth[None].numpy(), [0], view, nan, False) / scale
    for column, tolerance in ((depth, 1e-7), (depth.float(), 1e-6), (depth.half(), 1e-3)):
        seen = Metres()(column[None], row, view)
        assert seen.dtype == (torch.float64 if column.dtype == torch.float64 else torch.float32)
        np.testing.assert_allclose(seen, expected, rtol=tolerance)
    seen = Directions()(normals[None], row, view)
    assert seen[0, 0].isnan().all() and torch.equal(seen[0, 8:], normals[8:])


def test_a_mirrored_scaled_depth_is_positive():
    view = scaled([1.5], [(2, 3)]).then(FLIPPED)
    torch.testing.assert_close(
        Metres()(torch.full((1, 12, 9), 3.0), torch.tensor([0]), view), torch.full((1, 12, 9), 2.0)
    )


def test_millimetres_of_integers_become_floating():
    column = torch.full((1, 4, 4), 3000, dtype=torch.int32)
    seen = Metres()(column, torch.tensor([0]), scaled([1.5], [(0, 3)]))
    np.testing.assert_allclose(seen[0, 0], [2000, nan, nan, nan], rtol=1e-6)


@pytest.mark.parametrize("augments", CHAINS)
def test_normals_keep_length_1_and_no_label_stays_no_label(augments):
    normals = F.normalize(torch.randn(8, 12, 9, 3, generator=torch.Generator().manual_seed(2)), dim=3)
    normals[:, 2:5], normals[:, 8:, :4] = 0, nan
    view = drawn(augments, 8, (12, 9))
    seen = Directions()(normals, torch.arange(8), view)
    source = see(torch.arange(12 * 9).view(1, 12, 9).repeat(8, 1, 1), torch.arange(8), view, -1)
    labelled = normals.norm(dim=3).flatten(1).nan_to_num().gather(1, source.clamp(0).flatten(1)).view_as(source)
    labelled = (labelled > 0.5) & (source >= 0)
    torch.testing.assert_close(seen[labelled].norm(dim=1), torch.ones(int(labelled.sum())))
    assert (seen[~labelled].isnan() | (seen[~labelled] == 0)).all()


def test_unsigned_label_maps_can_hold_minus_100():
    seen = Pixels()(numbers(1, 12, 9), torch.tensor([0]), View(torch.ones(1, 2), torch.full((1, 2), 5.0), whole=True))
    assert seen.dtype == torch.int64 and (seen[0, 7:] == -100).all() and (seen[0, :7, :4] >= 0).all()


@pytest.mark.parametrize("moves, shape", [
    (Picture(), (5, 12, 9)), (Pixels(), (5,)), (Pixels(), (5, 1, 12, 9)), (Metres(), (5, 1, 12, 9)),
    (Directions(), (5, 3, 12, 9)), (Directions(), (5, 12, 9)),
])  # fmt: skip
def test_columns_of_another_shape_are_refused(moves, shape):
    with pytest.raises(ValueError, match=r"a column of the shape \(5.*\(M, H, W"):
        moves(torch.zeros(shape), torch.arange(2), None)


# Where columns live


@pytest.mark.parametrize("augments", [(Crop(4), Flip()), (ScaleCrop((1.5,)),), ()])
@pytest.mark.parametrize("order", ["C", "permuted"])
def test_a_memory_mapped_column_is_read_and_never_copied(tmp_path, augments, order):
    shape = (64, 64, 64, 3) if order == "C" else (64, 3, 64, 64)
    written = np.memmap(tmp_path / "images", np.uint8, "w+", shape=shape)
    written[:] = numbers(*shape)
    written.flush()
    column = torch.from_numpy(np.memmap(tmp_path / "images", np.uint8, "c", shape=shape))
    column = column if order == "C" else column.permute(0, 2, 3, 1)
    rows, view = torch.tensor([63, 0, 5]), drawn(augments, 3, (64, 64)) if augments else None
    memory, seen = column.clone().contiguous(), []
    made = largest(lambda: seen.append(Picture()(column, rows, view)))
    assert torch.equal(seen[0], Picture()(memory, rows, view)) and seen[0].is_contiguous()
    assert 0 < made <= 3 * 64 * 64 * 3 * 4  # a batch of float32 at most; the column has 786432 bytes


def largest(work) -> int:
    """Bytes of the largest tensor made during `work`; a view of what was there is not made."""
    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                sizes.append(made.untyped_storage().nbytes())
            return made

    with Watch():
        work()
    return max(sizes)


@pytest.mark.parametrize("augments", CHAINS)
@pytest.mark.parametrize("moves, column", MOVED[:4])
def test_no_number_is_read_on_the_host(augments, moves, column):
    """A tensor on the device "meta" has no numbers, so whatever reads one fails."""
    meta, column = torch.device("meta"), column().repeat(8, *[1] * (column().dim() - 1))
    view = drawn(augments, 8, (12, 9)).to(meta)
    rows = torch.arange(8, device=meta)
    seen = moves(column.to(meta), rows, view.take(rows))
    assert seen.device == meta and seen.shape == column.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augments", CHAINS)
def test_a_gpu_shows_the_same_and_the_host_never_waits(augments):
    gpu, view, rows = torch.device("cuda"), drawn(augments, 8, (12, 9)), torch.arange(8)
    for moves, column in MOVED[:4]:
        column = column().repeat(8, *[1] * (column().dim() - 1))
        on_gpu = column.to(gpu), rows.to(gpu), view.to(gpu)
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen = moves(*on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(seen.cpu(), moves(column, rows, view), equal_nan=True)
