"""The ideas that everything stands on: layer groups, anchors, penalties, schedules, reports. Needs torch alone."""

from lightning_ft.core.anchor import Anchor
from lightning_ft.core.files import atomic_file, atomic_folder
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
from lightning_ft.core.penalty import QuadraticPenalty
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration, Progress

__all__ = [
    "Anchor",
    "Duration",
    "FreezePlan",
    "LayerGroups",
    "Layers",
    "Progress",
    "QuadraticPenalty",
    "Report",
    "atomic_file",
    "atomic_folder",
]
