"""REPrune while training: when to prune, and the story of one event, top to bottom.

    step -> request (layers, widths, seeds) -> outcome of `selection.event` -> setting of `running.narrow` -> record

Park et al., "REPrune: Channel Pruning via Kernel Representative Selection", AAAI 2024 (arXiv:2402.17862).
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

from reprune_triton import checks, ops
from reprune_triton.config import Config, own_names, own_sparsity
from reprune_triton.errors import RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.history import Event, LayerEvent, show
from reprune_triton.kernels.host import to_device
from reprune_triton.running import analysis, compact, copies, layers, shadows
from reprune_triton.running.channels import Prunable
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

# What is made under torch.inference_mode() cannot be trained, so the methods of a pruner leave it.
_outside_inference = torch.inference_mode(False)


class _State(NamedTuple):
    """The progress of a pruner. An event replaces it in one assignment, together with the channels of the model."""

    epoch: int
    history: list[Event]
    active: dict[str, Tensor]  # per prunable conv the sorted indices (int64) of its active filters
    pruned: dict[str, Tensor]  # ... and of the others
    mask: Tensor  # (T,) bool, which of all filters are active


class REPrune:
    """A pruner: it prunes the channels of `model` while it trains.

        pruner = REPrune(model, optimizer, example_inputs=x, sparsity=0.5, every=2, until=180)
        for epoch in range(epochs):
            train_one_epoch(...)
            pruner.step()
        slim = pruner.finalize()

    Between events the model runs on its active channels only; its parameters keep their full shape until `finalize`.
    An event happens at every epoch t with t mod every == 0, and at t == until (so that the last one meets the target).
    It runs on the model's device, and the host waits for it once. With DistributedDataParallel its processes share the
    work. All of them must call `step`, and all get the channels that one alone would choose.

    Args:
        model: the network; DistributedDataParallel and torch.compile are unwrapped.
        optimizer: the optimizer that trains it, a wrapper of one, or a list or dict of several; pruned channels are
            frozen in its steps. None to prune without training.
        example_inputs: arguments of the model's forward, a batch of 1 or 2 (see `analysis.analyse`).
        ema: averages of the model (an AveragedModel, or another module that holds a copy), one or several. They run on
            the model's channels, so evaluate them or measure their statistics (update_bn) as they are; compact="auto"
            makes them compact with it.
        options: the fields of `Config`.
    Raises:
        RepruneError: for an option out of range, a model with nothing to prune, a FLOPs budget out of reach, an
            optimizer of another model, or one with a state that cannot follow channels; see `optimizers`.
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
        config = own_names(Config(**options), wrappers, model)
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
        found = analysis.analyse(model, example_inputs, self.config.ignore)
        self.channels = checks.restricted(found, self.config, model)
        self._pool = Pool([x.n_out for x in self.channels.prunable], self._device())
        self._budget = self._new_budget()
        checks.check_budget(self.channels, self.config)
        self._watch = checks.Watch(model, self.channels)
        self._watch.check_optimizers(optimizers)
        self._optimizers = optimizers
        impl = "torch" if self.config.impl == "reference" else self.config.impl
        self._narrowing = Narrowing(model, optimizers, impl)
        self._state = self._state_by_mask(0, [], torch.ones_like(self._pool.layer, dtype=torch.bool), self._pool.sizes)
        self._slim: nn.Module | None = None  # what finalize() is about to return
        self._belonging = copies.Belonging(model, self.channels, impl, self)
        for average in self._averages:
            copies.Belonging(average, self.channels, impl, active=self.active, origin=self._belonging)
        self._finished = False
        self._await_training()

    @property
    def epoch(self) -> int:
        """Number of calls of `step` so far."""
        return self._state.epoch

    @property
    def history(self) -> list[Event]:
        """All events so far."""
        return self._state.history

    @property
    def active(self) -> dict[str, Tensor]:
        """Per prunable conv the sorted indices (int64) of its active filters."""
        return self._state.active

    @property
    def optimizer(self) -> Any:
        """The optimizer that trains the model, as it was given. Assign another one when training goes on with it."""
        return self._optimizers.given

    @optimizer.setter
    def optimizer(self, given: Any) -> None:
        self.settle()
        if self._finished:
            raise RepruneError("pruning has ended: the optimizer can be any that trains the narrow model")
        optimizers = Optimizers(given, self.model.parameters())
        self._watch.check_optimizers(optimizers)
        self._optimizers = optimizers
        self._narrowing.freezing.follow(optimizers)
        self._await_training()

    @property
    def _state(self) -> _State:
        found: _State = self._narrowing.state
        return found

    @_state.setter
    def _state(self, state: _State) -> None:
        self._narrowing.state = state

    def _state_by_mask(self, epoch: int, history: list[Event], mask: Tensor, widths: Sequence[int]) -> _State:
        """Return the state in which the filters of `mask` (T,) bool are active, widths[l] of them in layer l."""
        rows = self._pool.split(self._pool.partition(mask))
        parts = [(x.name, row, width) for x, row, width in zip(self.channels.prunable, rows, widths, strict=True)]
        active = {name: row[:width] for name, row, width in parts}
        return _State(epoch, history, active, {name: row[width:] for name, row, width in parts}, mask)

    def _state_by_indices(self, epoch: int, history: list[Event], active: Mapping[str, Tensor]) -> _State:
        """Return the state in which these filters are active, per prunable conv sorted indices (int64)."""
        self._follow()
        mask = torch.zeros_like(self._pool.layer, dtype=torch.bool)
        indices = [active[layer.name] for layer in self.channels.prunable]
        for row, index in zip(self._pool.split(mask), indices, strict=True):
            row[index.to(mask.device)] = True
        return self._state_by_mask(epoch, history, mask, [len(index) for index in indices])

    def settle(self) -> None:
        """Put back what an interrupted step of the optimizer has changed. Every method does this first."""
        self._narrowing.freezing.settle_step()

    def expect_weights(self) -> None:
        """Allow the weights to change without a step of the optimizer, as they are about to be loaded."""
        self.settle()
        self._watch.pause()

    def run_on(self, active: Mapping[str, Tensor]) -> None:
        """Make the model run on these filters from now on, to which the weights belong that are loaded.

        active: per prunable conv sorted indices (int64).
        """
        if not self._finished:
            self._belonging.change()
            self._narrowing.enforce(self._setting(self._state_by_indices(self.epoch, self.history, active)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._belonging.owner = self

    @_outside_inference
    def step(self) -> Event | None:
        """Prune if an event is due, and return it. Call this once after every epoch.

        A call that raises or is interrupted (Ctrl-C) has changed nothing, or everything: call it again to go on.

        Raises:
            RepruneError: if modules were replaced, another optimizer trains, or the model or an average of it cannot be
                copied. Nothing has changed then: put it right, and call again.
        """
        dispatch.share(self._ranks.group, self._pool.device)
        self._narrowing.settle()
        config, epoch = self.config, self.epoch + 1
        assert config.until is not None
        if config.compact == "auto" and self.epoch >= config.until and not self._finished:
            self._shrink()  # an earlier call was interrupted before it
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

    def _check_still(self) -> None:
        """Raise RepruneError if what held at the start no longer holds."""
        self._watch.check(self._optimizers)
        for model in (self.model, *self._averages):
            copies.remove(compact.check_copy(model))  # else each would be asked at events whether it is written to
        for average in self._averages:
            average_in(average, self.model)

    def _await_training(self) -> None:
        """Note that what trains the model from here on has to be the optimizer."""
        if not self._swapped:
            self._watch.await_training(self._optimizers)

    @torch.no_grad()
    def _event(self, epoch: int) -> None:
        """Prune: request, launch, read, run on the outcome, record."""
        started = time.perf_counter()
        self._follow()
        found = event.PreparedEvent(self._request(epoch), self._ranks)
        clock = event.Clock(self._pool.device)
        found.launch(clock)
        outcome = found.read()

        read = time.perf_counter()
        before, widths = self.history, [layer.width for layer in outcome.layers]
        state = self._state_by_mask(epoch, [], outcome.active, widths)

        def history() -> list[Event]:
            now = time.perf_counter()
            stages = clock.ms() | {"apply": (now - read) * 1e3}
            return [*before, self._record(epoch, outcome, stages, (now - started) * 1e3)]

        setting = self._setting(state, self._gone(outcome))
        self._belonging.change()
        # An interrupt before this line finds nothing changed, and one after it everything.
        self._narrowing.enforce(setting._replace(state=state._replace(history=history())))
        self._state = self._state._replace(history=history())  # again, now that its time is known

    def _request(self, epoch: int) -> event.Request:
        """Return the event of this epoch in terms of tensors."""
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
        watched = [p.to(self._pool.device) for p in self._watched().values()]
        return event.Request(
            layers, self._pool, self._widths(extra), seeds, config.linkage, config.impl, config.tie, config.select,
            scores=scores.get(config.tie if config.select == "coverage" else config.select), regrow=extra > 0,
            regrow_by=config.regrow_by, watched=watched, check=functools.partial(self._check_watched, epoch),
        )  # fmt: skip

    def _widths(self, extra: float) -> Callable[[], Widths]:
        """Return a function that counts the filters to keep in each layer, and to have with the regrown ones.

        extra: by how much the network is denser than its target.
        """
        config = self.config
        if isinstance(config.sparsity, Mapping):
            own = [(self._own_width(x, 0.0), self._own_width(x, extra)) for x in self.channels.prunable]
            keep, width = to_device(own, self._pool.device).T.unbind()
            zero = torch.zeros_like(keep[0])
            given = Widths(keep, width, zero, zero, zero > 0)
            return lambda: given

        def counted() -> Widths:
            assert config.round_to is not None
            scales = self._scales()
            if config.flops is None:
                assert isinstance(config.sparsity, (int, float))
                return at_sparsity(scales, config.sparsity, extra, config.round_to, config.min_keep)
            return at_flops(scales, self._budget, extra, config.round_to, config.min_keep)

        return counted

    def _own_width(self, layer: Prunable, extra: float) -> int:
        """Return the width of a layer that has a sparsity of its own."""
        assert isinstance(self.config.sparsity, Mapping) and self.config.round_to is not None
        share = max(own_sparsity(layer.name, self.config.sparsity) - extra, 0.0)
        width = ops.keep_count(layer.n_out, share)
        return round_up(width, layer.n_out, self.config.round_to, self.config.min_keep)

    def _watched(self) -> dict[str, Tensor]:
        """Return what must be finite at an event, by name: the parameters of the prunable convs and their norms."""
        return {
            f"{name}.{key}": tensor
            for layer in self.channels.prunable
            for name in (layer.name, layer.norm)
            if name is not None
            for key, tensor in self.model.get_submodule(name)._parameters.items()
            if tensor is not None
        }

    def _check_watched(self, epoch: int) -> None:
        """Raise RepruneError for parameters that are not finite, or scales that are all equal; waits for the device."""
        checks.check_finite(self._watched(), epoch)
        if not isinstance(self.config.sparsity, Mapping):
            assert self.config.until is not None
            found = self._widths(regrow_share(epoch, self.config.until, self.config.regrow))()
            for rank in (found.rank, found.regrown):
                self._scales().check(int(rank))

    def _gone(self, outcome: event.Outcome) -> layers.Slices:
        """Return the slices of all filters that were not kept, which lose their momentum."""
        rows = self._pool.split(self._pool.partition(outcome.kept))
        names, kept = [x.name for x in self.channels.prunable], [found.kept for found in outcome.layers]
        gone = {name: row[count:] for name, row, count in zip(names, rows, kept, strict=True)}
        return self.channels.frozen(gone)

    def _setting(self, state: _State, gone: layers.Slices | None = None) -> Setting:
        """Return how the model runs on the channels of this state; `gone` loses its momentum."""
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

    def _device(self) -> torch.device:
        """Return where events run: on the GPU of the prunable convs, else on the CPU, as MPS has no float64."""
        found = {self._parameter(x.name).device for x in self.channels.prunable}
        if len(found) > 1:
            raise RepruneError(
                f"the prunable convs are on {', '.join(sorted(map(str, found)))}: one event works on one device. "
                "Keep them together, or name those of the other devices in ignore=."
            )
        device = found.pop()
        return device if device.type == "cuda" else torch.device("cpu")

    def _follow(self) -> None:
        """Move what events read to the model's device, should the model have been moved since the last one."""
        device = self._device()
        if self._pool.device != device:
            self._pool = Pool(self._pool.sizes, device)
            self._budget = self._new_budget()
            self._state = self._state._replace(mask=self._state.mask.to(device))

    def _new_budget(self) -> Budget:
        """Return the budget in multiply-adds: the most for which `Channels.flops` is at most config.flops."""
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
        """Return |gamma| of every prunable layer: (T,)."""
        gammas = [self._parameter(x.norm) for x in self.channels.prunable if x.norm]
        return torch.cat(gammas).detach().abs().to(self._pool.device)

    def _bits(self, seeds: Sequence[int]) -> Tensor:
        """Return random bits for every filter (T,), by a seed for each layer."""
        sizes = zip(seeds, self._pool.sizes, strict=True)
        return torch.cat([random_bits(seed, 0, count, self._pool.device) for seed, count in sizes])

    @_outside_inference
    def compact(self, model: nn.Module | None = None) -> nn.Module:
        """Return a compact copy of `model` (default: the one in training), with the channels that it runs on.

        A copy of the model runs on the channels that the model had when it was copied. An average runs on those that
        the model had when it was last updated. An average that was made before the pruner, and not given as `ema=`, is
        known from this call on: until then it has run on all channels, and its statistics have been measured so.
        """
        self._narrowing.settle()
        model = self.model if model is None else unwrapped(model)
        if self._swapped and any(model is x for x in (self.model, *self._averages)):
            return compact.copied(model)
        known = copies.of(model)
        if known is None:  # made before the pruner
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
        """End pruning, and return an ordinary, compact module with the active channels.

        The optimizer trains that module from now on, with its state carried over; learning-rate schedulers go on with
        the optimizer. Its parameters have the attributes and hooks of the old ones, and their gradients if no step has
        used them yet. The model that was in training stays as it is; throw it away. With compact="auto" the model
        itself is returned, compact since the last event, with the same Parameter objects.

        Warns:
            UserWarning: before the last event, or with weights loaded from before it, as the target is not met. Also in
                the optimizer's next step, if the old model was trained.
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
            checks.warn_if_thrown_away(self.model, slim, self._optimizers)
        assert self._slim is not None
        try:
            return self._slim
        finally:
            self._slim = None

    def _shrink(self) -> None:
        """Make the model, its averages and the optimizer's state compact, in place."""
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
        """Whether the model itself is compact."""
        return self._finished and self.config.compact == "auto"

    def _warn_if_wide(self) -> None:
        """Warn if the model is wider than the last event leaves it."""
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
                stacklevel=4,
            )

    def explain(self) -> dict[str, str]:
        """Return every conv's name with "prunable", or the reason why it is not."""
        return dict(self.channels.reasons)

    def __repr__(self) -> str:
        widths = {name: len(index) for name, index in self.active.items()}
        return (
            f"<REPrune of {type(self.model).__name__}: epoch {self.epoch}/{self.config.until}, "
            f"{len(self.channels.prunable)}/{len(self.channels.reasons)} convs, "
            f"{sum(widths.values())}/{self._pool.total} channels, {self.channels.flops(widths):.1%} FLOPs>"
        )

    def summary(self, console: Console | None = None) -> None:
        """Print the events so far, and the layers at the last one, in 80 columns if the layers' names allow it."""
        console = console or Console()
        console.print(repr(self), markup=False, highlight=False)
        show(self.history, console)

    @_outside_inference
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed, with the model's and the optimizer's state, to go on to the same bits: tensors and
        plain values."""
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
        """Take up a saved state, before or after the model's and the optimizer's own.

        If compact="auto" had made that model compact, load this before the model's own, as it makes the model compact.

        Raises:
            RepruneError: if it is the state of another model, of a finished run, or of other options.
        """
        if self._swapped:
            raise RepruneError("this pruner's model is narrow already: build model and pruner anew, then load")
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise RepruneError(f"this is not a pruner's state_dict of format {FORMAT}")
        checks.check_state(state, _plain(asdict(self.config)), self.channels.prunable)
        history = [
            Event(**{**event, "layers": tuple(LayerEvent(**layer) for layer in event["layers"])})
            for event in state["history"]
        ]
        active = {name: layer["active"] for name, layer in state["layers"].items()}
        self._belonging.change()
        self._narrowing.enforce(self._setting(self._state_by_indices(state["epoch"], history, active)))
        if state["finished"]:
            self._shrink()


def _plain(value: Any) -> Any:
    """Return the value with lists in place of tuples, so that a state is equal before and after a trip through JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _of_filters(layers: Sequence[ops.Layer], score: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a number for every filter (T,): score maps the filters of a layer (n_out, m) float64 to (n_out,)."""
    return torch.cat([score(layer.rows().double()) for layer in layers])
