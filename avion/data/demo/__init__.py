"""The embedded demo dataset: a hand acts on objects on a table, in verbs that come in time-reversed pairs.

`ensure_demo_dataset(root)` makes it, in the formats of Ego4D (for training) and EPIC-KITCHENS-100 (for evaluation);
docs/demo.md describes it.
"""

from avion.data.demo.dataset import DemoPaths, DemoSize, ensure_demo_dataset

__all__ = ["DemoPaths", "DemoSize", "ensure_demo_dataset"]
