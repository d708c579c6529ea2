"""`ablate.convert`: trees in place of a trained model's MLPs, and such models on disk (Hugging Face, safetensors).

A converted Hugging Face model gets a class and a configuration class of its own (`TreeGPT2LMHeadModel`, model type
`ablate_gpt2`), made from the class it had: the configuration carries every replaced layer's settings, and the class
rebuilds the trees before weights are loaded. So `save_pretrained` writes plain safetensors, `from_pretrained` (here, or
of the Auto classes once the type is registered) reads them, and software that knows no trees refuses the unknown model
type, where under the old one it would build MLPs with random weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ablate.config import ConfigError, Tree, parse
from ablate.config.text import load_json, read_text
from ablate.model import neuron_placement
from ablate.model.auto import PREFIX
from ablate.model.mlps import Found, TreeMlp, find_mlps, replace
from ablate.model.network import evaluating
from ablate.model.tree import TreeFeedForward

HELD_OUT = 4
"""One in so many calibration tokens is kept from the fit, to measure the reconstruction error on."""

Init = Literal["dense", "shuffled", "random"]
Batch = Tensor | Mapping[str, Tensor]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """One replaced MLP."""

    name: str
    dense_units: int
    total_units: int
    active_units: int
    error: float | None
    """Held-out |y - dense y|² over |dense y - its mean|² on the dense model's own inputs; None without calibration."""
    n_eff_frac: float | None
    """Effective leaves over L, mean over trees, on the held-out tokens; None without calibration."""
    exact: bool
    """Whether the layer holds the MLP unchanged (depth 0, as many units)."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the model (the same object, changed in place) and a report of every layer."""

    model: nn.Module
    init: Init
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def error(self) -> float | None:
        """Mean reconstruction error over the layers."""
        errors = [layer.error for layer in self.layers if layer.error is not None]
        return sum(errors) / len(errors) if errors else None

    def __str__(self) -> str:
        rows = [f"{'layer':40} {'dense':>7} {'units':>7} {'active':>7} {'error':>8} {'n_eff_frac':>10}"]
        for layer in self.layers:
            error = "" if layer.error is None else f"{layer.error:.4f}"
            used = "" if layer.n_eff_frac is None else f"{layer.n_eff_frac:.3f}"
            units = f"{layer.dense_units:7} {layer.total_units:7} {layer.active_units:7}"
            rows.append(f"{layer.name:40} {units} {error:>8} {used:>10}")
        return "\n".join(rows)


def convert(
    model: nn.Module,
    *,
    layers: Iterable[int] | str | Sequence[str] | None = None,
    tree: Tree | None = None,
    init: Init = "dense",
    calibration: Batch | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> Conversion:
    """Replace MLPs of `model` by tree layers, in place.

    Args:
        model: a Hugging Face causal model (OPT, GPT-2, Llama- and Qwen-style, …), our Transformer, or any nn.Module.
        layers: all MLPs, or places among them ([0, 3]), or patterns of module names ("model.layers.*.mlp").
        tree: the layer; its activation must be the MLP's. Where not given: nano's shape with the MLPs' activation.
        init: `dense` places the MLP's neurons in the trees (see `neuron_placement`); `shuffled` places them at random and fits
            the outputs alike, as a control; `random` starts the layer as `tree.init` says.
        calibration: what the model is called with once (ids [B, T], or keyword tensors) to see its MLPs' inputs. Both
            `dense` and `shuffled` need it, unless the MLP fits in as it is (depth 0, as many units); a quarter of the
            tokens is held out to measure the error.
        backend: of the layers' kernels.
        seed: of everything drawn here.

    A gated MLP's product of two projections cannot be written as tree units: its gate's rows become units, its output
    rows are scaled by the best constant in place of the other factor, then fitted; the reported error says how far that
    goes. The MLP's output bias and dropout stay, in the wrapper. Returns the report. Raises ConfigError on models,
    layers and settings that cannot be used.
    """
    found = find_mlps(model, layers)
    tree = tree if tree is not None else Tree(activation=found[0].mlp.activation)
    exact = init == "dense" and all(neuron_placement.is_exact(f.mlp, tree) for f in found)
    if init != "random":
        for one in found:
            neuron_placement.check(one.mlp, tree)
    needs = (init != "random" and not exact) or (init == "random" and tree.init in {"orthogonal", "median_split"})
    if calibration is None and (needs or tree.router_input == "centred"):
        raise ConfigError(f"calibration is missing: init {init!r} with this tree looks at tokens; give ids [B, T]")
    inputs = _inputs(model, found, calibration) if calibration is not None else {}
    reports, built = [], {}
    for i, one in enumerate(found):
        built[one.name] = new = _layer(one, tree, init, inputs.get(one.name), backend, seed + i)
        reports.append(_report(one, new, tree, inputs.pop(one.name, None), init))
    for one in found:
        parameter = next(model.get_submodule(one.name).parameters())
        new = built[one.name].to(parameter.device, parameter.dtype).train(model.training)
        replace(model, one.name, one.pass_through, new)
    if hasattr(model, "save_pretrained"):
        _retype(model, found, tree)
    return Conversion(model, init, reports)


def from_pretrained(folder: str | Path, **arguments: Any) -> Any:
    """A converted Hugging Face model from what `save_pretrained` wrote; arguments are those of `from_pretrained` there.

    Raises ConfigError for a folder without such a model.
    """
    path = Path(folder) / "config.json"
    try:
        config = load_json(read_text(path, repr(str(path))), repr(str(path)))
        base = config["ablate"]["base_class"]
    except FileNotFoundError:
        raise ConfigError(f"{str(path)!r} does not exist: a folder written by save_pretrained is expected") from None
    except (KeyError, TypeError):
        raise ConfigError(f"{str(path)!r} is not a converted model's configuration: it has no entry 'ablate'") from None
    return register(base).from_pretrained(folder, **arguments)


def register(base_class: str) -> Any:
    """The converted form of a Hugging Face model class ("GPT2LMHeadModel"), known to the Auto classes from now on.

    Raises ConfigError where `transformers` has no such class.
    """
    transformers = _transformers()
    base = getattr(transformers, str(base_class), None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise ConfigError(f"{base_class!r} is not a model class of transformers {transformers.__version__}")
    return _tree_class(base)


def _layer(one: Found, tree: Tree, init: Init, x: Tensor | None, backend: str, seed: int) -> TreeMlp:
    generator = torch.Generator().manual_seed(seed)
    new = TreeMlp(
        TreeFeedForward(one.mlp.w_in.shape[1], tree, backend=backend, generator=generator), dropout=one.dropout
    )
    layer = new.tree
    with torch.no_grad():
        new.bias.copy_(one.mlp.b_out)
        fitted = None if x is None else x[_fit_rows(x)]
        if init == "random":
            if fitted is not None and layer.needs_calibration:
                layer.calibrate(fitted)
            return new
        if fitted is None:
            placed = neuron_placement.copy_exactly(one.mlp, tree)
        else:
            placed = neuron_placement.place(one.mlp, tree, fitted, shuffled=init == "shuffled", seed=seed)
        layer.w_in.copy_(placed.w_in)
        layer.w_out.copy_(placed.w_out)
        new.bias.copy_(placed.bias)
        if layer.b is not None:
            layer.b.copy_(placed.b)
        if tree.router_input == "centred" and fitted is not None:
            layer.input_mean.copy_(fitted.mean(0))
        layer.freeze_router()
    return new


@torch.no_grad()
def _report(one: Found, new: TreeMlp, tree: Tree, x: Tensor | None, init: Init) -> LayerReport:
    error = used = None
    if x is not None:
        held = x[~_fit_rows(x)]
        y = one.mlp(held)
        with evaluating(new):
            error = float((new(held) - y).square().sum() / (y - y.mean(0)).square().sum().clamp(min=1e-30))
        leaves = new.tree.last_leaves
        assert leaves is not None
        used = _n_eff_frac(leaves, tree.leaves)
    exact = init == "dense" and neuron_placement.is_exact(one.mlp, tree)
    units = one.mlp.w_in.shape[0]
    return LayerReport(one.name, units, tree.total_units, tree.active_units, error, used, exact)


def _n_eff_frac(leaves: Tensor, count: int) -> float:
    """exp(entropy) of leaf usage over L, mean over trees, from leaves [N, K]."""
    shares = torch.stack([torch.bincount(column.long(), minlength=count) for column in leaves.T]) / leaves.shape[0]
    return float((torch.special.entr(shares).sum(1).exp() / count).mean())


def _fit_rows(x: Tensor) -> Tensor:
    """bool [N]: tokens to fit on; every fourth one is held out."""
    return torch.arange(x.shape[0]) % HELD_OUT != HELD_OUT - 1


@torch.no_grad()
def _inputs(model: nn.Module, found: list[Found], calibration: Batch) -> dict[str, Tensor]:
    """Inputs [N, d] of every MLP in one pass of the dense model, float32 on the CPU."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float().cpu()
            seen.setdefault(name, []).append(rows)  # a block that is used twice calls its MLP twice

        return hook

    hooks = [model.get_submodule(f.name).register_forward_pre_hook(keep(f.name)) for f in found]
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            if isinstance(calibration, Tensor):
                model(calibration.to(device))
            else:
                model(**{k: v.to(device) for k, v in calibration.items()})
    finally:
        for handle in hooks:
            handle.remove()
    missing = [f.name for f in found if f.name not in seen]
    if missing:
        raise ConfigError(f"layers: {missing[0]!r} was not called while the calibration batch ran")
    inputs = {name: torch.cat(rows) for name, rows in seen.items()}
    for name, x in inputs.items():
        if not bool(x.isfinite().all()):
            raise ConfigError(f"calibration: the model's own inputs of {name!r} are not finite")
    return inputs


# --- Hugging Face classes


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is not installed: pip install 'ablate[qa]'") from None
    return transformers


def _retype(model: Any, found: list[Found], tree: Tree) -> None:
    """Give a Hugging Face model the class and configuration that rebuild its trees."""
    transformers = _transformers()
    if not isinstance(model, transformers.PreTrainedModel):
        return
    old = model.config
    known: dict[str, Any] = getattr(old, "ablate", None) or {"base_class": type(model).__name__, "layers": {}}
    if getattr(transformers, known["base_class"], None) is None:
        _log.warning("%s is no class of transformers: save it as a state_dict", known["base_class"])
        return
    entries = {
        f.name: {
            "tree": tree.model_dump(mode="json"),
            "width": f.mlp.w_in.shape[1],
            "dropout": f.dropout,
            "pass_through": list(f.pass_through),
        }
        for f in found
    }
    # A copy: whoever shares the old configuration (the dense model it came from) keeps it.
    config = copy.deepcopy(old)
    cls = register(known["base_class"])
    config.__class__ = cls.config_class
    config.ablate = {**known, "layers": {**known["layers"], **entries}}
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    model.__class__ = cls


@cache
def _tree_class(base: Any) -> Any:
    """The subclass of a Hugging Face model class that builds trees where its configuration says so."""
    transformers = _transformers()
    config_class: Any = type(
        f"Tree{base.config_class.__name__}",
        (base.config_class,),
        {"model_type": PREFIX + base.config_class.model_type, "__module__": __name__},
    )

    def __init__(self: Any, config: Any, *inputs: Any, **arguments: Any) -> None:
        base.__init__(self, config, *inputs, **arguments)
        for name, entry in config.ablate["layers"].items():
            settings = parse(Tree, entry["tree"], where=f"config.ablate.layers.{name}.tree")
            new = TreeMlp(TreeFeedForward(entry["width"], settings), dropout=entry["dropout"])
            replace(self, name, entry["pass_through"], new)

    def initialize_weights(self: Any) -> None:
        # While a checkpoint is loaded, what it does not hold is empty memory: always the buffers of a step under way.
        base.initialize_weights(self)
        for module in self.modules():
            if isinstance(module, TreeFeedForward):
                if not all(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                    module.reset_parameters()
                module.forget_step()

    members = {"__init__": __init__, "initialize_weights": initialize_weights, "config_class": config_class}
    named = {"__module__": __name__, "__doc__": f"{base.__name__} with tree feed-forwards."}
    cls = type(f"Tree{base.__name__}", (base,), {**members, **named})
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if auto._model_mapping.get(base.config_class, None) is base:
            auto.register(config_class, cls, exist_ok=True)
    return cls
