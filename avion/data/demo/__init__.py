"""The embedded demo dataset: a hand acts on objects on a table, in verbs that come in time-reversed pairs.

`ensure_demo_dataset(root)` makes it, in the formats of Ego4D, EPIC-KITCHENS-100 and EgoSchema; docs/demo.md
describes it.
"""

from avion.data.demo.dataset import DemoSize, ensure_demo_dataset
from avion.data.demo.paths import DemoPaths

__all__ = ["DemoPaths", "DemoSize", "ensure_demo_dataset"]
