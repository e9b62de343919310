"""How puppets move: rigid poses [..., 2, 3], a rotation and then a translation, and motions.

In the image x points right and y points down; angles are in radians, clockwise on screen.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Motion = dict[str, Floats]
"""How any puppet moves over T frames; each value is [T].

``x`` and ``y`` are the place of the torso in frame fractions. The others are angles in radians:
that of the torso, and that of every other part relative to its parent, by the name of the joint.
"""


def joined(first: Motion, second: Motion) -> Motion:
    """Return one motion, and then another one."""
    return {name: np.concatenate([first[name], second[name]]) for name in first}


def first_pose(motion: Motion) -> Motion:
    """Return the motion of the first frame alone."""
    return {name: values[:1] for name, values in motion.items()}


def relative_to(start: Motion, driving: Motion) -> Motion:
    """Return the first pose of ``start``, changed as ``driving`` changes since its first frame.

    The changes of the torso's place and of every angle are added to those of the first pose.
    """
    return {name: start[name][:1] + (driving[name] - driving[name][:1]) for name in start}


def wave(rng: np.random.Generator, frames: int) -> Floats:
    """Swing between -1 and 1: a slow sinusoid with a quicker, smaller one on top: [T]."""
    time = np.arange(frames)
    slow, quick = 2 * np.pi * (time / rng.uniform([[26], [13]], [[40], [20]]) + rng.random((2, 1)))
    swing: Floats = 0.75 * np.sin(slow) + 0.25 * np.sin(quick)
    return swing


def pose(x: Floats, y: Floats, angle: Floats) -> Floats:
    """Turn by an angle [T] (radians, clockwise on screen), then shift to (x, y): [T, 2, 3]."""
    shift = np.stack([x, y], axis=-1)[..., None]
    return np.concatenate([np.moveaxis(rotation(angle), -1, 0), shift], axis=-1)


def compose(outer: Floats, inner: Floats) -> Floats:
    """Chain poses [T, 2, 3]: apply the inner one first."""
    chained: Floats = outer[..., :2] @ inner
    chained[..., 2] += outer[..., 2]
    return chained


def rotation(angle: Floats | float) -> Floats:
    """Build rotation matrices [2, 2, ...] from angles [...] in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def to_image(pose: Floats, points: Floats) -> Floats:
    """Carry part points [2, N] to the image with one pose [2, 3]."""
    carried: Floats = pose[:, :2] @ points + pose[:, 2:]
    return carried


def to_part(pose: Floats, points: Floats) -> Floats:
    """Carry image points [2, N] to a part with one pose [2, 3]; the inverse of :func:`to_image`."""
    # The inverse of a rotation is its transpose.
    carried: Floats = pose[:, :2].T @ (points - pose[:, 2:])
    return carried
