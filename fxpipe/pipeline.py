"""The object that ``compile`` returns: a plan to read, and stages to train and run."""
# Long: it is the public object; the words of its methods are their documentation, and each only delegates.

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from fxpipe.comparison import Verification
from fxpipe.errors import MaterializeError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.profile import Profile
from fxpipe.ir.simulation import Explanation
from fxpipe.logs import log
from fxpipe.materialize import Init, Origin, Running, materialize, tied_names, weight_sources
from fxpipe.planning.explain import advice_of, explain
from fxpipe.planning.simulation.simulate import simulate
from fxpipe.report.page import framed
from fxpipe.report.sources import with_sources
from fxpipe.report.table import render
from fxpipe.report.terminal import terminal
from fxpipe.runtime.build.state import full_state, load_state, own_state
from fxpipe.runtime.ranks.modes import switch
from fxpipe.runtime.ranks.place import is_first
from fxpipe.runtime.run.optimizer import (
    check_kept,
    check_norm,
    check_scaler,
    make_optimizer,
    make_scaler,
    watch_optimizers,
)
from fxpipe.runtime.run.prepare import RunOptions
from fxpipe.runtime.run.timeline import StepTiming, write_trace
from fxpipe.runtime.weights.disk.directory import weights_path
from fxpipe.runtime.weights.matching import Wanted
from fxpipe.training import Trainer
from fxpipe.variants import Variants
from fxpipe.verification import Verifier


class Pipeline:
    """A compiled model.

    Made by ``fxpipe.compile``. Until ``materialize`` it is a graph and a plan, and needs no memory; afterwards it
    trains (``step``) and runs (``infer``) this rank's stages, or all of them in one process.

    Attributes:
        graph: The model's layers.
        plan: Which stage and rank runs which.
    """

    graph: LayerGraph
    plan: PipelinePlan

    def __init__(self, graph: LayerGraph, plan: PipelinePlan, source: Origin, variants: Variants) -> None:
        self.graph = graph
        self.plan = plan
        self._source = source
        self._running: Running | None = None
        self._start: tuple[int, Init] = (plan.seed, None)  # seed and init of the first values
        self._loaded: dict[str, str] = {}  # what this rank read since, and from where
        self._closed = False
        self._trainer = Trainer(variants, source, plan.seed)

    # --- to read --------------------------------------------------------------------------------------------------

    def report(
        self,
        format: str = "text",
        *,
        baselines: bool = False,
        weights: bool = False,
        width: int = 100,
        color: bool = False,
        command: Sequence[str] = (),
    ) -> str:
        """Give the plan as a person reads it.

        Args:
            format: ``"text"``, ``"markdown"`` (``"md"``), ``"html"`` or ``"json"`` (the plan itself).
            baselines: Whether to add how DeepSpeed, torchtitan, Megatron and torchgpipe would cut the same model.
            weights: Whether to add where the first value of each tensor comes from, and which stages hold it.
            width: Columns of the text.
            color: Whether the text is coloured, for a terminal.
            command: Words of the command that asked for the plan; what would help is spelled as such a command, else as
                a call of ``compile``.

        Raises:
            PlanError: The format is none of these.
        """
        compared = self._source.baselines() if baselines else ()
        done = simulate(self.plan)
        text = render(
            self.plan,
            format,
            compared,
            simulation=done,
            advice=advice_of(self.plan, done),
            command=command,
            width=width,
            color=color,
        )
        if not weights:
            return text
        sources = weight_sources(self._source, self.graph, self.plan, *self._start, self._loaded)
        return with_sources(text, format, sources)

    def explain(self) -> Explanation:
        """Say what limits a step and which changes would help, each with its simulated gain; ``str`` of it is text.

        >>> pipe.explain().changes[0].gain  # doctest: +SKIP
        0.12
        """
        return explain(self.plan)

    def print_report(self) -> None:
        """Print the text report, on rank 0 only, as wide as the terminal and in colours there."""
        if is_first():
            print(self.report(**terminal()), flush=True)

    def __str__(self) -> str:
        return self.report()

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own: its styles and script stay there."""
        return framed(self.report("html"))

    def __repr__(self) -> str:
        plan = self.plan
        state = "closed" if self._closed else "materialized" if self._running is not None else "not materialized"
        return f"Pipeline({plan.model}, {plan.num_stages} stages, {plan.num_ranks} ranks, {plan.schedule}, {state})"

    @property
    def profile(self) -> Profile | None:
        """The times the plan was made of where ``cost="profile"`` measured them; ``to_json`` keeps them."""
        return self._source.profile

    @property
    def tied_modules(self) -> dict[str, nn.Module]:
        """Of a hand-written sequence: the module first built for each key, as this rank holds it."""
        if self._running is not None:
            return self._running.tied_modules()
        model = self._source.capture.skeleton.module
        return {key: model.get_submodule(fqn) for key, fqn in tied_names(self._source.capture).items()}

    # --- to begin -------------------------------------------------------------------------------------------------

    def materialize(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        init: Callable[[nn.Module], Any] | str | os.PathLike[str] | None = None,
        *,
        parallelize: Callable[[nn.Module], Any] | None = None,
        compile: str | Mapping[str, Any] | None = None,
        keep_wide: bool = False,
        timeout: float | None = None,
        check_batches: bool | str = "auto",
        debug: bool = False,
        timings: bool = False,
    ) -> Self:
        """Allocate and initialise this rank's stages; all of them outside torchrun.

        Args:
            device: Where to; None: ``cuda:LOCAL_RANK`` if there is one, else the CPU.
            dtype: Floating-point dtype of parameters and buffers; None keeps the model's.
            seed: Of initialisation; None: the one given to ``compile``.
            init: What gives values to tensors without a real one: a function of a module (called on each module after
                its ``reset_parameters``), ``"reset"``, ``"huggingface"``, ``"empty"``, or None for nothing; or the path
                of weights: ``"empty"``, then ``load`` of that path.
            parallelize: Called with each stage module of this rank before it runs: applies ``fully_shard``,
                ``parallelize_module`` or the like to it over the mesh's other dimensions, in place.
            compile: What ``torch.compile`` is applied to: ``"blocks"`` (the model's own, equal ones compiled once),
                ``"stage"``, or a mapping of its options, for the blocks; with ``"of": "stage"`` for the stage.
            keep_wide: Whether gradients of bfloat16 and float16 parameters stay in float32, in which they accumulate,
                for optimisers with master weights; else they are rounded once, to the parameter's dtype.
            timeout: Seconds that a rank may stand still while another one waits; None: ten minutes. One that says
                that it is busy (building, loading, measuring) may take as long as it likes.
            check_batches: Whether ranks compare checksums of their batches before they exchange anything: True, False,
                or ``"auto"``: in the first steps, and then in some. Only tensors on the host are read.
            debug: Whether a step names the first layer, forward or backward, with a value that is NaN or infinite
                (``NonFiniteError``); slow: every layer's output is looked at.
            timings: Whether ``step`` records what each rank does when, for ``timings`` and ``trace``.

        Returns:
            The pipeline itself.

        Raises:
            MaterializeError: A tensor has no source for its values, or this was called before.
            PlanError: Another rank holds another plan.
            ScheduleError: There are more or fewer processes than ranks.
        """
        # Long: its words say what each of the many ways of running means.
        if self._closed:
            raise MaterializeError("this pipeline was closed\n  compile again: the plan and its report are still here")
        if self._running is not None:
            raise MaterializeError("this pipeline is materialized already\n  compile again for another device or dtype")
        path = weights_path(init)
        words = "empty" if path is not None or isinstance(init, os.PathLike) else init
        seed = self.plan.seed if seed is None else seed
        watch_optimizers(self._source.capture.skeleton.originals)
        self._running = materialize(
            self._source,
            self.graph,
            self.plan,
            device=device,
            dtype=dtype,
            seed=seed,
            options=RunOptions(parallelize, compile, keep_wide, timings, check_batches, debug, timeout),
            init=words,
        )
        self._start = (seed, words)
        self._trainer.start(self._running)
        own, device = self._running.stages, self._running.device
        log.info(
            "materialized %d stages on %s: %d parameters", len(own), device, sum(p.numel() for p in self.parameters())
        )
        if path is not None:
            self.load(path)
        return self

    # --- to train and run -----------------------------------------------------------------------------------------

    def step(
        self,
        *args: Any,
        target: Any = None,
        last: bool = True,
        microbatches: Sequence[Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run forward and backward of one batch.

        Every rank of a pipeline calls it with the same batch, data-parallel replicas each with their own: the loss is
        that of all their samples together. Gradients accumulate until ``zero_grad``.

        Args:
            *args: Positional arguments of the model: the whole batch.
            target: What ``loss_fn`` compares the output with; the model's own argument of that name where no
                ``loss_fn`` takes one.
            last: Whether the optimiser comes next; False while more batches follow.
            microbatches: Instead of a batch, ready-split ones: dictionaries of keyword arguments, tuples of positional
                ones, or ``(args, kwargs)`` pairs. They may differ in shape.
            scaler: Of ``grad_scaler``: the loss is multiplied by its scale before the backward.
            **kwargs: Keyword arguments of the model.

        Returns:
            The batch's loss, without the scale: a detached scalar, the same on every rank.

        Raises:
            ScheduleError: The batch cannot be cut into microbatches for the schedule.
            CaptureError: The model does something for this batch that cannot be recorded.
            MaterializeError: There are no stages yet, or tensors without values.
        """
        running = self._materialized()
        check_scaler(scaler, is_shared=running.groups is not None)
        with running.guard("step"):
            return self._trainer.step(
                running, self._trainer.batch(args, kwargs, target), microbatches, last=last, scaler=scaler
            )

    def evaluate(
        self, *args: Any, target: Any = None, microbatches: Sequence[Any] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the loss of one batch, without gradients; no outputs travel.

        Args:
            *args: As in ``step``; likewise the rest.
            target: What ``loss_fn`` compares the output with.
            microbatches: Instead of a batch, ready-split ones.
            **kwargs: Keyword arguments of the model.

        Returns:
            The loss, weighted as in ``step`` and over all replicas: a scalar, the same on every rank.

        Raises:
            ScheduleError: The batch cannot be cut into microbatches for the schedule.
            CaptureError: The model does something for this batch that cannot be recorded.
        """
        running = self._materialized()
        with running.guard("evaluate"):
            return self._trainer.evaluate(running, self._trainer.batch(args, kwargs, target), microbatches)

    def infer(self, *args: Any, gather: bool = True, microbatches: int = 1, **kwargs: Any) -> Any:
        """Run the model forward, without gradients.

        Args:
            *args: Positional arguments of the model, of any batch size; what has a default (labels) may be left out.
            gather: Whether every rank gets the output; else only the ranks of the last stage do, the others None.
            microbatches: Parts that follow each other through the stages. With one, the output is the model's own
                whatever it does; with several, samples must not depend on each other: a few are tried at first.
            **kwargs: Keyword arguments of the model.

        Returns:
            What the model returns.

        Raises:
            CaptureError: The model does something for this batch that cannot be recorded.
            ScheduleError: The batch cannot be cut so, or samples depend on each other.
        """
        running = self._materialized()
        with running.guard("infer"):
            return self._trainer.infer(running, self._trainer.batch(args, kwargs, None), microbatches, gather=gather)

    def _materialized(self) -> Running:
        if self._closed:
            raise MaterializeError("this pipeline was closed\n  compile again: the plan and its report are still here")
        if self._running is None:
            raise MaterializeError(
                "the pipeline has no parameters yet\n  call pipe.materialize(init=...) first; until then it is a plan"
            )
        return self._running

    # --- what it holds --------------------------------------------------------------------------------------------

    @property
    def stage_modules(self) -> list[nn.Module]:
        """This rank's stages, in stage order, for FSDP2, ``torch.compile``, optimiser groups and adapters."""
        return list(self._materialized().stages)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters, each once, under its first FQN in the model."""
        yield from self._materialized().named(nn.Module.named_parameters)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters, each once."""
        yield from (parameter for _, parameter in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's buffers, each once, under its first FQN in the model."""
        yield from self._materialized().named(nn.Module.named_buffers)

    def train(self, mode: bool = True) -> Self:
        """Switch every module to training mode, or with False to evaluation, as the model's own ``train`` does."""
        switch(self._source.capture.skeleton.module, self._running.stages if self._running is not None else (), mode)
        self._trainer.variants.mode_changed()
        return self

    def eval(self) -> Self:
        """Switch every module to evaluation mode."""
        return self.train(False)

    def optimizer(
        self,
        cls: Callable[..., torch.optim.Optimizer],
        groups: Callable[[str, nn.Parameter], Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Make an optimiser of this rank's trainable parameters, on a rank without any too; every rank calls it.

        ``cls(pipe.parameters(), **options)`` is the same wherever the rank has parameters.

        Args:
            cls: The class, such as ``torch.optim.AdamW``.
            groups: ``groups(fqn, parameter)`` gives the options of the parameter's group; those with equal options go
                together. Every rank gets all groups, in one order. None: all parameters in one group.
            **options: Of the optimiser.

        Raises:
            MaterializeError: There are no parameters yet, or ``groups`` gives no mapping.
        """
        running = self._materialized()
        with running.together("optimizer"):
            order = {fqn: place for place, fqn in enumerate(running.names.tensors)}
            own = self.named_parameters()
            return make_optimizer(cls, own, order, running.groups, running.device, groups, options)

    def grad_scaler(self, **options: Any) -> torch.amp.GradScaler:
        """Make a loss scaler for float16, for ``step(scaler=)``; every rank calls it.

        It is torch's, and used as in plain training (``unscale_``, ``step``, ``update``); what one rank finds not to be
        finite counts on all, so that all skip the same steps.

        Args:
            **options: Those of ``torch.amp.GradScaler``: ``init_scale``, ``growth_interval``, …
        """
        running = self._materialized()
        return make_scaler(running.groups, running.device, options)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._materialized().gradients.zero()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients of the whole model so that their norm is at most ``max_norm``.

        Args:
            max_norm: The largest norm.
            norm_type: Order of the norm; ``inf`` for the largest magnitude.

        Returns:
            The norm before, of all ranks' parameters, ties once; the same on every rank.
        """
        running = self._materialized()
        check_norm(max_norm, norm_type)
        with running.together("clip_grad_norm_", max_norm=max_norm, norm_type=norm_type):
            return running.gradients.clip(max_norm, norm_type)

    def state_dict(self, full: bool = False) -> dict[str, Any]:
        """Give tensors under all of the model's names, as ``nn.Module.state_dict`` has them.

        Args:
            full: Whether to gather the whole model's on rank 0 (copies on the CPU; other ranks get an empty
                dictionary) instead of giving this rank's own (which share memory with the stages). Every rank calls it.
        """
        running = self._materialized()
        if full:
            with running.together("state_dict(full=True)"):
                return full_state(running.names, running.stages, running.groups)
        return own_state(running.names, running.stages)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy tensors in, from a dictionary of the whole model or of this rank's part.

        Args:
            state: Names of other stages are ignored; non-persistent buffers may be among them.

        Raises:
            WeightsError: Lists names the model does not have, own tensors left out, and wrong shapes; nothing was
                changed then.
        """
        running = self._materialized()
        with running.together("load_state_dict"):
            load_state(running.names, running.stages, running.groups, state)
        running.unfilled.difference_update(running.names.first.get(fqn, fqn) for fqn in state)

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        rename: Mapping[str, str] | Callable[[str], str | None] | str | None = None,
        dtype: str = "model",
        strict: bool = True,
        prefix: str | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
    ) -> Any:
        """Read this rank's tensors from files; every rank calls it.

        Everything is checked on every rank before anything is changed.

        Args:
            path: A Hugging Face directory of safetensors, an adapter's directory, a ``.safetensors`` file, a checkpoint
                of ``save``, or a directory of those, of which the newest whole one is taken.
            rename: How the files' names become the model's: a mapping, a function of a name (None drops it), or
                ``"huggingface"``: the conversions of transformers, which a model of transformers gets by itself.
            dtype: ``"model"``: a tensor of another dtype than the model's is an error; ``"cast"``: it is cast.
            strict: Whether names that the model does not have, and tensors that the files lack, are errors.
            prefix: Put before every name of the files.
            optimizer: Gets the state saved with a checkpoint.
            scheduler: Likewise.

        Returns:
            The ``extra`` of a checkpoint, whose step counter and seed the pipeline takes too; else None.

        Raises:
            WeightsError: On every rank; lists all that is wrong. Nothing was changed then.
        """
        running = self._materialized()
        check_kept(optimizer, scheduler)
        given = {"optimizer": optimizer is not None, "scheduler": scheduler is not None}
        with running.together("load", dtype=dtype, strict=strict, prefix=prefix, **given):
            loaded = running.checkpoints.load(path, Wanted(rename, dtype, strict, prefix), optimizer, scheduler)
        self._trainer.resume(loaded.step, loaded.seed)
        log.info("loaded %d tensors from %s", len(loaded.filled), path)
        self._loaded.update(dict.fromkeys(loaded.filled, f"file {loaded.name}"))
        return loaded.extra

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        extra: Any = None,
        only: str | None = None,
        async_: bool = False,
    ) -> Future[None] | None:
        """Write a checkpoint to a new directory; every rank calls it and writes its part.

        It loads into any number of stages and any schedule. It is whole or not there at all, also after a crash.

        Args:
            path: A directory that does not exist.
            optimizer: Whose state is saved, by FQN.
            scheduler: Whose state is saved.
            extra: The user's own values: numbers, strings, lists, dictionaries; the same on every rank, None on any.
            only: ``"trainable"``: only trainable tensors, in peft's form for a model that peft wrapped.
            async_: Whether to return once the tensors are copied, and write in the background.

        Returns:
            With ``async_`` a future, which ends when the checkpoint is whole; else None. Where no rank asks for its
            result, the next ``save``, ``load`` or ``close`` raises what went wrong.

        Raises:
            WeightsError: On every rank: the target exists, there is no room, or something cannot be saved.
        """
        log.info("saving step %d to %s", self._trainer.num_steps, path)
        running = self._materialized()
        check_kept(optimizer, scheduler)
        given = {"optimizer": optimizer is not None, "scheduler": scheduler is not None}
        with running.together("save", only=only, async_=async_, **given):
            return running.checkpoints.save(
                path,
                optimizer=optimizer,
                scheduler=scheduler,
                extra=extra,
                only=only,
                async_=async_,
                step=self._trainer.num_steps,
                seed=self._trainer.seed,
            )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a directory that ``from_pretrained`` of the plain model reads; every rank calls it.

        Safetensors, an index where there are several files, ``config.json``; tensors named and arranged as
        transformers does. A model that peft wrapped writes its adapters, as peft does.

        Args:
            path: A directory that does not exist.

        Raises:
            WeightsError: On every rank: it is no model of transformers, the target exists, or there is no room.
        """
        running = self._materialized()
        with running.together("save_pretrained"):
            running.checkpoints.save_pretrained(path)

    # --- to check -------------------------------------------------------------------------------------------------

    def verify(self, *args: Any, target: Any = None, **kwargs: Any) -> Verification:
        """Compare loss, gradients, outputs and buffers of one batch with the unpartitioned model's.

        The model is built whole on rank 0, and run microbatch by microbatch and on the whole batch at once; where these
        differ by what the model itself couples (BatchNorm), the result says so. Errors are held against a control run
        that is nudged by rounding. Where it does not fit there, every stage runs by itself instead, from the
        boundary tensors of the stage before, without a schedule. Parameters, buffers and gradients are left as they
        are.

        Args:
            *args: A batch, as ``step`` gets it.
            target: As in ``step``.
            **kwargs: As in ``step``.

        Returns:
            What was compared, and the largest error.

        Raises:
            MismatchError: Names the worst tensor, its stage and its error. Every rank raises it.
        """
        running = self._materialized()
        batch = self._trainer.batch(args, kwargs, target)
        with running.guard("verify"):
            step = self._trainer.prepare(running, batch, None, "verify")
            verifier = Verifier(running, self._trainer.variants)
            return verifier.verify(step, batch, seed=self._trainer.seed, step=self._trainer.num_steps)

    @property
    def timings(self) -> tuple[StepTiming, ...]:
        """This rank's steps so far: seconds in forward, backward, communication and waiting, and the bubble.

        Raises:
            MaterializeError: Nothing was recorded.
        """
        return self._materialized().recorded().steps()

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write what all ranks did when, for the trace viewers of Chrome and Perfetto; every rank calls it.

        Beside the events stand, by rank, the bubble of the last step as measured and as simulated, samples and
        tokens per second, and the most memory in use as measured (on an accelerator) and as planned.

        Args:
            path: A JSON file; rank 0 writes it.

        Raises:
            MaterializeError: Nothing was recorded.
        """
        running = self._materialized()
        recorded, planned = running.recorded(), simulate(self.plan).bubble
        with running.together("trace"):
            write_trace(path, recorded, running.groups, running.device, self.plan, planned)

    # --- to end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the pipeline: frees its stages and groups. Later calls raise; the plan and its report stay.

        A pipeline is a context manager that closes itself: ``with fxpipe.compile(...) as pipe``.
        """
        running, self._running = self._running, None
        self._closed = True
        if running is not None:
            running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._running is not None and self._running.groups is not None:
            self._running.groups.leave(error)
        self.close()
