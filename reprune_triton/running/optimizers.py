"""The optimizers that train a model: find them, and make what they keep for its parameters follow the channels.

People wrap optimizers (Lookahead, SAM, accelerate, sharding), give several, and write their own. So nothing here goes
by the name of a class or of a state. An optimizer is anything with `param_groups` and `step()`, wherever it is held.
What a state means is found before the training, by steps of a twin of the optimizer that has parameters of its own.
"""

import contextlib
import copy
import functools
import operator
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reprune_triton import capture
from reprune_triton.errors import RepruneError
from reprune_triton.selection import rng

Path = tuple[Any, ...]  # to a tensor: the name of an attribute, then keys of dicts and indices of lists
Hook = Callable[..., None]  # is given the optimizer that steps, and more that is not used


class State(NamedTuple):
    """A tensor of a parameter's shape that an optimizer keeps for it."""

    tensor: Tensor
    fresh: float | None  # its value for a channel without a past; None: the weight itself


class Optimizers:
    """All optimizers in `given` that train some of `parameters`.

    Args:
        given: an optimizer, a wrapper of one, a list or dict of these, or None.
    Raises:
        RepruneError: if none is found.
    """

    def __init__(self, given: Any, parameters: Iterable[nn.Parameter]):
        self.given, own, found = given, set(parameters), _optimizers(given)
        self.members = [x for x in found if not own.isdisjoint(_parameters(x))]
        if given is not None and not found:
            raise RepruneError(
                f"a {type(given).__name__} is no optimizer: it has no param_groups and step(). Give the one that has"
            )
        if given is not None and not self.members:
            raise RepruneError("the optimizer trains none of this model's parameters: give the one that does")
        self.stepped = False  # true after a step; the caller sets it to False
        self.replayed = False  # a CUDA graph holds a step: it may be replayed unseen
        self._fresh: dict[Path, float | None] = {}  # State.fresh, by number of the optimizer and path in it
        self._known: tuple[list[Any], list[tuple[int, State]]] = [], []  # parameters and states; their `states`

    @property
    def parameters(self) -> set[nn.Parameter]:
        """All parameters that they train, of other models too."""
        return {p for optimizer in self.members for p in _parameters(optimizer)}

    def hook(self, before: Hook, after: Hook) -> list[Any]:
        """Call `before` and `after` around every step, also around one within another; the handles have `remove()`."""
        noted = functools.partial(self._note, after)
        handles: list[Any] = []
        for optimizer in self.members:
            if getattr(type(optimizer).step, "hooked", False):  # torch's mark of a step that calls its hooks
                handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(noted)]
            else:
                handles.append(_Wrapped(optimizer, before, noted))
        return handles

    def _note(self, after: Hook, optimizer: Any, *_: object) -> None:
        after(optimizer)
        self.stepped = True
        self.replayed |= capture.capturing()

    def states(self, parameters: Sequence[nn.Parameter]) -> list[tuple[int, State]]:
        """Return all states that are kept for these parameters in their shapes, each with the parameter's number."""
        kept, objects, simple = list(self._kept()), list[Any](parameters), True
        for _, states in kept:
            for parameter in parameters:
                state = states.get(parameter, {})
                simple = simple and type(state) is dict
                objects += state.values() if type(state) is dict else ()
        before, found = self._known  # asked for in every step, and as a rule the same as in the last one
        if simple and len(objects) == len(before) and all(map(operator.is_, objects, before)):
            return found
        found = []
        for number, parameter in enumerate(parameters):
            for where, states in kept:
                for path, value in _tensors(states.get(parameter)):
                    if value.shape == parameter.shape:
                        if where + path not in self._fresh:
                            self._fresh[where + path] = self._at_first_sight(states, path)
                        found.append((number, State(value, self._fresh[where + path])))
        simple = simple and not any(isinstance(x, (list, tuple, dict, deque)) for x in objects)
        self._known = (objects, found) if simple else ([], [])
        return found

    def check(self, names: Mapping[nn.Parameter, str]) -> None:
        """Raise RepruneError if something is kept for one of these parameters that cannot follow its channels."""
        for optimizer in self.members:
            _check(optimizer, names)

    def try_out(self, names: Mapping[nn.Parameter, str]) -> None:
        """Learn from twins of the optimizers what they will keep for these parameters, and `check` it.

        Some optimizers cannot be tried, as they need more than a gradient. Of these a state that is near the weight
        when it is first seen counts as a weight, and any other as an average.

        Args:
            names: the parameters, and their names for messages.
        Raises:
            RepruneError: if something cannot follow the channels.
        """
        self._known = [], []
        for number, optimizer in enumerate(self.members):
            if len(_optimizers(optimizer)) == 1:  # states of wrappers are taken as they are first seen
                self._fresh |= {(number, *path): fresh for path, fresh in _tried(optimizer, names).items()}

    def carry(self, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]) -> None:
        """Train other parameters in place of some. An interrupted call can be repeated.

        Args:
            replaced: old parameter -> (new parameter, function that gives a tensor of the old shape the new shape).
        """
        new = {old: parameter for old, (parameter, _) in replaced.items()}

        def exchanged(value: Any) -> Any:
            return new.get(value, value) if isinstance(value, nn.Parameter) else value

        self._known = [], []
        for _, states in list(self._kept()):
            for old, (parameter, narrowed) in replaced.items():
                if old in states:
                    fit = functools.partial(_fitted, shape=old.shape, narrowed=narrowed)
                    states[parameter] = _exchange(states[old], fit)
                    if parameter is not old:
                        del states[old]
        for optimizer in self.members:
            for group in optimizer.param_groups:
                group["params"] = _exchange(group["params"], exchanged)
            for name, value in list(vars(optimizer).items()):
                if name not in ("param_groups", "state") and isinstance(value, (list, tuple, dict)):
                    setattr(optimizer, name, _exchange(value, exchanged))

    def _kept(self) -> Iterator[tuple[Path, dict[Any, Any]]]:
        """Yield the dicts of all optimizers that have parameters as keys, and the paths to them.

        A dict that a wrapper shares with the optimizer inside comes once, as that one's.
        """
        seen: list[Any] = []
        for number, optimizer in reversed([*enumerate(self.members)]):
            for where, states in _kept(optimizer):
                if not any(states is x for x in seen):
                    seen.append(states)
                    yield (number, *where), states

    @staticmethod
    def _at_first_sight(states: Mapping[Any, Any], path: Path) -> float | None:
        """Return `State.fresh` of a state that no twin has shown."""
        pairs = [
            (value, parameter)
            for parameter, state in states.items()
            if isinstance(parameter, nn.Parameter)
            for key, value in _tensors(state)
            if key == path and value.shape == parameter.shape
        ]
        return None if _near(pairs) else 0.0


class _Wrapped:
    """Hooks of an optimizer whose step() calls none: they replace the step() of this one object."""

    def __init__(self, optimizer: Any, before: Hook, after: Hook):
        self._optimizer, self._inside, self._on = optimizer, vars(optimizer).get("step"), True
        step = optimizer.step

        @functools.wraps(step)  # schedulers look for a mark on it
        def hooked(_: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return step(*args, **kwargs)
            before(optimizer)
            found = step(*args, **kwargs)
            after(optimizer)
            return found

        self._hooked = optimizer.step = types.MethodType(hooked, optimizer)

    def remove(self) -> None:
        self._on = False  # another wrapper around it may still call it
        if vars(self._optimizer).get("step") is self._hooked:
            del self._optimizer.step
            if self._inside is not None:
                self._optimizer.step = self._inside


def _optimizers(given: Any) -> list[Any]:
    """Return all optimizers that this is or holds, outer ones before inner ones."""
    found: dict[int, Any] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, (list, tuple, set, dict)):
            for item in list(value.values() if isinstance(value, dict) else value):
                look(item, depth)
        elif id(value) not in found and _is_optimizer(value):
            found[id(value)] = value
            look(getattr(value, "__dict__", {}), depth)
        elif depth == 0:  # the given object itself, which may hold some
            look(getattr(value, "__dict__", {}), depth + 1)

    look([*given.members] if isinstance(given, Optimizers) else given, 0)
    return list(found.values())


def _is_optimizer(value: Any) -> bool:
    if isinstance(value, (type, Tensor, nn.Module)):
        return False
    return callable(getattr(value, "step", None)) and isinstance(getattr(value, "param_groups", None), list)


def _parameters(optimizer: Any) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kept(optimizer: Any) -> Iterator[tuple[Path, dict[Any, Any]]]:
    """Yield the dicts of an optimizer that have parameters as keys, its state and others, and the paths to them."""

    def look(value: Any, path: Path) -> Iterator[tuple[Path, dict[Any, Any]]]:
        if isinstance(value, dict) and path != ("param_groups",):
            if any(isinstance(key, nn.Parameter) for key in value):
                yield path, value
            for key, item in value.items():
                if isinstance(item, dict) and not isinstance(key, nn.Parameter):
                    yield from look(item, (*path, key))

    return look(getattr(optimizer, "__dict__", {}), ())


def _tensors(value: Any, path: Path = (), objects: bool = False) -> Iterator[tuple[Path, Tensor]]:
    """Yield all tensors in a value and in its lists and dicts, but those that have a parameter as their key.

    Args:
        objects: whether to look into attributes of objects too.
    """
    if torch.is_tensor(value):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, nn.Parameter):
                yield from _tensors(item, (*path, key), objects)
    elif isinstance(value, (list, tuple, deque)):
        for number, item in enumerate(value):
            yield from _tensors(item, (*path, number), objects)
    elif objects and hasattr(value, "__dict__"):
        yield from _tensors(vars(value), path, objects=False)


def _exchange(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change everything in a value's lists and dicts, which stay the same objects; return the value."""
    if isinstance(value, list):
        value[:] = [_exchange(item, change) for item in value]
    elif isinstance(value, dict):
        changed = {change(key): _exchange(item, change) for key, item in value.items()}
        value.update(changed)
        for key in set(value) - set(changed):
            del value[key]
    elif isinstance(value, deque) or type(value) is tuple:
        items = [_exchange(item, change) for item in value]
        return deque(items, value.maxlen) if isinstance(value, deque) else tuple(items)
    else:
        return change(value)
    return value


def _fitted(value: Any, shape: torch.Size, narrowed: Callable[[Tensor], Tensor]) -> Any:
    """Return the slice of a tensor of this shape; all else as it is."""
    return narrowed(value) if torch.is_tensor(value) and value.shape == shape else value


def _check(optimizer: Any, names: Mapping[nn.Parameter, str]) -> None:
    """Raise RepruneError if this optimizer keeps something for these parameters that cannot follow channels."""
    way_out = "use SGD, AdamW or another optimizer whose state has one number for every entry of its parameter"
    own = set(_parameters(optimizer))
    total = sum(p.numel() for p in own) if len(own) > 1 else -1
    kept = [(where, *item) for where, states in _kept(optimizer) for item in states.items()]
    for where, parameter, state in kept:
        for path, value in _tensors(state, objects=True) if isinstance(parameter, nn.Parameter) else ():
            together = value.numel() >= total > parameter.numel()
            of = names.get(parameter, "all parameters together" if together else "")
            plain = type(value) in (Tensor, nn.Parameter) and (value.is_floating_point() or value.is_complex())
            if of and value.numel() > 1 and not (plain and value.shape == parameter.shape):
                name = ".".join(map(str, (*where[where[0] == "state" :], *path)))
                form = "" if plain else f" of {type(value).__name__} {value.dtype}".replace("torch.", "")
                raise RepruneError(
                    f"{type(optimizer).__name__} keeps a state {name} {tuple(value.shape)}{form} for {of} "
                    f"{tuple(parameter.shape)}, which cannot follow its channels: {way_out}"
                )
    shapes = {tuple(p.shape): name for p, name in names.items() if p.dim() > 1}
    for path, value in _tensors({key: item for key, item in vars(optimizer).items() if key != "param_groups"}):
        what = "all parameters together" if value.numel() == total else shapes.get(tuple(value.shape))
        if what and value not in own:
            raise RepruneError(
                f"{type(optimizer).__name__} keeps a tensor for {what} in {'.'.join(map(str, path))}, and not by "
                f"parameter, which cannot follow channels: {way_out}"
            )


@torch.no_grad()
def _near(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether these values are weights rather than averages: nearer to the weights than half the way from zero.

    Args:
        pairs: values, and the weights of the same shapes.
    """
    apart, size = torch.zeros(()), torch.zeros(())
    for value, weight in pairs:
        apart = apart.to(weight.device) + (value.to(weight.device).float() - weight.float()).square().sum()
        size = size.to(weight.device) + weight.float().square().sum()
    return bool(apart < 0.25 * size)


@torch.enable_grad()
def _tried(optimizer: Any, names: Mapping[nn.Parameter, str]) -> dict[Path, float | None]:
    """Return `State.fresh` of all that the optimizer will keep, found with a twin of it.

    The twin makes two steps with a gradient of zero. A state near the weight then is a weight (None); one that is the
    same number everywhere and after both steps is that number, a step size say; any other is an average (0). A step
    with another gradient follows, as some states appear only then, and one as a channel makes it that has come back.
    """
    for filled in (False, True):
        with rng.kept(p.device for p in names), contextlib.suppress(_NoTwin):
            return _tried_with(*_twin(optimizer, names, filled))
    return {}


def _tried_with(twin: Any, alike: Mapping[nn.Parameter, str]) -> dict[Path, float | None]:
    """`_tried`, with this twin and these parameters of it."""

    def step(parameter: nn.Parameter, factor: float) -> dict[Path, Tensor]:
        """Return the states of the parameter's shape after a step whose gradient is the weight times `factor`."""
        parameter.grad = parameter.detach() * factor
        _step(twin, parameter)
        parameter.grad = None
        _check(twin, alike)
        states = ((where, _tensors(kept.get(parameter))) for where, kept in _kept(twin))
        return {where + path: x for where, tensors in states for path, x in tensors if x.shape == parameter.shape}

    parameters = sorted(alike, key=Tensor.numel)  # the smallest first: a refusal comes soon
    seen: dict[Path, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for parameter in parameters:
        before = {path: value.clone() for path, value in step(parameter, 0.0).items()}
        for path, value in step(parameter, 0.0).items():
            seen[path].append((value.clone(), before.get(path, value), parameter.detach().clone()))
        step(parameter, 1e-2)
    found = {path: _fresh(values) for path, values in seen.items()}
    for parameter in parameters:
        was_finite = parameter.isfinite().all()
        for path, value in step(parameter, 1e-2).items():
            fresh = found.get(path, 0.0)
            value.copy_(parameter.detach()) if fresh is None else value.fill_(fresh)
        step(parameter, 1e-2)
        if was_finite and not parameter.isfinite().all():
            raise RepruneError(
                f"{type(twin).__name__} makes NaN of {alike[parameter]} when its averages are set to zero, as those of "
                "pruned channels are: use SGD, AdamW or another optimizer"
            )
    return found


class _NoTwin(Exception):
    """The optimizer cannot be tried: it cannot be copied, or needs more than a gradient for its step."""


def _fresh(seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float | None:
    """Return `State.fresh` of a state.

    Args:
        seen: for each parameter its state after two steps and after one, and the weight after two.
    """
    if _near((value, weight) for value, _, weight in seen):
        return None
    first = float(seen[0][0].flatten()[0])
    return first if all(torch.equal(a, b) and bool((a == first).all()) for a, b, _ in seen) else 0.0


def _twin(optimizer: Any, names: Mapping[nn.Parameter, str], filled: bool) -> tuple[Any, dict[nn.Parameter, str]]:
    """Return an optimizer like this one that has never stepped, with one parameter of every shape.

    Also return those of its parameters that stand for some in `names`, with a name of one of these.

    Args:
        filled: whether it has the weights and states of now: some optimizers need them.
    """
    twin: Any = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): twin}
    asked: dict[nn.Parameter, str] = {}
    groups = []
    try:
        for group in optimizer.param_groups:
            own: dict[Any, nn.Parameter] = {}
            for p in group["params"]:
                key = p.shape, p.dtype, p.device
                if key not in own:
                    values = torch.linspace(-1.5, 1.5, p.numel(), dtype=p.dtype, device=p.device)
                    own[key] = nn.Parameter(values.view(p.shape))
                if filled:  # some states may be copies of the weights
                    own[key].data.copy_(p.detach())
                memo[id(p)] = memo[id(own[key])] = own[key]
                if p in names:
                    asked.setdefault(own[key], names[p])
            groups.append({**group, "params": list(own.values())})
        kept = {
            name: value for name, value in vars(optimizer).items()
            if name not in ("state", "param_groups", "step") and not name.endswith("hooks")
        }  # fmt: skip
        vars(twin).update(copy.deepcopy(kept, memo))
        twin.state = copy.deepcopy(optimizer.state, memo) if filled else defaultdict(dict)
        twin.param_groups = copy.deepcopy(groups, memo)
        if isinstance(twin, Optimizer):
            Optimizer.__setstate__(twin, {})
    except Exception as error:
        raise _NoTwin from error
    return twin, asked


def _step(twin: Any, parameter: nn.Parameter) -> None:
    """Make one step, without a closure or, if that fails, with one."""
    try:
        twin.step()
    except Exception:
        try:
            twin.step(lambda: parameter.detach().sum())
        except Exception as error:
            raise _NoTwin from error
