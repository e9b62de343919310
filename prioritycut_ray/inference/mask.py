"""The mask that a trained animator's frames are shown with."""

from jaxtyping import Float
from torch import Tensor

from prioritycut_ray.config import Config, PriorityCutConfig
from prioritycut_ray.models.animator import Animation
from prioritycut_ray.training.steps import display_mask


def example_mask(animation: Animation, config: Config) -> Float[Tensor, "B 1 H W"]:
    """Draw a mask as training would; PriorityCut's default mask if the run trained without mixing.

    Args:
        animation: the frames to mask.
        config: that the animator was trained with.
    """
    if config.priority_cut is None:
        config = config.model_copy(update={"priority_cut": PriorityCutConfig()})
    mask = display_mask(animation, config)
    assert mask is not None
    return mask
