"""Which values a resumed run may change."""

from prioritycut_ray.config import load_config
from prioritycut_ray.runs.compatibility import changed_keys
from tests.places import TINY


def test_changed_keys_are_dotted() -> None:
    old, new = load_config(str(TINY)), load_config(str(TINY), ["optim.lr=1", "priority_cut=null"])
    changed = changed_keys(old.model_dump(mode="json"), new.model_dump(mode="json"))
    assert "optim.lr" in changed
    assert "priority_cut.top_k" in changed
    assert "name" not in changed
