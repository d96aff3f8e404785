"""Text from a model, and how good it is.

| module | one line |
|---|---|
| `generation` | text from prompts |
| `chat` | a conversation, with one adapter or another |
| `evaluation` | loss, perplexity, exact match |
| `classification` | accuracy and F1 of a classifier |
| `preferences` | accuracy of a model of rewards |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qosora._lazy import door

if TYPE_CHECKING:
    from qosora.inference.chat import Chat as Chat
    from qosora.inference.classification import ClassResult as ClassResult
    from qosora.inference.classification import class_metrics as class_metrics
    from qosora.inference.classification import class_names as class_names
    from qosora.inference.classification import evaluate_classes as evaluate_classes
    from qosora.inference.classification import judge as judge
    from qosora.inference.classification import pad_token as pad_token
    from qosora.inference.evaluation import EvalResult as EvalResult
    from qosora.inference.evaluation import batch_losses as batch_losses
    from qosora.inference.evaluation import evaluate as evaluate
    from qosora.inference.evaluation import logits_of_states as logits_of_states
    from qosora.inference.evaluation import logits_rows as logits_rows
    from qosora.inference.evaluation import mean_loss as mean_loss
    from qosora.inference.evaluation import on_text_alone as on_text_alone
    from qosora.inference.evaluation import perplexity as perplexity
    from qosora.inference.evaluation import returning as returning
    from qosora.inference.generation import generate as generate
    from qosora.inference.generation import inference as inference
    from qosora.inference.generation import seer_of as seer_of
    from qosora.inference.preferences import RewardResult as RewardResult
    from qosora.inference.preferences import evaluate_rewards as evaluate_rewards

__getattr__, __dir__ = door(
    __name__,
    {
        "generation": ["generate", "inference", "seer_of"],
        "chat": ["Chat"],
        "classification": ["ClassResult", "class_metrics", "class_names", "evaluate_classes", "judge", "pad_token"],
        "preferences": ["RewardResult", "evaluate_rewards"],
        "evaluation": [
            "EvalResult",
            "batch_losses",
            "evaluate",
            "logits_of_states",
            "logits_rows",
            "mean_loss",
            "on_text_alone",
            "perplexity",
            "returning",
        ],
    },
)
