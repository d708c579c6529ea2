"""Finding the MLP blocks of a model somebody else wrote, reading their weights, and putting trees in their place.

F is an MLP's number of hidden units (its "dense neurons"); d the width it reads and writes.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.config import ConfigError
from ablate.kernels.activations import base
from ablate.kernels.spec import ACTIVATIONS, Activation
from ablate.model.dense import DenseFeedForward
from ablate.model.tree import TreeFeedForward

TOLERANCE = 1e-4
"""Relative difference up to which a block's own output and the formula read out of it count as the same."""

NOT_FINITE = "its weights are not finite"


class TreeMlp(nn.Module):
    """Replace an MLP by dropout(tree(x) + bias) over x [..., d].

    The bias [d] belongs to the wrapper: a tree layer has no output bias, most MLPs have one.
    """

    def __init__(self, tree: TreeFeedForward, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.tree = tree
        self.bias = nn.Parameter(tree.w_out.new_zeros(tree.w_out.shape[-1]))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., d] of x [..., d]."""
        return F.dropout(self.tree(x) + self.bias, self.dropout, self.training)


@dataclass(frozen=True)
class DenseMlp:
    """Weights of one MLP, float32, CPU: y = h w_out + b_out, h = f(x w_in^T + b_in), times (x up^T + b_up) if gated."""

    w_in: Tensor
    """[F, d]; of a gated MLP the gate's rows."""
    b_in: Tensor
    """[F]."""
    w_out: Tensor
    """[F, d]."""
    b_out: Tensor
    """[d]; zero where the block has none."""
    activation: Activation
    up: Tensor | None = None
    """[F, d], gated MLPs only."""
    b_up: Tensor | None = None

    @property
    def gated(self) -> bool:
        """Whether a second projection multiplies the activations (Llama, Qwen; GLU variants, arXiv 2002.05202)."""
        return self.up is not None

    def tensors(self) -> list[Tensor]:
        """Return all weights there are."""
        given = (self.w_in, self.b_in, self.w_out, self.b_out, self.up, self.b_up)
        return [t for t in given if t is not None]

    @property
    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(t.isfinite().all()) for t in self.tensors())

    def hidden(self, x: Tensor) -> Tensor:
        """H [N, F] of x [N, d]."""
        h = base(F.linear(x, self.w_in, self.b_in), self.activation)
        return h if self.up is None else h * F.linear(x, self.up, self.b_up)

    def __call__(self, x: Tensor) -> Tensor:
        """Y [N, d] of x [N, d]."""
        return self.hidden(x) @ self.w_out + self.b_out


@dataclass(frozen=True)
class Found:
    """One MLP of a model: its name, its weights, and where the tree goes."""

    name: str
    """Dotted name of the module that the tree replaces."""
    mlp: DenseMlp
    dropout: float
    """Dropout of the block on its output."""
    pass_through: tuple[str, ...] = ()
    """Names of modules that do nothing any more: OPT's layers hold fc1, activation and fc2 side by side."""


@dataclass(frozen=True)
class Unread:
    """What looks like an MLP of the model, and why no tree can take its place."""

    name: str
    why: str


def find_mlps(model: nn.Module, layers: Iterable[int] | str | Sequence[str] | None = None) -> list[Found]:
    """Return the MLPs of a model in module order, all of them, those at places, or those that match name patterns.

    Patterns are shell-style (`fnmatch`) over dotted module names. Places count every MLP, also what cannot be replaced.

    Raises:
        ConfigError: nothing matches; a place does not exist; an MLP that is asked for cannot be read, with the reason;
            the model has no weights (`meta`), or one MLP in two places.
    """
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(f"model: {type(model).__name__} has weights on 'meta', without data: load them first")
    patterns = [layers] if isinstance(layers, str) else layers
    if patterns is not None and all(isinstance(p, str) for p in patterns):
        chosen: Sequence[Found | Unread] = _by_pattern(model, [str(p) for p in patterns])
    else:
        chosen = _at_places(model, None if layers is None else [int(i) for i in layers])
    for one in chosen:
        if isinstance(one, Unread):
            raise ConfigError(f"layers: MLP {one.name!r} cannot be replaced: {one.why}; give `layers` without it")
    found = [one for one in chosen if isinstance(one, Found)]
    _refuse_shared(model, found)
    return found


def _at_places(model: nn.Module, places: list[int] | None) -> list[Found | Unread]:
    known = _mlps(model)
    if not any(isinstance(one, Found) for one in known):
        what = "no MLP that can be read (two projections with an activation between them, or three if gated)"
        why = f": {known[0].name!r}: {known[0].why}" if known and isinstance(known[0], Unread) else ""
        raise ConfigError(f"layers: {type(model).__name__} has {what}{why}")
    if places is None:
        return known
    for i in places:
        if not -len(known) <= i < len(known):
            raise ConfigError(f"layers has {i}: the model has {len(known)} MLPs, 0 to {len(known) - 1}")
    return [known[i] for i in sorted({i % len(known) for i in places})]


def _mlps(model: nn.Module) -> list[Found | Unread]:
    """Return all that are MLPs, in module order; a module named like one that was read is one too."""
    known: list[Found | Unread] = []
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{one.name}.") for one in known):
            continue
        read = _read(name, module)
        if isinstance(read, Found | Unread):
            known.append(read)
        elif not isinstance(module, TreeMlp | TreeFeedForward):
            others[name] = read
    alike = {_anywhere(one.name) for one in known if isinstance(one, Found)}
    read_already = {one.name for one in known}
    for name, why in others.items():
        if (
            name not in read_already
            and _anywhere(name) in alike
            and not any(one.name.startswith(f"{name}.") for one in known)
        ):
            known.append(Unread(name, why))
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(known, key=lambda one: order[one.name])


def _anywhere(name: str) -> str:
    """Return a module's name without the numbers that tell a layer from the next."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _refuse_shared(model: nn.Module, found: list[Found]) -> None:
    """Raise ConfigError where an MLP that goes is also used elsewhere: there it would stay, without a word."""
    wanted = {id(model.get_submodule(one.name)): one.name for one in found}
    places: dict[int, tuple[int, str]] = {}
    tensors: dict[int, str] = {id(p): one.name for one in reversed(found) for p in _parameters(model, one)}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in wanted:
            parent, _, child = name.rpartition(".")
            place = (id(model.get_submodule(parent)), child)
            if places.setdefault(id(module), place) != place:
                raise ConfigError(f"layers: {wanted[id(module)]!r} and {name!r} are one module: give each a copy first")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = tensors.get(id(parameter))
        if owner and not any(name.startswith(f"{own}.") for own in _own_names(model, owner, found)):
            raise ConfigError(f"layers: {owner!r} shares a weight with {name!r}: give each a copy first")


def _parameters(model: nn.Module, one: Found) -> list[nn.Parameter]:
    return [p for module in _modules(model, one) for p in module.parameters()]


def _modules(model: nn.Module, one: Found) -> list[nn.Module]:
    """Return the modules of an MLP; an activation may be a plain function."""
    named = dict(model.named_modules(remove_duplicate=False))
    return [named[part] for part in (one.name, *one.pass_through) if part in named]


def _own_names(model: nn.Module, owner: str, found: list[Found]) -> list[str]:
    """Return every name under which the modules of an MLP can be reached."""
    one = next(f for f in found if f.name == owner)
    own = {id(module) for module in _modules(model, one)}
    return [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in own]


def replace(model: nn.Module, name: str, pass_through: Iterable[str], new: nn.Module) -> None:
    """Put a module in the place of another, by dotted name; modules named in `pass_through` become identities."""
    for target, module in ((name, new), *((p, nn.Identity()) for p in pass_through)):
        parent, _, child = target.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, module)
        if isinstance(owner, nn.TransformerEncoderLayer):
            # In eval mode PyTorch's fast paths, of a layer and of nested tensors, ask for the old weights.
            owner.activation_relu_or_gelu = 0
            for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
                encoder.use_nested_tensor = False


def _by_pattern(model: nn.Module, patterns: list[str]) -> list[Found | Unread]:
    found: list[Found | Unread] = []
    for pattern in patterns:
        names = [n for n, _ in model.named_modules() if n and fnmatch.fnmatchcase(n, pattern)]
        if not names:
            raise ConfigError(f"layers is {pattern!r}: no module of {type(model).__name__} has such a name")
        for name in names:
            read = _read(name, model.get_submodule(name))
            if not isinstance(read, Found):
                why = read if isinstance(read, str) else read.why
                raise ConfigError(f"layers is {pattern!r}: module {name!r} cannot be replaced: {why}")
            if all(read.name != f.name for f in found):
                found.append(read)
    order = {n: i for i, (n, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda f: order[f.name])


def _read(name: str, module: nn.Module) -> Found | Unread | str:
    """Return a module as an MLP, as one that cannot be replaced, or why it is none."""
    read = _as_mlp(name, module)
    return Unread(name, NOT_FINITE) if isinstance(read, Found) and not read.mlp.finite else read


def _as_mlp(name: str, module: nn.Module) -> Found | Unread | str:
    if isinstance(module, TreeMlp | TreeFeedForward):
        return "it is a tree already"
    if isinstance(module, DenseFeedForward):
        return _own(name, module)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return _inline(name, module, ("linear1", "activation", "linear2"), module.dropout.p, "dropout.p")
    parts = ("fc1", "activation_fn", "fc2")
    others = (m for n, m in module.named_children() if n not in parts for _ in m.parameters())
    if all(isinstance(getattr(module, part, None), nn.Module) for part in parts) and any(True for _ in others):
        return _inline(name, module, parts, getattr(module, "activation_dropout", 0.0), "activation_dropout")
    return _block(name, module)


def _own(name: str, module: DenseFeedForward) -> Found | str:
    dense = module.dense
    if dense.mirror or module.gain != 1.0:
        return f"its activation has mirror {dense.mirror} and gain {module.gain}; a plain one (0 and 1) is expected"
    zero = module.w_in.new_zeros(module.w_in.shape[0])
    b = zero if module.b is None else module.b
    w_out = _plain(module.w_out)
    mlp = DenseMlp(_plain(module.w_in), _plain(b), w_out, w_out.new_zeros(w_out.shape[1]), dense.activation)
    return Found(name, mlp, 0.0)


def _inline(name: str, module: nn.Module, parts: tuple[str, str, str], dropout: float, setting: str) -> Found | str:
    """A layer that computes down(f(up(x))) itself, from parts of these names (OPT, nn.TransformerEncoderLayer)."""
    up, f, down = parts
    first, second = _projection(module.get_submodule(up)), _projection(module.get_submodule(down))
    if first is None or second is None:
        return f"its {up} and {down} are not linear"
    if dropout:
        return f"it drops out hidden units: set {setting} to 0 first"
    activation = _activation(getattr(module, f))
    if activation is None:
        return f"its activation {getattr(module, f)} is not one of {', '.join(ACTIVATIONS)}"
    mlp = DenseMlp(first[0], first[1], second[0].T.contiguous(), second[1], activation)
    at = f"{name}." if name else ""
    return Found(f"{at}{up}", mlp, 0.0, (f"{at}{f}", f"{at}{down}"))


def _block(name: str, module: nn.Module) -> Found | Unread | str:
    """A module that is an MLP and nothing else; what is read out of it must reproduce its output on random input."""
    linears = {n: p for n, m in module.named_children() if (p := _projection(m)) is not None}
    others = [m for m in module.children() if _projection(m) is None and not isinstance(m, nn.Dropout)]
    if len(linears) not in (2, 3) or any(True for m in others for _ in m.parameters()):
        return f"it has {len(linears)} projections and {len(others)} other parts; two or three projections are expected"
    parts = list(linears.values())
    d = parts[0][0].shape[1]
    out = parts[-1]
    if out[0].shape[0] != d or any(w.shape != (out[0].shape[1], d) for w, _ in parts[:-1]):
        shapes = ", ".join(f"{n} {tuple(w.shape)}" for n, (w, _) in linears.items())
        return f"its projections do not go from one width to F units and back: {shapes}"
    w_out, b_out = out[0].T.contiguous(), out[1]
    # The closest of all candidates, so that the two forms of GELU, and a gate and its factor, are not mistaken.
    pairs = [(parts[0], ())] if len(parts) == 2 else [(parts[0], parts[1]), (parts[1], parts[0])]
    candidates = [DenseMlp(*first, w_out, b_out, f, *up) for f in ACTIVATIONS for first, up in pairs]
    if not candidates[0].finite:
        return Unread(name, NOT_FINITE)
    difference = _differences(module, candidates)
    fits = [i for i, value in enumerate(difference) if value <= TOLERANCE]
    if not fits:
        why = f"{type(module).__name__} computes something else than down(f(up(x))), with f one of {', '.join(ACTIVATIONS)}"
        # Attention has projections from its width to its width, and is none.
        return Unread(name, why) if parts[0][0].shape[0] != d else why
    best = _best(fits, difference, candidates, module)
    if best is None:
        return Unread(name, "its weights are zero: several activations give its output, so it cannot be read")
    drops = [(n, m.p) for n, m in module.named_children() if isinstance(m, nn.Dropout)]
    last = list(dict(module.named_children()))[-1]
    if any(p for n, p in drops if n != last):
        return Unread(name, f"it drops out hidden units ({', '.join(n for n, _ in drops)}): set that to 0 first")
    return Found(name, candidates[best], dict(drops).get(last, 0.0))


def _best(fits: list[int], difference: list[float], candidates: list[DenseMlp], module: nn.Module) -> int | None:
    """Return the place of the candidate that a module is; where several fit alike, its own activation decides."""
    best = min(fits, key=difference.__getitem__)
    alike = [i for i in fits if difference[i] <= difference[best]]
    if len({candidates[i].activation for i in alike}) == 1:
        return best
    named = {_activation(child) for child in module.children() if _projection(child) is None}
    return next((i for i in alike if candidates[i].activation in named), None)


def _projection(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight [out, in] and bias [out] of nn.Linear or Hugging Face's Conv1D (stored as [in, out]); None for others."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():  # quantised ones hold codes
        return None
    if isinstance(module, nn.Linear):
        w = _plain(module.weight)
    elif type(module).__name__ == "Conv1D" and weight.ndim == 2:
        w = _plain(weight).T.contiguous()
    else:
        return None
    return w, _plain(bias) if isinstance(bias, Tensor) else w.new_zeros(w.shape[0])


@torch.no_grad()
def _activation(f: Callable[[Tensor], Any]) -> Activation | None:
    """The name of an activation, by its values; GELU's two forms differ by up to 5e-4, far over 1e-6."""
    z = torch.linspace(-6, 6, 241)
    try:
        values = f(z)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(values, Tensor) or values.shape != z.shape:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(values, base(z, name), atol=1e-6, rtol=1e-6):
            return name
    return None


@torch.no_grad()
def _differences(module: nn.Module, candidates: list[DenseMlp]) -> list[float]:
    """Largest differences between a module's output on random input and the candidates', over its spread."""
    own = copy.deepcopy(module).float().cpu().eval()
    x = torch.randn(64, candidates[0].w_in.shape[1], generator=torch.Generator().manual_seed(0))
    x = x * (2 / F.linear(x, candidates[0].w_in).std().clamp(min=1e-6))
    try:
        y = own(x)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return [math.inf] * len(candidates)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return [math.inf] * len(candidates)
    return [float((y - mlp(x)).abs().max() / y.std().clamp(min=1e-12)) for mlp in candidates]


def _plain(t: Tensor) -> Tensor:
    return t.detach().float().cpu().clone()
