"""Memory of a training step: `plan` predicts it, `profile` measures it, `report` draws both.

Both run one step (`step`) under one tracer (`tracer`): `plan` on the meta device, where tensors have shapes and no
memory, `profile` on real ones.

| module | one line |
|---|---|
| `tracer` | live bytes by category, phase and module |
| `meta_kernels` | what another device's kernels would allocate |
| `standins` | what stands for parts that need real memory |
| `options` | what a planned step is told, and what is said of it |
| `step` | one training step, for a tracer to look at |
| `predict` | the step of a whole model, from few of its layers |
| `traces` | what has been traced, remembered |
| `cards` | sizes of GPUs, and what CUDA adds |
| `shapes` | shapes of well-known models |
| `plan` | `plan` |
| `pictures` | a batch with images, to plan for |
| `run` | the plan of a training run, and the batch that fits |
| `profile` | `profile` |
| `report` | timelines and snapshots |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.memory.cards import Card as Card
    from qosora.memory.cards import the_card as the_card
    from qosora.memory.options import Batch as Batch
    from qosora.memory.options import StepOptions as StepOptions
    from qosora.memory.pictures import batch_with_images as batch_with_images
    from qosora.memory.plan import LASTING as LASTING
    from qosora.memory.plan import Plan as Plan
    from qosora.memory.plan import Usage as Usage
    from qosora.memory.plan import events as events
    from qosora.memory.plan import usage_of as usage_of
    from qosora.memory.predict import TracedModel as TracedModel
    from qosora.memory.predict import meta_model as meta_model
    from qosora.memory.profile import Measurement as Measurement
    from qosora.memory.profile import fill_at_random as fill_at_random
    from qosora.memory.profile import measure as measure
    from qosora.memory.profile import offloading as offloading
    from qosora.memory.profile import random_model as random_model
    from qosora.memory.run import fit_batch_size as fit_batch_size
    from qosora.memory.run import plan_run as plan_run
    from qosora.memory.run import planned_peak as planned_peak
    from qosora.memory.shapes import model_config as model_config
    from qosora.memory.step import prepare_model as prepare_model
    from qosora.memory.step import training_step as training_step

__getattr__, __dir__ = door(
    __name__,
    {
        "step": ["prepare_model", "training_step"],
        "options": ["Batch", "StepOptions"],
        "predict": ["TracedModel", "meta_model"],
        "cards": ["Card", "the_card"],
        "shapes": ["model_config"],
        "plan": ["LASTING", "Plan", "Usage", "events", "usage_of"],
        "pictures": ["batch_with_images"],
        "run": ["fit_batch_size", "plan_run", "planned_peak"],
        "profile": ["Measurement", "fill_at_random", "measure", "offloading", "random_model"],
    },
)
