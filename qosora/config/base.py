"""`QosoraConfig`: how a base is stored.

It is a transformers quantization config: `from_pretrained(..., quantization_config=QosoraConfig(rank=128))` decomposes
an ordinary checkpoint while it loads.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qosora import formats, register
from qosora.decompose import BLOCKSIZES, EMBEDDINGS, QUANT_TYPES, SCALES, SVD_ITERATIONS, SVD_METHODS, SVD_OVERSAMPLING
from qosora.dtypes import COMPUTE_DTYPES, dtype_name, dtype_named
from qosora.errors import ConfigError
from qosora.patterns import matches_module, pattern_problem

__all__ = ["QUANT_METHOD", "QosoraConfig"]

QUANT_METHOD = "qosora"


class QosoraConfig(QuantizationConfigMixin):
    """How a base is decomposed and stored.

    Args:
        rank: Singular triplets kept apart from the residual, at most min(out_features, in_features) per layer.
        rank_pattern: Ranks of single layers: a module name, the end of one, or a regular expression for either, to
            its rank. Of several that match a module, the longest counts.
        svd: "randomized" or "exact".
        svd_iterations: Power iterations of the randomized SVD; 2 keep 96 % of what an exact SVD gains over plain NF4, 4
            keep 99 % (Gemma 3 270M, rank 128).
        svd_oversampling: Oversampling columns of the randomized SVD.
        seed: Seed of the randomized SVD.
        scale: "columns": what is decomposed is the weight with its columns brought to one norm, and the layer
            multiplies its inputs in turn. "calibrated": the columns are scaled by the activations that they meet on
            some text, too. None: the weight as it is. KL divergence of next tokens from the unquantized Gemma 3
            270M's at rank 64: 0.083, 0.061 and 0.121; plain NF4 0.169.
        calibration: For "calibrated" that text: a list of texts, or of lists of token ids; the first 4096 tokens are
            used. It is not stored.
        quant_type: "nf4" or "fp4".
        blocksize: Values per quantization block.
        double_quant: Whether the blocks' absmax values are quantized, too.
        embeddings: How input embeddings and output layer are stored; a model that ties them stores them once. "8bit":
            with a scale for each token. "4bit": decomposed, of a rank as any layer. None: they stay in 16 bits. KL
            divergences as above at rank 128: 0.065, 0.087 and 0.063.
        modules_to_not_convert: Names, or ends or regular expressions of names, of linear layers, or of modules with
            all that is in them, to leave as they are. Routers always stay, and without `embeddings` the output layer.
        compute_dtype: Dtype of the products outside autocast ("bfloat16", "float16", "float32" or the torch dtype);
            by default that of the layer's input.

    Raises:
        ConfigError: With every problem that the arguments have.
        CheckpointError: If they are those of a base in a newer format.

    Example:
        >>> name, config = "meta-llama/Llama-2-7b-hf", QosoraConfig(rank=128, rank_pattern={"down_proj": 256})
        >>> model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)  # doctest: +SKIP
        >>> model.save_pretrained("llama-2-7b-qosora")  # doctest: +SKIP
    """

    def __init__(
        self,
        rank: int = 128,
        rank_pattern: dict[str, int] | None = None,
        svd: str = SVD_METHODS[0],
        svd_iterations: int = SVD_ITERATIONS,
        svd_oversampling: int = SVD_OVERSAMPLING,
        seed: int = 0,
        scale: str | None = "columns",
        calibration: list[str] | list[list[int]] | None = None,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        embeddings: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        compute_dtype: str | torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        version = unknown.pop("format_version", None)
        formats.require_known("quantization_config", version, formats.BASE)
        problems = []
        method = unknown.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            problems.append(f"quant_method must be {QUANT_METHOD!r}, got {method!r}")
        self.quant_method = QUANT_METHOD
        self.rank = rank
        self.rank_pattern = {} if rank_pattern is None else rank_pattern
        self.svd = svd
        self.svd_iterations = svd_iterations
        self.svd_oversampling = svd_oversampling
        self.seed = seed
        self.scale = scale
        self.calibration = calibration
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.embeddings = embeddings
        self.modules_to_not_convert = modules_to_not_convert
        self.compute_dtype = None if compute_dtype is None else dtype_name(compute_dtype)
        known = ", ".join(k for k in self.__dict__ if k != "quant_method")
        #: The format that says which experts, held in one tensor by the model, are layers of their own; None for none,
        #: and before a base is made.
        self.stacks_format = version if version is not None and version >= formats.BASE_WITH_STACKS else None
        problems += [f"unknown option {key!r}; the options are {known}" for key in unknown]
        problems += self._problems()
        if problems:
            raise ConfigError(problems)
        self.rank_pattern = dict(self.rank_pattern)

    def _problems(self) -> list[str]:
        patterns = self.rank_pattern if isinstance(self.rank_pattern, dict) else {}
        problems = [
            f"{name} must be an integer of at least {least}, got {value!r}"
            for name, value, least in [
                ("rank", self.rank, 1),
                ("svd_iterations", self.svd_iterations, 0),
                ("svd_oversampling", self.svd_oversampling, 0),
                ("seed", self.seed, 0),
                *((f"rank_pattern[{key!r}]", value, 1) for key, value in patterns.items()),
            ]
            if type(value) is not int or value < least
        ]
        problems += [
            f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}"
            for name, value, allowed in [
                ("svd", self.svd, SVD_METHODS),
                ("scale", self.scale, (None, *SCALES)),
                ("quant_type", self.quant_type, QUANT_TYPES),
                ("blocksize", self.blocksize, BLOCKSIZES),
                ("double_quant", self.double_quant, (True, False)),
                ("embeddings", self.embeddings, (None, *EMBEDDINGS)),
                ("compute_dtype", self.compute_dtype, (None, *COMPUTE_DTYPES)),
            ]
            if (type(value), value) not in [(type(choice), choice) for choice in allowed]  # 64.0 == 64, 1 == True
        ]
        if self.calibration is not None and self.scale != "calibrated":
            problems.append(f"calibration is for scale='calibrated', got scale={self.scale!r}")
        elif self.calibration is not None and not _are_texts(self.calibration):
            problems.append("calibration must be a list of texts, or of lists of token ids")
        if not isinstance(self.rank_pattern, dict):
            problems.append(f"rank_pattern must be a dict from names to ranks, got {self.rank_pattern!r}")
        names = self.modules_to_not_convert
        if names is not None and not isinstance(names, list):
            problems.append(f"modules_to_not_convert must be a list of names, got {names!r}")
        named = [(f"rank_pattern[{key!r}]", key) for key in patterns]
        named += [(f"modules_to_not_convert: {name!r}", name) for name in (names if isinstance(names, list) else [])]
        problems += [f"{what} {why}" for what, pattern in named if (why := pattern_problem(pattern))]
        return problems

    def rank_of(self, module_name: str) -> int:
        """Return the rank of a layer, by its full name in the model."""
        # Not the first: transformers sorts the keys when it writes config.json.
        matching = [p for p in self.rank_pattern if matches_module(p, module_name)]
        return self.rank_pattern[max(matching, key=lambda p: (len(p), p))] if matching else self.rank

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as a torch dtype."""
        return None if self.compute_dtype is None else dtype_named(self.compute_dtype)

    def factorize_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `factorize.factorize`, without rank and name."""
        return {
            "svd": self.svd,
            "svd_iterations": self.svd_iterations,
            "svd_oversampling": self.svd_oversampling,
            "seed": self.seed,
            "scale": self.scale,
            **self.storage_options(),
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the config of a dict. The first bases had no scale, and name all options but that."""
        first = {"svd_oversampling", "blocksize", "double_quant"} <= config_dict.keys()
        return super().from_dict({**({"scale": None} if first else {}), **config_dict}, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, without the text of the calibration."""
        options = super().to_dict()
        version = options.pop("stacks_format") or formats.BASE_WITHOUT_STACKS
        options.pop("calibration")
        if self.embeddings is None:
            options.pop("embeddings")
        else:
            of_embeddings = formats.BASE_WITH_INT8 if self.embeddings == "8bit" else formats.BASE_WITH_EMBEDDINGS
            version = max(version, of_embeddings)
        return {**options, "format_version": version}

    def storage_options(self) -> dict[str, Any]:
        """Return the options of the 4-bit format: those that `nf4.quantize` takes."""
        return {"quant_type": self.quant_type, "blocksize": self.blocksize, "double_quant": self.double_quant}


def _are_texts(value: object) -> bool:
    if not isinstance(value, list):
        return False
    ids = all(isinstance(row, list) and all(type(i) is int and i >= 0 for i in row) for row in value)
    return ids or all(isinstance(text, str) for text in value)


register.loaded(__name__)
