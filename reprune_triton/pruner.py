"""REPrune while training (Park et al., AAAI 2024): when to prune, and the story of one event, top to bottom.

widths (widths.py) -> merges -> cut -> cover -> regrow, all on the device (event.py) -> run narrow (narrow.py)
"""

import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from reprune_triton import ops
from reprune_triton.config import Config, matching, own_sparsity
from reprune_triton.errors import RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.history import Event, LayerEvent, show
from reprune_triton.kernels.host import to_device
from reprune_triton.running import analysis, compact, copies, layers, shadows
from reprune_triton.running.channels import Channels, Prunable, matches
from reprune_triton.running.narrow import Narrowing
from reprune_triton.running.optimizers import Optimizers
from reprune_triton.running.setting import Setting
from reprune_triton.running.wrappers import average_in, opened, process_group, unwrapped
from reprune_triton.selection import event
from reprune_triton.selection.pool import Pool
from reprune_triton.selection.ranks import Ranks
from reprune_triton.selection.rng import derive_seeds, random_bits
from reprune_triton.selection.widths import Budget, Scales, Widths, at_flops, at_sparsity, regrow_share, round_up

FORMAT = 4  # of state_dict


# What is made under torch.inference_mode() could not be trained: the methods of a pruner work outside of it.
_outside_inference = torch.inference_mode(False)


class _State(NamedTuple):
    """How far a pruner is. An event replaces it in one assignment, together with what the model runs on."""

    epoch: int
    history: list[Event]
    active: dict[str, Tensor]  # per prunable conv the sorted indices of its active filters
    pruned: dict[str, Tensor]  # ... of the others
    mask: Tensor  # (T,) the active ones among all filters


class REPrune:
    """Prunes the channels of `model` while it trains.

        pruner = REPrune(model, optimizer, example_inputs=x, sparsity=0.5, every=2, until=180)
        for epoch in range(epochs):
            train_one_epoch(...)
            pruner.step()
        slim = pruner.finalize()

    Between events the model runs on its active channels only; its parameters keep their full shape until `finalize`.
    An event happens at every epoch t with t mod every == 0, and at t == until (so that the last one meets the target).
    It runs on the model's device, and the host waits for it once. With DistributedDataParallel its processes share the
    work; all of them must call `step`, and all get the channels that one alone would choose.

    Args:
        model: the network; DistributedDataParallel and torch.compile are unwrapped.
        optimizer: the optimizer that trains it, a wrapper of one, or a list or dict of several; pruned channels are
            frozen in its steps. None to prune without training.
        example_inputs: what the model's forward takes, a batch of 1 or 2 (see `analysis.analyse`).
        ema: averages of the model (an AveragedModel, or what else holds a copy), one or several: they run on its
            channels, so evaluate them or measure their statistics (update_bn) as they are, and compact="auto" makes
            them narrow with it.
        options: the fields of `Config`.
    Raises:
        RepruneError: for an option out of range, a model with nothing to prune, a FLOPs budget out of reach, an
            optimizer of another model, or one that keeps what cannot follow channels; see `optimizers`.
    """

    @_outside_inference
    def __init__(
        self, model: nn.Module, optimizer: Any, *, example_inputs: Any,
        ema: nn.Module | Sequence[nn.Module] = (), **options: Any,
    ):  # fmt: skip
        unknown = set(options) - {field.name for field in fields(Config)}
        if unknown:
            raise RepruneError(
                f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(f.name for f in fields(Config))}"
            )
        group, (model, wrappers) = process_group(model), opened(model)
        config = _without(wrappers, Config(**options), model)
        optimizers = Optimizers(optimizer, model.parameters())
        on_cuda = any(p.is_cuda for p in model.parameters())
        self.config = replace(config, round_to=config.round_to or (16 if on_cuda else 1))
        self.model, self._ranks = model, Ranks(group)
        self._averages = [average_in(x, model) for x in (ema if isinstance(ema, (list, tuple)) else (ema,))]
        if config.compact == "auto" and group is not None:
            raise RepruneError(
                'compact="auto" would swap parameters that DistributedDataParallel holds on to: leave it off, call '
                "finalize() after the last event, and wrap what it returns anew."
            )
        self.channels = self._restricted(analysis.analyse(model, example_inputs, self.config.ignore))
        self._pool = Pool([x.n_out for x in self.channels.prunable], self._device())
        self._budget = self._new_budget()
        self._check_budget()
        self._modules = {name: _made_of(model.get_submodule(name), part) for name, part in self._concerned().items()}
        self._check_optimizers(optimizers)
        self._optimizers = optimizers
        impl = "torch" if self.config.impl == "reference" else self.config.impl
        self._narrowing = Narrowing(model, optimizers, impl)
        self._state = self._on(0, [], torch.ones_like(self._pool.layer, dtype=torch.bool), self._pool.sizes)
        self._slim: nn.Module | None = None  # that finalize() returns
        self._before: tuple[list[tuple[int, int]], Tensor] | None = None
        self._belonging = copies.Belonging(model, self.channels, impl, self)
        for average in self._averages:
            copies.Belonging(average, self.channels, impl, active=self.active, origin=self._belonging)
        self._finished = False
        self._await_training()

    # ------------------------------------------------------------------ how far it is

    @property
    def epoch(self) -> int:
        """How often `step` was called."""
        return self._state.epoch

    @property
    def history(self) -> list[Event]:
        """All events so far."""
        return self._state.history

    @property
    def active(self) -> dict[str, Tensor]:
        """Per prunable conv the sorted indices (int64) of the filters that it runs on now."""
        return self._state.active

    @property
    def _state(self) -> _State:
        found: _State = self._narrowing.state
        return found

    @_state.setter
    def _state(self, state: _State) -> None:
        self._narrowing.state = state

    def _on(self, epoch: int, history: list[Event], mask: Tensor, widths: Sequence[int]) -> _State:
        """The state in which these filters (T,) bool are active, `widths` of every layer."""
        rows = self._pool.split(self._pool.partition(mask))
        parts = [(x.name, row, width) for x, row, width in zip(self.channels.prunable, rows, widths, strict=True)]
        active = {name: row[:width] for name, row, width in parts}
        return _State(epoch, history, active, {name: row[width:] for name, row, width in parts}, mask)

    def settle(self) -> None:
        """Put back what an interrupted step of the optimizer has changed. Every method here does."""
        self._narrowing.freezing.settle_step()

    def expect_weights(self) -> None:
        """Weights are about to be loaded, so that they change without a step of the optimizer."""
        self.settle()
        self._before = None

    def run_on(self, active: Mapping[str, Tensor]) -> None:
        """Have the model run on these filters from now on, per prunable conv sorted indices (int64), as it does when
        weights are loaded that belong to them."""
        if not self._finished:
            self._belonging.change()
            self._narrowing.enforce(self._setting(self._with(self.epoch, self.history, active)))

    def _with(self, epoch: int, history: list[Event], active: Mapping[str, Tensor]) -> _State:
        self._follow()
        mask = torch.zeros_like(self._pool.layer, dtype=torch.bool)
        indices = [active[layer.name] for layer in self.channels.prunable]
        for row, index in zip(self._pool.split(mask), indices, strict=True):
            row[index.to(mask.device)] = True
        return self._on(epoch, history, mask, [len(index) for index in indices])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._belonging.owner = self

    # ------------------------------------------------------------------ the event

    @_outside_inference
    def step(self) -> Event | None:
        """Call once after every epoch. Prunes when an event is due, and returns what it did.

        One that raises or is interrupted (Ctrl-C) has changed nothing, or everything: call it again to go on.

        Raises:
            RepruneError: if what held at the start no longer holds: modules were replaced, another optimizer trains,
                the model or an average of it cannot be copied. Nothing has changed then: put it right, and call again.
        """
        dispatch.share(self._ranks.group, self._pool.device)
        self._narrowing.settle()
        config, epoch = self.config, self.epoch + 1
        assert config.until is not None
        if config.compact == "auto" and self.epoch >= config.until and not self._finished:  # interrupted before that
            self._shrink()
        if self._finished and config.compact != "auto":
            raise RepruneError("step() after finalize(): the network is final, train the one that finalize() returned")
        if not self._finished:
            self._ranks.together(self._check_still, self._pool.device)
        due = epoch % config.every == 0 or epoch == config.until
        if not due or epoch > config.until or self._finished:
            self._state = self._state._replace(epoch=epoch)
            self._await_training()
            return None
        self._event(epoch)
        if config.compact == "auto" and epoch == config.until:
            self._shrink()
        self._await_training()
        return self.history[-1]

    @torch.no_grad()
    def _event(self, epoch: int) -> None:
        started = time.perf_counter()
        self._follow()
        found = event.PreparedEvent(self._request(epoch), self._ranks)
        clock = event.Clock(self._pool.device)
        found.launch(clock)
        outcome = found.read()

        read = time.perf_counter()
        before, state = self.history, self._on(epoch, [], outcome.active, [layer.width for layer in outcome.layers])

        def history() -> list[Event]:
            now = time.perf_counter()
            stages = clock.ms() | {"apply": (now - read) * 1e3}
            return [*before, self._record(epoch, outcome, stages, (now - started) * 1e3)]

        setting = self._setting(state, self._gone(outcome))
        self._belonging.change()
        # Here it happens, wholly.
        self._narrowing.enforce(setting._replace(state=state._replace(history=history())))
        self._state = self._state._replace(history=history())  # with all of its time

    def _request(self, epoch: int) -> event.Request:
        """The event of this epoch, in terms of tensors."""
        config, prunable = self.config, self.channels.prunable
        assert config.until is not None
        extra = regrow_share(epoch, config.until, config.regrow)
        inputs = self.channels.inputs(self.active)
        layers = [ops.Layer(self._weight(x), self.active[x.name], inputs[x.name], x.name) for x in prunable]
        seeds = derive_seeds(config.seed, epoch, len(layers), 2).tolist()
        rows = functools.partial(_of_filters, layers)
        scores: dict[str, Callable[[], Tensor]] = {"gamma": self._gammas}
        if config.select == "coverage":
            scores["norm"] = lambda: rows(lambda x: x.norm(dim=1))
        else:
            scores["l1"] = lambda: rows(lambda x: x.abs().sum(1))
            scores["random"] = lambda: self._bits([seed for seed, _ in seeds])
        watched = [p.to(self._pool.device) for _, p in self._watched()]
        return event.Request(
            layers, self._pool, self._widths(extra), seeds, config.linkage, config.impl, config.tie, config.select,
            scores=scores.get(config.tie if config.select == "coverage" else config.select), regrow=extra > 0,
            regrow_by=config.regrow_by, watched=watched, check=functools.partial(self._check_watched, epoch),
        )  # fmt: skip

    def _gone(self, outcome: event.Outcome) -> layers.Slices:
        """What coverage did not choose: it has no momentum when it comes back."""
        rows = self._pool.split(self._pool.partition(outcome.kept))
        names, kept = [x.name for x in self.channels.prunable], [found.kept for found in outcome.layers]
        gone = {name: row[count:] for name, row, count in zip(names, rows, kept, strict=True)}
        return self.channels.frozen(gone)

    def _setting(self, state: _State, gone: layers.Slices | None = None) -> Setting:
        """For the model to run on the channels of this state."""
        home = self._parameter(self.channels.prunable[0].name).device
        active, pruned = ({name: index.to(home) for name, index in x.items()} for x in (state.active, state.pruned))
        return self._narrowing.prepare(self.channels.slices(active), self.channels.frozen(pruned), gone, state)

    def _record(self, epoch: int, outcome: event.Outcome, stages: dict[str, float], ms: float) -> Event:
        config, prunable = self.config, self.channels.prunable
        widths = {x.name: found.width for x, found in zip(prunable, outcome.layers, strict=True)}
        macs, dense = self.channels.macs(widths), {cost.name: cost.macs for cost in self.channels.costs}
        layers = tuple(
            LayerEvent(
                name=x.name,
                n_out=x.n_out,
                kept=found.kept,
                width=found.width,
                sparsity=1 - found.width / x.n_out,
                coverage=found.covered / found.clusters,
                h=found.h,
                flops=macs[x.name] / dense[x.name],
            )
            for x, found in zip(prunable, outcome.layers, strict=True)
        )
        own = config.sparsity if config.flops is None else outcome.rank / self._pool.total
        return Event(
            epoch=epoch,
            target=None if own is None or isinstance(own, Mapping) else float(own),
            sparsity=1 - sum(widths.values()) / self._pool.total,
            flops=self.channels.flops(widths),
            coverage=sum(x.covered for x in outcome.layers) / sum(x.clusters for x in outcome.layers),
            ms=ms,
            stages=stages,
            layers=layers,
        )

    def _widths(self, extra: float) -> Callable[[], Widths]:
        """How to find the filters to choose by coverage, and those to have after regrowth."""
        config = self.config
        if isinstance(config.sparsity, Mapping):
            own = [(self._own_width(x, 0.0), self._own_width(x, extra)) for x in self.channels.prunable]
            keep, width = to_device(own, self._pool.device).T.unbind()
            none = torch.zeros_like(keep[0])
            given = Widths(keep, width, none, none, none > 0)
            return lambda: given

        def counted() -> Widths:
            assert config.round_to is not None
            scales = self._scales()
            if config.flops is None:
                assert isinstance(config.sparsity, (int, float))
                return at_sparsity(scales, config.sparsity, extra, config.round_to, config.min_keep)
            return at_flops(scales, self._budget, extra, config.round_to, config.min_keep)

        return counted

    # ------------------------------------------------------------------ what an event reads

    def _device(self) -> torch.device:
        """Where events run: with the prunable convs if that is on CUDA; else on the CPU, as MPS has no float64."""
        found = {self._parameter(x.name).device for x in self.channels.prunable}
        if len(found) > 1:
            raise RepruneError(
                f"the prunable convs are on {', '.join(sorted(map(str, found)))}: one event works on one device. "
                "Keep them together, or name those of the other devices in ignore=."
            )
        device = found.pop()
        return device if device.type == "cuda" else torch.device("cpu")

    def _follow(self) -> None:
        """Keep what an event reads where the model is, should it have been moved since the last one."""
        device = self._device()
        if self._pool.device != device:
            self._pool = Pool(self._pool.sizes, device)
            self._budget = self._new_budget()
            self._state = self._state._replace(mask=self._state.mask.to(device))

    def _new_budget(self) -> Budget:
        """The most multiply-adds of which `Channels.flops` says that they are in the budget."""
        flops, dense = self.config.flops or 0.0, sum(cost.macs for cost in self.channels.costs)
        most = int(flops * dense) + 1
        while most / dense > flops:
            most -= 1
        return Budget(self._pool, self.channels.terms(), most)

    def _parameter(self, name: str) -> Tensor:
        return self.model.get_submodule(name)._parameters["weight"]  # type: ignore[return-value]

    def _weight(self, layer: Prunable) -> Tensor:
        return self._parameter(layer.name).to(self._pool.device)

    def _scales(self) -> Scales:
        return Scales(self._pool, self._gammas(), self._state.mask)

    def _gammas(self) -> Tensor:
        """|gamma| of every prunable layer: (T,)."""
        gammas = [self._parameter(x.norm) for x in self.channels.prunable if x.norm]
        return torch.cat(gammas).detach().abs().to(self._pool.device)

    def _bits(self, seeds: Sequence[int]) -> Tensor:
        """Random bits of every filter (T,), by a seed for each layer."""
        sizes = zip(seeds, self._pool.sizes, strict=True)
        return torch.cat([random_bits(seed, 0, count, self._pool.device) for seed, count in sizes])

    def _own_width(self, layer: Prunable, extra: float) -> int:
        """Filters of a layer with sparsities given layer by layer."""
        assert isinstance(self.config.sparsity, Mapping) and self.config.round_to is not None
        share = max(own_sparsity(layer.name, self.config.sparsity) - extra, 0.0)
        width = ops.keep_count(layer.n_out, share)
        return round_up(width, layer.n_out, self.config.round_to, self.config.min_keep)

    # ------------------------------------------------------------------ the narrow model

    @_outside_inference
    def compact(self, model: nn.Module | None = None) -> nn.Module:
        """A physically narrow copy of `model` (default: the one in training), on the channels that it runs on.

        Those of a kept copy are the ones that it was copied with. An average of the model runs on the model's channels,
        those of the last event before it was updated. One that was made before the pruner, and not given as `ema=`, is
        known from here on: until then it has run on all channels, and so have been measured its statistics.
        """
        self._narrowing.settle()
        model = self.model if model is None else unwrapped(model)
        if self._swapped and any(model is x for x in (self.model, *self._averages)):
            return compact.copied(model)
        known = copies.of(model)
        if known is None:  # an average that was made before the pruner
            found = compact.compact(model, self.channels.slices(self.active))
            average = copies.Belonging(model, self.channels, self._belonging.impl, origin=self._belonging)
            average.follow()
            return found
        known.follow()
        found = compact.compact(model, self.channels.slices(known.active))
        copies.remove(found)
        return found

    @_outside_inference
    def finalize(self) -> nn.Module:
        """End pruning: an ordinary, physically narrow module with the active channels.

        The optimizer trains that module from now on, with its state carried over; learning-rate schedulers go on with
        the optimizer. Its parameters have the attributes and hooks of the old ones, and their gradients where no step
        has used them yet. The model that was in training stays as it is; throw it away. With compact="auto" it is the
        model itself that is returned, narrow since the last event, with the same Parameter objects.

        It warns before the last event, or with weights loaded from before it, as the target is not met; and so does the
        optimizer's next step if it is the old model that was trained.
        """
        self._narrowing.settle()
        if self._swapped:
            return self.model
        if self._finished and self._slim is None:
            raise RepruneError("finalize() was called before")
        if self._slim is None:  # else an interrupted call goes on
            self._check_still()
            self._warn_if_wide()
            if self.config.compact == "auto":
                self._shrink()
                return self.model
            slices = self.channels.slices(self.active)
            slim = compact.compact(self.model, slices)
            copies.remove(slim)
            moves = compact.moves(self.model, slim, slices)
            compact.carry(moves, gradients=not self._narrowing.freezing.spent())

            def change() -> None:
                compact.carry_optimizers(self._optimizers, moves)
                self._slim, self._finished = slim, True

            self._narrowing.end(change, optimizer_only=True)
            _warn_if_thrown_away(self.model, slim, self._optimizers)
        assert self._slim is not None
        try:
            return self._slim
        finally:
            self._slim = None

    def _shrink(self) -> None:
        """Make the model, its averages and what the optimizer holds physically narrow, in place."""
        slices = self.channels.slices(self.active)
        shrinking = [compact.Shrinking(model, slices) for model in (self.model, *self._averages)]
        spent = self._narrowing.freezing.spent()

        def change() -> None:
            if spent:
                self.model.zero_grad()
            compact.carry_optimizers(self._optimizers, shrinking[0].moves())
            for shrink in shrinking:
                shrink()
            for model in (self.model, *self._averages):
                shadows.remove_hooks(model)
                copies.remove(model)
            self._finished = True

        self._narrowing.end(change)

    @property
    def _swapped(self) -> bool:
        return self._finished and self.config.compact == "auto"

    def _warn_if_wide(self) -> None:
        """Warn where the model is wider than the last event leaves it."""
        config = self.config
        assert config.until is not None
        when = None
        if self.epoch < config.until:
            when = f"after epoch {self.epoch}, before the last pruning event at epoch until={config.until}"
        elif self.history and any(len(self.active[x.name]) > x.width for x in self.history[-1].layers):
            when = "with weights loaded that were saved before the last pruning event"
        if when is not None:
            asked = f"flops={config.flops}" if config.sparsity is None else f"sparsity={config.sparsity}"
            pruned = 1 - sum(map(len, self.active.values())) / self._pool.total
            warnings.warn(
                f"finalize() {when}: {pruned:.1%} of the prunable channels are pruned, and {asked} was asked for",
                stacklevel=3,
            )

    # ------------------------------------------------------------------ reports

    def explain(self) -> dict[str, str]:
        """Every conv's name with "prunable", or the reason why it is not."""
        return dict(self.channels.reasons)

    def __repr__(self) -> str:
        widths = {name: len(index) for name, index in self.active.items()}
        return (
            f"<REPrune of {type(self.model).__name__}: epoch {self.epoch}/{self.config.until}, "
            f"{len(self.channels.prunable)}/{len(self.channels.reasons)} convs, "
            f"{sum(widths.values())}/{self._pool.total} channels, {self.channels.flops(widths):.1%} FLOPs>"
        )

    def summary(self, console: Console | None = None) -> None:
        """Print the events so far, and the layers at the last one; in 80 columns, unless names of layers are longer."""
        console = console or Console()
        console.print(repr(self), markup=False, highlight=False)
        show(self.history, console)

    # ------------------------------------------------------------------ checkpoints

    @_outside_inference
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all that is needed, with the model's and optimizer's, to go on bit by bit."""
        self._narrowing.settle()
        return {
            "format": FORMAT,
            "config": _plain(asdict(self.config)),
            "epoch": self.epoch,
            "finished": self._finished,
            "layers": {
                layer.name: {"n_out": layer.n_out, "active": self.active[layer.name].cpu().clone()}
                for layer in self.channels.prunable
            },
            "history": [_plain(asdict(event)) for event in self.history],
        }

    @_outside_inference
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; before or after the model's and the optimizer's own.

        Of a run that compact="auto" has made narrow, load it before the model's own: it makes the model narrow.

        Raises:
            RepruneError: if it is the state of another model, of a finished run, or of other options.
        """
        if self._swapped:
            raise RepruneError("this pruner's model is narrow already: build model and pruner anew, then load")
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise RepruneError(f"this is not a pruner's state_dict of format {FORMAT}")
        if state["finished"] and state["config"]["compact"] != "auto":
            raise RepruneError("this state was saved after finalize(): load the narrow model instead")
        here = {layer.name: layer.n_out for layer in self.channels.prunable}
        there = {name: layer["n_out"] for name, layer in state["layers"].items()}
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                raise RepruneError(
                    f"this is the state of another model: {name} has {here.get(name, 'no prunable')} filters here "
                    f"and {there.get(name, 'no prunable')} in the state"
                )
        mine = _plain(asdict(self.config))
        for option, value in state["config"].items():
            here_value = mine.get(option)
            same = here_value == value
            if same and isinstance(value, Mapping) and isinstance(here_value, Mapping):
                same = list(here_value) == list(value)  # the first pattern that fits wins, so their order counts
            if not same:
                raise RepruneError(
                    f"this state was saved with {option}={value!r}, and this pruner has {option}={mine.get(option)!r}: "
                    "give the same options to go on"
                )
        history = [
            Event(**{**event, "layers": tuple(LayerEvent(**layer) for layer in event["layers"])})
            for event in state["history"]
        ]
        active = {name: layer["active"] for name, layer in state["layers"].items()}
        self._belonging.change()
        self._narrowing.enforce(self._setting(self._with(state["epoch"], history, active)))
        if state["finished"]:
            self._shrink()

    # ------------------------------------------------------------------ checks

    def _restricted(self, found: Channels) -> Channels:
        """Leave out the layers whose width nothing decides, and refuse a model in which none is left."""
        named = self.config.sparsity if isinstance(self.config.sparsity, Mapping) else ()
        for option, patterns in (("ignore", self.config.ignore), ("sparsity", named)):
            for pattern in patterns:
                if not any(matches(name, (pattern,)) for name in found.reasons):
                    raise RepruneError(
                        f"{option}= names {pattern!r}, which fits no conv of this {type(self.model).__name__}; "
                        f"its convs are {', '.join(found.reasons)}"
                    )
        if isinstance(self.config.sparsity, Mapping):
            own = self.config.sparsity
            found = found.only(lambda x: None if matching(x.name, own) else "sparsity= names no ratio for it")
            hint = "The names and patterns in sparsity= match none of the prunable convs."
        else:
            without = [layer.name for layer in found.prunable if layer.norm is None]
            found = found.only(
                lambda x: "no BatchNorm with a scale follows it: give sparsity per layer" if x.norm is None else None
            )
            hint = ""
            if without:
                hint = (
                    "Without BatchNorm scales a global sparsity cannot be shared out between layers. Give each its "
                    f"own: REPrune(..., sparsity={{{without[0]!r}: 0.5, ...}}); patterns such as 'features.*' work."
                )
        if any(layer.norm is None for layer in found.prunable):
            for option, others in (("tie", '"norm" or "random"'), ("select", '"coverage" or "l1"')):
                if getattr(self.config, option) == "gamma":
                    raise RepruneError(
                        f'{option}="gamma" needs a BatchNorm behind every prunable conv: use {option}={others}'
                    )
        if not found.prunable:
            listing = "\n".join(f"  {name}: {reason}" for name, reason in found.reasons.items())
            raise RepruneError(f"nothing to prune in {type(self.model).__name__}. {hint}\n{listing}")
        return found

    def _check_budget(self) -> None:
        if self.config.flops is not None:
            assert self.config.round_to is not None
            least = self.channels.flops({
                x.name: round_up(0, x.n_out, self.config.round_to, self.config.min_keep)
                for x in self.channels.prunable
            })  # fmt: skip
            if least > self.config.flops:
                raise RepruneError(
                    f"flops={self.config.flops} is out of reach: with one group of channels left in every prunable "
                    f"conv the network still has {least:.3f} of its FLOPs. Raise it, or lower round_to and min_keep."
                )

    @property
    def optimizer(self) -> Any:
        """What trains the model, as it was given. Assign another one when training goes on with it."""
        return self._optimizers.given

    @optimizer.setter
    def optimizer(self, given: Any) -> None:
        self.settle()
        if self._finished:
            raise RepruneError("pruning has ended: the optimizer can be any that trains the narrow model")
        optimizers = Optimizers(given, self.model.parameters())
        self._check_optimizers(optimizers)
        self._optimizers = optimizers
        self._narrowing.freezing.follow(optimizers)
        self._await_training()

    def _concerned(self) -> layers.Slices:
        """All that can be frozen or made narrow: the modules with all their channels that can go."""
        return self.channels.frozen({x.name: torch.arange(x.n_out) for x in self.channels.prunable})

    def _sliced(self) -> dict[nn.Parameter, str]:
        """The parameters that can be frozen in part or made narrow, and their names."""
        found: dict[nn.Parameter, str] = {}
        for name, part in self._concerned().items():
            module = self.model.get_submodule(name)
            for key in layers.cuts(module, part):
                parameter = module._parameters.get(key)
                if parameter is not None:
                    found[parameter] = f"{name}.{key}"
        return found

    def _check_optimizers(self, optimizers: Optimizers) -> None:
        self._check_trained(optimizers)
        optimizers.check(self._sliced())
        optimizers.try_out(self._sliced())

    def _check_trained(self, optimizers: Optimizers) -> None:
        """All that is frozen or made narrow must be the optimizer's: another one would go on changing it."""
        own = optimizers.parameters
        for name in self._concerned() if optimizers.members else ():
            for key, p in self.model.get_submodule(name).named_parameters(recurse=False):
                if p.requires_grad and p not in own:
                    raise RepruneError(
                        f"the optimizer does not train {name}.{key}, so it could not be frozen while pruned: give all "
                        "optimizers in a list (pruner.optimizer = [...] if pruning is under way), leave the layer out "
                        "with ignore=, or set requires_grad_(False)"
                    )

    def _await_training(self) -> None:
        """From here on the next training counts."""
        self._optimizers.stepped = False
        self._before = None if self._swapped else (_gradients(self.model), self._norms())

    def _norms(self) -> Tensor:
        """Of the prunable weights: they differ after training."""
        with torch.no_grad():
            return torch.stack(torch._foreach_norm([self._parameter(x.name) for x in self.channels.prunable]))

    def _trained_unseen(self) -> bool:
        """Are there other weights and new gradients, and no step that could be seen? A loaded checkpoint has no new
        gradients, a step that was skipped leaves the weights."""
        if self._before is None or self._optimizers.stepped or self._optimizers.replayed:
            return False
        gradients, norms = self._before
        now = _gradients(self.model)
        return bool(now) and now != gradients and not torch.equal(norms, self._norms())

    def _check_still(self) -> None:
        """All that held at the start, and that the program may have changed since."""
        modules, concerned = dict(self.model.named_modules()), self._concerned()
        for name, then in self._modules.items():
            now = _made_of(modules[name], concerned[name]) if name in modules else None
            if now != then:
                kind = "gone" if now is None else f"a {now[1].__name__}"
                if now is not None and now[1] is then[1]:
                    kind = f"another {now[1].__name__}" if now[0] is not then[0] else "one with other tensors"
                raise RepruneError(
                    f"{name} was a {then[1].__name__} when the pruner was built, and is {kind} now: change the model "
                    "first, and build the optimizer and the pruner then"
                )
        self._check_trained(self._optimizers)
        self._optimizers.check(self._sliced())
        if self._trained_unseen():
            given = None if self.optimizer is None else type(self.optimizer).__name__
            raise RepruneError(
                f"the model was trained, and not by the optimizer that was given ({given}): pruned channels were not "
                "frozen. Name the one that trains it: pruner.optimizer = optimizer"
            )
        for model in (self.model, *self._averages):
            copies.remove(compact.check_copy(model))  # else each would be asked at events whether it is written to
        for average in self._averages:
            average_in(average, self.model)

    def _watched(self) -> list[tuple[str, Tensor]]:
        """What must be finite at an event, by name."""
        return [
            (f"{name}.{key}", tensor)
            for layer in self.channels.prunable
            for name in (layer.name, layer.norm)
            if name is not None
            for key, tensor in self.model.get_submodule(name)._parameters.items()
            if tensor is not None
        ]

    def _check_watched(self, epoch: int) -> None:
        for name, tensor in self._watched():
            if not torch.isfinite(tensor).all():
                raise RepruneError(
                    f"{name} holds NaN or inf at epoch {epoch}: the training has diverged. "
                    "Go back to an earlier checkpoint, with a lower learning rate."
                )
        if not isinstance(self.config.sparsity, Mapping):
            assert self.config.until is not None
            extra = regrow_share(epoch, self.config.until, self.config.regrow)
            found = self._widths(extra)()
            for rank in (found.rank, found.regrown):
                self._scales().check(int(rank))


def _without(prefixes: Sequence[str], config: Config, model: nn.Module) -> Config:
    """The same options, with names of convs of `model` in place of those of the wrapped one."""

    def own(name: str) -> str:
        if not any(matches(other, (name,)) for other, _ in model.named_modules()):
            for prefix in prefixes:
                name = name.removeprefix(prefix)
        return name

    share = config.sparsity
    share = {own(name): value for name, value in share.items()} if isinstance(share, Mapping) else share
    return replace(config, ignore=tuple(own(name) for name in config.ignore), sparsity=share)


def _warn_if_thrown_away(model: nn.Module, slim: nn.Module, optimizers: Optimizers) -> None:
    """Warn when an optimizer of `slim` steps, and `model` is what was trained."""
    watched = [(model, slim, _gradients(model))]  # until one of them has been trained: a hook cannot remove itself

    def look(*_: object) -> None:
        for model, slim, before in watched:
            if any(p.grad is not None for p in slim.parameters()):
                watched.clear()
            elif _gradients(model) != before:
                watched.clear()
                warnings.warn(
                    "the model from before finalize() is being trained, which changes nothing: the optimizer has the "
                    "parameters of the module that finalize() returned. Train that one: model = pruner.finalize()",
                    stacklevel=4,
                )

    optimizers.hook(look, lambda *_: None)


def _gradients(model: nn.Module) -> list[tuple[int, int]]:
    """What changes with every backward."""
    return [(id(p.grad), p.grad._version) for p in model.parameters() if p.grad is not None]


def _made_of(module: nn.Module, part: layers.Slice) -> tuple[nn.Module, type, tuple[str, ...]]:
    """What a module is as long as it stays the same: itself, its class, and which of its tensors can be made narrow."""
    try:
        return module, type(module), tuple(layers.cuts(module, part))
    except RepruneError:  # no class of which anything can
        return module, type(module), ()


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a state is equal before and after a trip through JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _of_filters(layers: Sequence[ops.Layer], score: Callable[[Tensor], Tensor]) -> Tensor:
    """A number for every filter (T,), from its weights as a row in float64."""
    return torch.cat([score(layer.rows().double()) for layer in layers])
