"""How videos that are not video files are stored, and what names their identity."""

import math
import re
from typing import NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.video.decoding import FALLBACK_FPS


class Layout(NamedTuple):
    """What the user says about the inputs.

    Attributes:
        fps: frames per second of clips that are stored as pictures; None leaves out folders of
            frames.
        strip_width: width in pixels of a frame in a picture of frames side by side; None: there
            are no such pictures.
        identity_from: ``folder``, ``name`` or a regular expression; empty for the default, see
            :func:`prioritycut_ray.packing.identities.name_identities`.
    """

    fps: float | None = None
    strip_width: int | None = None
    identity_from: str = ""

    @property
    def has_pictures(self) -> bool:
        """Whether pictures are clips or parts of clips."""
        return self.fps is not None or self.strip_width is not None

    @property
    def strip_fps(self) -> float:
        """Frames per second of strips, which do not need a stated rate."""
        return FALLBACK_FPS if self.fps is None else self.fps

    def check(self) -> None:
        """Check the values.

        Raises:
            UserError: one is not usable; the message names the option.
        """
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise UserError(f"--fps {self.fps:g}: must be a finite number above 0")
        if self.strip_width is not None and self.strip_width < 1:
            raise UserError(f"--strip-width {self.strip_width}: must be at least 1 pixel")
        if self.identity_from not in ("", "folder", "name"):
            self._check_pattern()

    def _check_pattern(self) -> None:
        given = f"--identity-from {self.identity_from!r}"
        try:
            groups = re.compile(self.identity_from).groups
        except re.error as error:
            raise UserError(
                f"{given}: is not a regular expression ({error}); use folder, name, or a regular "
                "expression such as '(id[0-9]+)'"
            ) from None
        if groups > 1:
            raise UserError(
                f"{given}: has {groups} groups; keep the one around the identity, and write the "
                "others as (?:...)"
            )


PLAIN = Layout()
"""Videos in files, and the default identities."""
