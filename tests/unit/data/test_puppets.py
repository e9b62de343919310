"""Tests of the synthetic puppets: the clips are lively, and their ground truth is true."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from prioritycut_ray.data.puppet_poses import first_pose, joined, relative_to
from prioritycut_ray.data.puppets import (
    Blob,
    Mask,
    PuppetClip,
    foreground,
    motion_of,
    render_clip,
    render_motion,
    truth_between,
)

SEEDS = range(6)


@cache
def clip_of(seed: int) -> PuppetClip:
    """Render a default clip once for all the tests that look at it."""
    return render_clip(seed)


def disoccluded(clip: PuppetClip, source: int, driving: int) -> Mask:
    return truth_between(clip, source, driving).disoccluded


def random_pairs(count: int, frames: int = 32) -> list[tuple[int, int]]:
    """Draw pairs of two different frames: (source, driving)."""
    rng = np.random.default_rng(0)
    pairs = [rng.choice(frames, 2, replace=False) for _ in range(count)]
    return [(int(source), int(driving)) for source, driving in pairs]


def test_the_clip_has_the_promised_shapes_and_ranges() -> None:
    """Every array of the clip has its documented shape, type and range."""
    clip = render_clip(0, size=48, frames=5)
    count = len(clip.puppet)
    assert clip.frames.shape == (5, 48, 48, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.parts.shape == (5, 48, 48)
    assert clip.parts.dtype == np.uint8
    assert clip.poses.shape == (5, count, 2, 3)
    assert clip.poses.dtype == np.float64
    assert clip.frames.min() < 60
    assert clip.frames.max() > 220
    assert set(np.unique(clip.parts)) == set(range(count))


def test_poses_are_rigid_and_the_background_stands_still() -> None:
    """Rotations are orthonormal without reflection, and part 0 has the identity pose."""
    poses = clip_of(1).poses
    turns = poses[..., :2]
    np.testing.assert_allclose(
        turns @ np.swapaxes(turns, -1, -2), np.broadcast_to(np.eye(2), turns.shape), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert (poses[:, 0] == np.eye(2, 3)).all()


def test_a_seed_is_one_clip_and_another_seed_is_another() -> None:
    """Rendering is deterministic, and the seed changes the look as well as the motion."""
    first, again, other = (
        render_clip(3, frames=4),
        render_clip(3, frames=4),
        render_clip(4, frames=4),
    )
    assert first.frames.tobytes() == again.frames.tobytes()
    assert first.parts.tobytes() == again.parts.tobytes()
    assert first.poses.tobytes() == again.poses.tobytes()
    assert first.puppet[1].paint.dark != other.puppet[1].paint.dark
    # The torso's path owes nothing to the puppet's proportions: it tells motions apart.
    torso = [part.name for part in first.puppet].index("torso")
    assert not np.allclose(first.poses[:, torso], other.poses[:, torso])
    assert mean_difference(first.frames, other.frames) > 20


def test_a_longer_clip_begins_with_the_shorter_one() -> None:
    """The number of frames says where to stop and nothing else."""
    assert (render_clip(2, frames=8).frames[:3] == render_clip(2, frames=3).frames).all()


def test_size_changes_only_the_sharpness() -> None:
    """The same seed at twice the size, averaged down, gives the same picture."""
    large = render_clip(5, size=128, frames=2).frames
    shrunk = large.reshape(2, 64, 2, 64, 2, 3).mean(axis=(2, 4))
    assert mean_difference(shrunk, render_clip(5, size=64, frames=2).frames) < 2


@pytest.mark.parametrize("seed", SEEDS)
def test_the_puppet_moves_far_but_smoothly(seed: int) -> None:
    """Frames far apart differ much, and no joint jumps from one frame to the next."""
    clip = clip_of(seed)
    assert mean_difference(clip.frames[0], clip.frames[10]) > 8
    assert (clip.frames[1:] != clip.frames[:-1]).any(axis=(1, 2, 3)).all()
    steps = np.linalg.norm(np.diff(clip.poses[..., 2], axis=0), axis=-1)
    assert 0.01 * 64 < steps.max() < 0.08 * 64


@pytest.mark.parametrize("seed", SEEDS)
def test_the_puppet_fills_its_share_of_the_frame_and_stays_inside(seed: int) -> None:
    """The puppet covers 20 to 40% of every frame, and hardly touches the frame's edge."""
    clip = clip_of(seed)
    shares = [foreground(clip, frame).mean() for frame in range(32)]
    assert min(shares) > 0.2
    assert max(shares) < 0.4
    edges = np.concatenate([clip.parts[:, [0, -1]].ravel(), clip.parts[:, :, [0, -1]].ravel()])
    assert (edges != 0).mean() < 0.05


def test_nothing_is_disoccluded_between_a_frame_and_itself() -> None:
    """A frame shows all that it shows."""
    for seed in SEEDS:
        for frame in (0, 7, 31):
            assert not disoccluded(clip_of(seed), frame, frame).any()


def test_a_typical_pair_disoccludes_a_fair_share_of_the_puppet() -> None:
    """Over random pairs, a few percent of the puppet's pixels were hidden in the source."""
    shares = [
        disoccluded(clip_of(seed), source, driving)[foreground(clip_of(seed), driving)].mean()
        for seed in SEEDS
        for source, driving in random_pairs(12)
    ]
    assert 0.02 < np.mean(shares) < 0.3
    assert 0.02 < np.median(shares) < 0.3


@pytest.mark.parametrize("size", [64, 128])
def test_visible_pixels_keep_their_colour_and_disoccluded_ones_do_not(size: int) -> None:
    """Carrying colours from the source by the poses works just where the truth says it does."""
    kept, lost = [], []
    for seed in SEEDS[:4]:
        clip = render_clip(seed, size=size, frames=12)
        for source, driving in random_pairs(5, frames=12):
            places = carried(clip, source, driving)
            difference = np.abs(
                sampled(clip.frames[source], places) - clip.frames[driving].astype(float)
            ).mean(axis=-1)
            shown = foreground(clip, driving) & away_from_borders(clip, source, driving, places)
            hidden = disoccluded(clip, source, driving)
            kept.append(difference[shown & ~hidden])
            lost.append(difference[shown & hidden])
    visible, gone = np.concatenate(kept), np.concatenate(lost)
    assert len(visible) > 1000
    assert len(gone) > 100
    assert visible.mean() < 6
    assert gone.mean() > 30


def test_a_visible_background_pixel_does_not_change_at_all() -> None:
    """The background stands still: away from the puppet, what stays visible stays the same."""
    clip = clip_of(0)
    for source, driving in random_pairs(6):
        places = carried(clip, source, driving)
        stays = (
            ~foreground(clip, driving)
            & ~disoccluded(clip, source, driving)
            & away_from_borders(clip, source, driving, places)
        )
        assert stays.sum() > 500
        assert (clip.frames[source][stays] == clip.frames[driving][stays]).all()


def test_disocclusion_is_judged_at_the_exact_place() -> None:
    """A part map five times as fine, looked up at the carried place, says the same."""
    clip, fine = render_clip(1, frames=6), render_clip(1, size=5 * 64, frames=6)
    places = carried(clip, 0, 5)
    inside = ((places >= 0) & (places < 64)).all(axis=-1)
    x, y = np.moveaxis((places.clip(0, 63.99) * 5).astype(int), -1, 0)
    seen = inside & (fine.parts[0][y, x] == clip.parts[5])
    agreement = (disoccluded(clip, 0, 5) == ~seen)[foreground(clip, 5)].mean()
    rounded = inside & (clip.parts[0][y // 5, x // 5] == clip.parts[5])
    by_rounding = (disoccluded(clip, 0, 5) == ~rounded)[foreground(clip, 5)].mean()
    assert agreement > 0.98
    assert agreement > by_rounding


@pytest.mark.parametrize("seed", [0, 3])
def test_the_truth_agrees_with_brute_force(seed: int) -> None:
    """Part, flow and dis-occlusion of every pixel, from the definitions, one pixel at a time."""
    clip = render_clip(seed, size=24, frames=12)
    truth = truth_between(clip, 0, 11)
    for (row, column), part, place in brute_force(clip, 11):
        x, y = carried_point(clip, part, place, 11, 0)
        seen = 0 <= x <= 24 and 0 <= y <= 24 and topmost(clip, 0, (x, y)) == part
        assert truth.parts[row, column] == part
        assert truth.flow[row, column] == pytest.approx((x - place[0], y - place[1]), abs=1e-9)
        assert truth.disoccluded[row, column] == (not seen)
    assert 10 < truth.disoccluded.sum() < 200


def test_the_flow_leads_to_the_same_surface() -> None:
    clip = clip_of(2)
    for source, driving in random_pairs(3):
        rows, columns = np.indices((64, 64)) + 0.5
        places = np.stack([columns, rows], axis=-1) + truth_between(clip, source, driving).flow
        np.testing.assert_allclose(places, carried(clip, source, driving), atol=1e-9)


def test_a_puppet_moves_as_another_one_and_keeps_its_looks() -> None:
    """The angle of every joint is that of the motion, on the same side of the picture."""
    sides = set()
    for look in range(4):
        clip, other = render_motion(look, motion_of(9, 5)), render_clip(9, frames=5)
        assert repr(clip.puppet) == repr(render_clip(look, frames=1).puppet)
        for name in ("head", "torso"):
            np.testing.assert_allclose(angles(clip, name), angles(other, name))
        ours, theirs = by_side(clip), by_side(other)
        assert ours.keys() == theirs.keys()
        for side in ours:
            np.testing.assert_allclose(angles(clip, ours[side]), angles(other, theirs[side]))
        sides.add(ours["left", "upper arm"])
    assert len(sides) == 2, "no puppet has its front arm on the other side"


def test_relative_motion_starts_at_the_own_pose_and_changes_as_the_driving_one() -> None:
    own, driving = motion_of(1, 6), motion_of(2, 6)
    moved = relative_to(own, driving)
    for name, values in moved.items():
        assert values[0] == own[name][0]
        np.testing.assert_allclose(np.diff(values), np.diff(driving[name]))
    for name, values in relative_to(own, own).items():
        np.testing.assert_allclose(values, own[name])


def test_motions_are_joined() -> None:
    """A clip whose first frame is the source: the truth between any two of its frames is known."""
    own, driving = motion_of(1, 4), motion_of(2, 3)
    clip = render_motion(1, joined(first_pose(own), driving))
    assert (clip.frames[0] == render_clip(1, frames=1).frames[0]).all()
    assert (clip.frames[1:] == render_motion(1, driving).frames).all()


def test_a_surface_that_left_the_frame_is_disoccluded() -> None:
    """A pixel whose surface lay outside the source frame counts as not visible there."""
    clip = clip_of(0)
    # Shift the whole puppet of the source frame far to the right: only the wall is left in sight.
    poses = clip.poses.copy()
    poses[0, 1:, 0, 2] += 10 * 64
    gone = clip._replace(poses=poses)
    assert (disoccluded(gone, 0, 5) == foreground(gone, 5)).all()


def brute_force(
    clip: PuppetClip, frame: int
) -> Iterator[tuple[tuple[int, int], int, tuple[float, float]]]:
    """Every pixel, the part at its centre, and that centre as (x, y)."""
    size = clip.frames.shape[1]
    for row in range(size):
        for column in range(size):
            place = (column + 0.5, row + 0.5)
            yield (row, column), topmost(clip, frame, place), place


def topmost(clip: PuppetClip, frame: int, place: tuple[float, float]) -> int:
    """The highest part that covers a point; 0 is the background."""
    size = clip.frames.shape[1]
    for part in range(len(clip.puppet) - 1, 0, -1):
        turn, shift = clip.poses[frame, part, :, :2], clip.poses[frame, part, :, 2]
        x, y = np.linalg.solve(turn, np.array(place) - shift) / size
        if any(covers(blob, float(x), float(y)) for blob in clip.puppet[part].shape):
            return part
    return 0


def covers(blob: Blob, x: float, y: float) -> bool:
    """Whether a point is less than the radius away from the box."""
    near_x = min(max(x, blob.x - blob.half_width), blob.x + blob.half_width)
    near_y = min(max(y, blob.y - blob.half_height), blob.y + blob.half_height)
    return bool(np.hypot(x - near_x, y - near_y) < blob.radius)


def carried_point(
    clip: PuppetClip, part: int, place: tuple[float, float], start: int, end: int
) -> tuple[float, float]:
    """Move a point with a part from one frame to another one."""
    before, after = clip.poses[start, part], clip.poses[end, part]
    x, y = after[:, :2] @ np.linalg.solve(before[:, :2], np.array(place) - before[:, 2])
    return float(x + after[0, 2]), float(y + after[1, 2])


def angles(clip: PuppetClip, name: str) -> NDArray[np.float64]:
    """The angle of a part relative to its parent over time, wrapped to (-pi, pi]."""
    names = [part.name for part in clip.puppet]
    layer, _, limb = name.partition(" ")
    parent = {"torso": "background", "upper arm": "torso", "thigh": "torso"}.get(limb or name)
    parent = parent or {"forearm": f"{layer} upper arm", "shin": f"{layer} thigh"}.get(
        limb, "torso"
    )
    turns, of_parent = (clip.poses[:, names.index(n), :, :2] for n in (name, parent))
    relative = np.swapaxes(of_parent, -1, -2) @ turns
    turned: NDArray[np.float64] = np.arctan2(relative[:, 1, 0], relative[:, 0, 0])
    return turned


def by_side(clip: PuppetClip) -> dict[tuple[str, str], str]:
    """The names of the limbs by their side in the picture, as they hang on the torso."""
    names = [part.name for part in clip.puppet]
    torso = clip.poses[0, names.index("torso")]
    found = {}
    for layer in ("front", "back"):
        shoulder = clip.poses[0, names.index(f"{layer} upper arm"), :, 2]
        side = "left" if (torso[:, :2].T @ (shoulder - torso[:, 2]))[0] < 0 else "right"
        for limb in ("upper arm", "forearm", "thigh", "shin"):
            found[side, limb] = f"{layer} {limb}"
    return found


def mean_difference(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    """Average the absolute difference of two images in 0..255."""
    return float(np.abs(first.astype(float) - second.astype(float)).mean())


def carried(clip: PuppetClip, source: int, driving: int) -> NDArray[np.float64]:
    """Find where each driving pixel's surface is in the source: [H, W, 2] (x, y) in pixels."""
    last_row = np.broadcast_to([[[0.0, 0.0, 1.0]]], (clip.poses.shape[1], 1, 3))
    before, after = (
        np.concatenate([clip.poses[frame], last_row], axis=1) for frame in (source, driving)
    )
    maps = (before @ np.linalg.inv(after))[clip.parts[driving]]
    rows, columns = np.indices(clip.parts[driving].shape) + 0.5
    centres = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    places: NDArray[np.float64] = np.einsum("hwij,hwj->hwi", maps, centres)[..., :2]
    return places


def sampled(image: NDArray[np.uint8], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sample an image [H, W, 3] bilinearly at places [H, W, 2], the edge pixels going on."""
    size = len(image)
    x, y = np.moveaxis((places - 0.5).clip(0, size - 1.001), -1, 0)
    column, row = x.astype(int), y.astype(int)
    right, down = (x - column)[..., None], (y - row)[..., None]
    upper = image[row, column] * (1 - right) + image[row, column + 1] * right
    lower = image[row + 1, column] * (1 - right) + image[row + 1, column + 1] * right
    mixed: NDArray[np.float64] = upper * (1 - down) + lower * down
    return mixed


def away_from_borders(
    clip: PuppetClip, source: int, driving: int, places: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Tell where neither frame has a part border or its own edge within about a pixel: [H, W]."""
    size = clip.parts.shape[1]
    inside = ((places > 1.5) & (places < size - 1.5)).all(axis=-1)
    column, row = np.moveaxis(places.clip(0, size - 1).astype(int), -1, 0)
    calm = calm_neighbourhood(clip.parts[source])[row, column]
    result: NDArray[np.bool_] = inside & calm & calm_neighbourhood(clip.parts[driving])
    return result


def calm_neighbourhood(parts: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell which pixels have a 3 x 3 neighbourhood owned by one part: [H, W]."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(parts, 1, mode="edge"), (3, 3))
    calm: NDArray[np.bool_] = windows.min(axis=(2, 3)) == windows.max(axis=(2, 3))
    return calm
