"""The ideas that everything stands on: layer groups, anchors, penalties, schedules, reports. Needs torch alone."""

from lightning_ft.core.anchor import Anchor
from lightning_ft.core.files import atomic_file, atomic_folder
from lightning_ft.core.fisher import Fisher
from lightning_ft.core.freeze_plan import FreezePlan
from lightning_ft.core.fresh import fresh_parameters, mark_fresh
from lightning_ft.core.layer_groups import LayerGroups
from lightning_ft.core.layers import Layers
from lightning_ft.core.penalty import QuadraticPenalty
from lightning_ft.core.phases import Phase, Stage
from lightning_ft.core.plateau import Plateau
from lightning_ft.core.report import Report
from lightning_ft.core.schedule import Duration, Progress
from lightning_ft.core.timeline import Timeline, step_cost
from lightning_ft.core.token_inputs import TokenInputs

__all__ = [
    "TokenInputs",
    "Anchor",
    "Duration",
    "Fisher",
    "FreezePlan",
    "LayerGroups",
    "Layers",
    "Phase",
    "Plateau",
    "Progress",
    "QuadraticPenalty",
    "Report",
    "Stage",
    "Timeline",
    "atomic_file",
    "atomic_folder",
    "fresh_parameters",
    "mark_fresh",
    "step_cost",
]
