"""Synthetic clips of jointed, textured puppets, with exact ground truth of what each pixel shows.

A puppet is a stack of flat parts, like a paper doll. Every part has a shape and a texture fixed in
its own coordinates, and moves rigidly about the joint with its parent. Because every pose is known,
so is the position of any visible surface point in any other frame, and whether it is visible there:
these clips are a ground truth as well as a toy data set. What a puppet looks like and how it moves
have separate seeds, so any puppet can be rendered in the motion of any other one.

Lengths that describe a puppet are fractions of the frame side, so one seed is one puppet at every
frame size. In the image x points right and y points down; pixel (row, column) has its centre at
(x, y) = (column + 0.5, row + 0.5), and the frame spans [0, size] both ways.
"""

import colorsys
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prioritycut_ray.data.puppet_poses import (
    Floats,
    Motion,
    compose,
    pose,
    rotation,
    to_image,
    to_part,
    wave,
)

Mask = NDArray[np.bool_]
Colour = tuple[float, float, float]
Pattern = Literal["stripes", "dots", "patches"]

# Odd, so that the middle sample of a pixel is its centre: the part map is then a plain slice.
SAMPLES_PER_PIXEL = 3
RIM = 0.018  # Width of the darker edge of every part, in frame fractions.
SOFT_EDGE = 0.018  # Width over which a decal fades in: about a pixel at frame size 64.


class Blob(NamedTuple):
    """A box with rounded corners, in frame fractions; a disc or a capsule if its core is flat.

    The core box is centred on (x, y) with the given half sizes, and grown by radius all round.
    """

    x: float
    y: float
    half_width: float
    half_height: float
    radius: float


class Paint(NamedTuple):
    """A two-colour pattern with grain; colours in 0..255, pitch in frame fractions, turn in rad."""

    pattern: Pattern
    dark: Colour
    light: Colour
    pitch: float
    turn: float
    lattice: Floats  # [N, N] in 0..1: the random values that the noise interpolates.


class Decal(NamedTuple):
    """A flat patch of one colour (0..255) on top of a part's paint."""

    blob: Blob
    colour: Colour


class Part(NamedTuple):
    """One rigid piece: the union of some blobs, painted. Its origin is the joint to its parent."""

    name: str
    shape: tuple[Blob, ...]
    paint: Paint
    decals: tuple[Decal, ...] = ()


class Joint(NamedTuple):
    """Where a part is pinned on its parent (frame fractions) and how far it swings (degrees).

    Parts are named by their layer (front or back), angles by their side in the picture (left or
    right), so that a motion moves the same side of every puppet.
    """

    part: str
    parent: str
    angle: str
    x: float
    y: float
    rest: float
    swing: float


class PuppetClip(NamedTuple):
    """A rendered clip of one puppet, and everything needed to track its surface."""

    frames: NDArray[np.uint8]  # [T, H, W, 3] RGB in 0..255.
    parts: NDArray[np.uint8]  # [T, H, W] part that owns the pixel's centre; 0 is the background.
    poses: Floats  # [T, P, 2, 3] rigid maps from part coordinates to image (x, y), both in pixels.
    puppet: tuple[Part, ...]  # [P] from bottom to top; item 0 is the background.


class Truth(NamedTuple):
    """What is exactly known of a driving frame, given a source frame of the same clip.

    Attributes:
        parts: [H, W] part that owns each driving pixel's centre; 0 is the background.
        flow: [H, W, 2] (x, y) in pixels: where the surface point that the driving frame shows at a
            pixel's centre lies in the source frame, minus where it lies in the driving frame.
        disoccluded: [H, W] True where the source frame does not show that point: another part lies
            on top of it there, or it is outside the frame.
    """

    parts: NDArray[np.uint8]
    flow: Floats
    disoccluded: Mask


def render_clip(seed: int, *, size: int = 64, frames: int = 32) -> PuppetClip:
    """Render the puppet of a seed in its own motion.

    Args:
        seed: 0 or more; determines the puppet, its background and its motion.
        size: height and width of the frames in pixels. It changes nothing but the sharpness.
        frames: number of frames T. A longer clip begins with the shorter one.

    Returns:
        The clip: RGB frames [T, size, size, 3] and their ground truth.
    """
    return render_motion(seed, motion_of(seed, frames), size=size)


def render_motion(look: int, motion: Motion, *, size: int = 64) -> PuppetClip:
    """Render the puppet of a seed, with its proportions and background, in any motion.

    Args:
        look: 0 or more; determines the puppet and its background.
        motion: how it moves over T frames, such as :func:`motion_of` another seed.
        size: height and width of the frames in pixels.
    """
    puppet, joints = _make_puppet(np.random.default_rng([look, 0]))
    poses = _pose_parts(puppet, joints, motion)
    poses[..., 2] *= size
    wall = _colours(puppet[0], _grid(size, SAMPLES_PER_PIXEL) / size)
    rendered = [_render(puppet, at_time, wall, size) for at_time in poses]
    return PuppetClip(
        frames=np.stack([image for image, _ in rendered]),
        parts=np.stack([owner for _, owner in rendered]),
        poses=poses,
        puppet=puppet,
    )


def motion_of(seed: int, frames: int) -> Motion:
    """Return how the puppet of a seed moves in its own clip."""
    _, joints = _make_puppet(np.random.default_rng([seed, 0]))
    # Another generator: looks and motion must not depend on each other.
    rng = np.random.default_rng([seed, 1])
    motion = {
        "x": 0.5 + 0.12 * wave(rng, frames),
        "y": 0.5 + 0.05 * wave(rng, frames),
        "torso": np.radians(20 * wave(rng, frames)),
    }
    for joint in joints:
        motion[joint.angle] = np.radians(joint.rest + joint.swing * wave(rng, frames))
    return motion


def foreground(clip: PuppetClip, frame: int) -> Mask:
    """Return the mask of the puppet in a frame: [H, W], True where it hides the background."""
    shown: Mask = clip.parts[frame] != 0
    return shown


def truth_between(clip: PuppetClip, source: int, driving: int) -> Truth:
    """Return what is exactly known of a driving frame, given a source frame.

    A pixel centre moves with its part to its exact position in the source frame. It is visible
    there if it is inside the frame and no other part lies on top of it.

    Args:
        clip: the clip that both frames belong to.
        source: index of the frame that is looked up.
        driving: index of the frame whose pixels are judged.
    """
    owner = clip.parts[driving]
    size = owner.shape[0]
    centres = _grid(size, 1)
    places = np.empty_like(centres)
    for index, (before, after) in enumerate(
        zip(clip.poses[source], clip.poses[driving], strict=True)
    ):
        mine = owner == index
        places[:, mine] = to_image(before, to_part(after, centres[:, mine]))
    inside = ((places >= 0) & (places <= size)).all(axis=0)
    hidden = _topmost(clip.puppet, clip.poses[source], places, size) != owner
    return Truth(owner, np.moveaxis(places - centres, 0, -1), hidden | ~inside)


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def _render(
    puppet: tuple[Part, ...], poses: Floats, wall: Floats, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one frame from its poses [P, 2, 3]: RGB [size, size, 3] and owners [size, size].

    The wall, [samples, samples, 3], is what the background shows: it is the same in every frame.
    """
    samples = _grid(size, SAMPLES_PER_PIXEL)
    owner = _topmost(puppet, poses, samples, size)
    colour = wall.copy()
    for index, part in enumerate(puppet[1:], start=1):
        mine = owner == index
        colour[mine] = _colours(part, to_part(poses[index], samples[:, mine]) / size)
    n = SAMPLES_PER_PIXEL
    image = colour.reshape(size, n, size, n, 3).mean(axis=(1, 3))
    return image.round().clip(0, 255).astype(np.uint8), owner[n // 2 :: n, n // 2 :: n]


def _topmost(
    puppet: tuple[Part, ...], poses: Floats, points: Floats, size: int
) -> NDArray[np.uint8]:
    """Find the part on top at exact image points [2, H, W] in pixels: part indices [H, W]."""
    owner = np.zeros(points.shape[1:], np.uint8)
    for index, part in enumerate(puppet[1:], start=1):
        # A part is small: most points are too far from its joint to be worth the full test.
        from_joint = points - poses[index, :, 2, None, None]
        near = (from_joint**2).sum(axis=0) < (_reach(part.shape) * size) ** 2
        at_part = to_part(poses[index], points[:, near]) / size
        owner[near] = np.where(_depth(part.shape, at_part) > 0, index, owner[near])
    return owner


def _reach(shape: tuple[Blob, ...]) -> float:
    """Bound how far a shape extends from its origin."""
    return max(
        float(np.hypot(abs(blob.x) + blob.half_width, abs(blob.y) + blob.half_height)) + blob.radius
        for blob in shape
    )


def _colours(part: Part, points: Floats) -> Floats:
    """Colour a part at points [2, ...] of its own frame (frame fractions): [..., 3] in 0..255."""
    colour = _painted(part.paint, points)
    for decal in part.decals:
        depth = _depth((decal.blob,), points)
        near = depth > -SOFT_EDGE / 2
        cover = _smoothstep(0.5 + depth[near] / SOFT_EDGE)[:, None]
        colour[near] += cover * (np.array(decal.colour) - colour[near])
    # A darker rim tells a limb from the body it crosses, even where their colours are alike.
    shade = 0.55 + 0.45 * _smoothstep(_depth(part.shape, points) / RIM)
    return colour * shade[..., None]


def _painted(paint: Paint, points: Floats) -> Floats:
    """Evaluate a paint at points [2, ...]: [..., 3], 0..255 save for the brightest spots."""
    across, along = 2 * np.pi * np.tensordot(rotation(paint.turn), points / paint.pitch, axes=1)
    grain = _noise(paint.lattice, points / paint.pitch * 2)
    match paint.pattern:
        case "stripes":
            level = _smoothstep(0.5 + 0.9 * np.sin(along))
        case "dots":
            level = _smoothstep(0.2 + 1.3 * np.sin(across) * np.sin(along))
        case "patches":
            level = _smoothstep(0.5 + 2.2 * (grain - 0.5))
    dark, light = np.array(paint.dark), np.array(paint.light)
    # The fine grain only changes brightness: it gives flat areas texture to track.
    shade = 0.82 + 0.36 * _noise(paint.lattice.T, points / paint.pitch * 1.3)
    painted: Floats = (dark + level[..., None] * (light - dark)) * shade[..., None]
    return painted


def _noise(lattice: Floats, points: Floats) -> Floats:
    """Interpolate a periodic lattice, smoothly, at points [2, ...]: [...] in 0..1."""
    n = len(lattice)
    corner = np.floor(points).astype(np.intp)
    right, down = _smoothstep(points - corner)
    (x0, y0), (x1, y1) = corner % n, (corner + 1) % n
    upper = lattice[y0, x0] * (1 - right) + lattice[y0, x1] * right
    lower = lattice[y1, x0] * (1 - right) + lattice[y1, x1] * right
    mixed: Floats = upper * (1 - down) + lower * down
    return mixed


def _depth(shape: tuple[Blob, ...], points: Floats) -> Floats:
    """Measure how deep points [2, ...] lie inside a union of blobs: [...], negative outside."""
    depths = []
    for blob in shape:
        beyond_x = np.abs(points[0] - blob.x) - blob.half_width
        beyond_y = np.abs(points[1] - blob.y) - blob.half_height
        outside = np.sqrt(np.maximum(beyond_x, 0) ** 2 + np.maximum(beyond_y, 0) ** 2)
        inside = np.minimum(np.maximum(beyond_x, beyond_y), 0)
        depths.append(blob.radius - outside - inside)
    deepest: Floats = np.maximum.reduce(depths)
    return deepest


def _smoothstep(value: Floats) -> Floats:
    """Ease from 0 at 0 to 1 at 1, and stay flat beyond."""
    clipped = np.clip(value, 0, 1)
    eased: Floats = clipped * clipped * (3 - 2 * clipped)
    return eased


def _pose_parts(puppet: tuple[Part, ...], joints: tuple[Joint, ...], motion: Motion) -> Floats:
    """Pose the parts of a puppet: [T, P, 2, 3] in frame fractions."""
    still = np.broadcast_to(np.eye(2, 3), (len(motion["x"]), 2, 3))
    torso = pose(motion["x"], motion["y"], motion["torso"])
    poses = {"background": still, "torso": torso}
    for joint in joints:
        angle = motion[joint.angle]
        pinned = pose(np.full_like(angle, joint.x), np.full_like(angle, joint.y), angle)
        poses[joint.part] = compose(poses[joint.parent], pinned)
    return np.stack([poses[part.name] for part in puppet], axis=1)


def _grid(size: int, samples: int) -> Floats:
    """Lay out the sample centres of a frame: [2, size * samples, size * samples] in pixels."""
    at = (np.arange(size * samples) + 0.5) / samples
    return np.stack(np.meshgrid(at, at))


# ---------------------------------------------------------------------------------------------
# Puppets
# ---------------------------------------------------------------------------------------------


def _make_puppet(rng: np.random.Generator) -> tuple[tuple[Part, ...], tuple[Joint, ...]]:
    """Make a puppet: its parts from bottom to top, and its joints with every parent first."""
    hue = rng.random()
    fur, shirt, sleeve, trousers = (_fabric(rng, hue + turn) for turn in (0.0, 0.45, 0.6, 0.8))
    front = rng.choice((-1.0, 1.0))  # The side whose arm passes in front of the body.
    arm, leg = rng.uniform(0.115, 0.135), rng.uniform(0.085, 0.1)
    # A limb's lower half lies over its upper half, save behind the back, where that is reversed.
    parts = (
        _background(rng, hue + 0.3),
        *_arm("back", arm, sleeve, fur)[::-1],
        *_leg("back", -front, leg, trousers, shirt),
        *_leg("front", front, leg, trousers, shirt),
        _torso(rng, shirt, trousers),
        _head(rng, fur, sleeve),
        *_arm("front", arm, sleeve, fur),
    )
    joints = (
        Joint("head", "torso", "head", 0.0, -0.11, rest=0, swing=22),
        *_limb_joints("front", front, arm, leg),
        *_limb_joints("back", -front, arm, leg),
    )
    return parts, joints


def _limb_joints(layer: str, side: float, arm: float, leg: float) -> tuple[Joint, ...]:
    """Pin one arm and one leg on a side of the body: -1 is the left of the picture, 1 the right."""
    where = "left" if side < 0 else "right"

    def joint(limb: str, parent: str, x: float, y: float, *, rest: float, swing: float) -> Joint:
        return Joint(f"{layer} {limb}", parent, f"{where} {limb}", x, y, rest, swing)

    return (
        joint("upper arm", "torso", side * 0.14, -0.085, rest=-side * 30, swing=70),
        joint("forearm", f"{layer} upper arm", 0.0, arm, rest=side * 45, swing=65),
        joint("thigh", "torso", side * 0.085, 0.125, rest=-side * 8, swing=32),
        joint("shin", f"{layer} thigh", 0.0, leg, rest=0, swing=38),
    )


def _arm(which: str, length: float, sleeve: Paint, fur: Paint) -> tuple[Part, Part]:
    """Sew an upper arm, and a forearm with its hand."""
    hand = Blob(0.0, length, 0.0, 0.0, 0.066)
    return (
        Part(f"{which} upper arm", (_limb(length, 0.06),), sleeve),
        Part(f"{which} forearm", (_limb(length, 0.054), hand), sleeve, (Decal(hand, fur.light),)),
    )


def _leg(
    which: str, side: float, length: float, trousers: Paint, shirt: Paint
) -> tuple[Part, Part]:
    """Sew a thigh, and a shin with its shoe pointing outwards."""
    shoe = Blob(side * 0.022, length + 0.012, 0.032, 0.0, 0.052)
    return (
        Part(f"{which} thigh", (_limb(length, 0.075),), trousers),
        Part(f"{which} shin", (_limb(length, 0.06), shoe), trousers, (Decal(shoe, shirt.dark),)),
    )


def _limb(length: float, radius: float) -> Blob:
    """Shape a capsule that hangs from its joint."""
    return Blob(0.0, length / 2, 0.0, length / 2, radius)


def _torso(rng: np.random.Generator, shirt: Paint, trousers: Paint) -> Part:
    """Sew the body: a chest, a belly that varies, the trousers' waist and three buttons."""
    chest = Blob(0.0, -0.02, 0.085, 0.06, 0.08)
    belly = Blob(0.0, 0.06, rng.uniform(0.08, 0.105), 0.0, 0.09)
    waist = Decal(Blob(0.0, 0.2, 0.3, 0.08, 0.0), trousers.dark)
    buttons = [Decal(Blob(0.0, y, 0.0, 0.0, 0.018), trousers.light) for y in (-0.06, 0.005, 0.07)]
    return Part("torso", (chest, belly), shirt, (waist, *buttons))


def _head(rng: np.random.Generator, fur: Paint, lining: Paint) -> Part:
    """Sew the head and its face; the ears are those of a bear, a rabbit or a mouse."""
    skull = Blob(0.0, -0.12, rng.uniform(0.035, 0.055), 0.0, 0.13)
    ear = (
        Blob(0.12, -0.225, 0.0, 0.0, 0.055),
        Blob(0.07, -0.265, 0.0, 0.045, 0.038),
        Blob(0.145, -0.205, 0.0, 0.0, 0.08),
    )[rng.integers(3)]
    ears = (ear, ear._replace(x=-ear.x))
    insides = [Decal(each._replace(radius=0.5 * each.radius), lining.light) for each in ears]
    # The face is plain so that its features stand out; the fur shows as a fringe around it.
    face = Decal(skull._replace(y=-0.1, radius=0.1), fur.light)
    return Part("head", (skull, *ears), fur, (*insides, face, *_features(rng, fur.light)))


def _features(rng: np.random.Generator, skin: Colour) -> tuple[Decal, ...]:
    """Paint two eyes, two cheeks and a smile on a face of the given colour."""
    apart, gaze = rng.uniform(0.05, 0.062), rng.uniform(-0.01, 0.01)
    white, black = (250.0, 250.0, 245.0), (25.0, 22.0, 35.0)
    pink, red, dark_red = (245.0, 130.0, 130.0), (235.0, 95.0, 105.0), (110.0, 25.0, 40.0)
    discs = [
        *[(side * apart, -0.135, 0.038, white) for side in (-1, 1)],
        *[(side * apart + gaze, -0.133, 0.021, black) for side in (-1, 1)],
        *[(side * 0.1, -0.075, 0.022, pink) for side in (-1, 1)],
        (0.0, -0.082, 0.048, dark_red),
        (0.0, -0.052, 0.018, red),
    ]
    # A lid of skin over the upper half of the mouth turns the disc into a smile.
    lid = Decal(Blob(0.0, -0.105, 0.05, 0.025, 0.0), skin)
    painted = [Decal(Blob(x, y, 0.0, 0.0, radius), colour) for x, y, radius, colour in discs]
    return (*painted[6:], lid, *painted[:6])


def _background(rng: np.random.Generator, hue: float) -> Part:
    """Paint a pale wall with soft clouds of colour and some faint rounded boxes on it."""
    wall = Paint(
        "patches",
        dark=_hsv(hue, 0.28, 0.7),
        light=_hsv(hue + 0.1, 0.2, 0.92),
        pitch=0.5,
        turn=0.0,
        lattice=rng.random((12, 12)),
    )
    boxes = [
        Decal(
            _random_box(rng),
            _hsv(hue + rng.uniform(-0.15, 0.25), 0.28, rng.uniform(0.6, 0.9)),
        )
        for _ in range(7)
    ]
    return Part("background", (Blob(0.5, 0.5, 9.0, 9.0, 1.0),), wall, tuple(boxes))


def _random_box(rng: np.random.Generator) -> Blob:
    """Drop a rounded box anywhere in the frame."""
    x, y = rng.random(2)
    half_width, half_height = rng.uniform(0, 0.08, 2)
    return Blob(x, y, half_width, half_height, rng.uniform(0.03, 0.07))


def _fabric(rng: np.random.Generator, hue: float) -> Paint:
    """Weave a vivid two-colour fabric about a hue (in turns)."""
    patterns: tuple[Pattern, ...] = ("stripes", "dots", "patches")
    return Paint(
        patterns[rng.integers(len(patterns))],
        dark=_hsv(hue, rng.uniform(0.65, 0.85), rng.uniform(0.4, 0.6)),
        light=_hsv(hue + rng.uniform(-0.1, 0.1), rng.uniform(0.3, 0.6), rng.uniform(0.85, 1.0)),
        pitch=rng.uniform(0.1, 0.14),
        turn=rng.uniform(0, np.pi),
        lattice=rng.random((12, 12)),
    )


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    """Convert a hue in turns (any real), saturation and value in 0..1 to RGB in 0..255."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return 255 * red, 255 * green, 255 * blue
