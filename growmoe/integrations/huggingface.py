"""The organizer as a callback of transformers.Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import TrainerCallback
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "growmoe.integrations.huggingface needs transformers: pip install 'growmoe[hf]'"
    ) from error

from growmoe.checkpoint import load, save
from growmoe.lineage import Event
from growmoe.live import refuse_parallel_wrappers
from growmoe.moe import aux_loss, moe_layers
from growmoe.optim import as_optimizers
from growmoe.organizer import Organizer
from growmoe.rules.rule import Rule

log = logging.getLogger("growmoe")

FILE = "growmoe.safetensors"


class OrganizerCallback(TrainerCallback):
    """Lets a model organize itself while `transformers.Trainer` trains it.

        trainer = Trainer(model, args, train_dataset=data,
                          callbacks=[OrganizerCallback([SpawnOnNovelty()], every=50)])

    The organizer steps after every optimizer step, and takes in the loss of every micro-batch. The
    auxiliary losses of the MoE layers are added to the loss that the model returns. A model that
    returns none, because the trainer has a `compute_loss_func` or smooths labels, leaves both to
    you: add `growmoe.aux_loss(model)` in that function.

    Each checkpoint of the trainer gets a file `growmoe.safetensors` beside the trainer's own, with
    structure, optimizer, scheduler and organizer; `trainer.train(resume_from_checkpoint=…)` goes on
    from it with a model as it was at first. The trainer's `optimizer.pt`, which tells parameters by
    position and so cannot be read into another structure, is removed.

    Args:
        rules, options: as for `growmoe.Organizer`.
        log: takes numbers by name, such as `trainer.log`; may be assigned after the trainer is
            made. Without one, what happened stands in `trainer.state.log_history` and in the log
            of the name "growmoe".
        aux_loss: whether to add the auxiliary losses.
        resume_from: the checkpoint folder, if it is not where the trainer would write it.

    Attributes:
        organizer: from the start of training on.
        events: all that was done or refused in this run.

    Raises:
        ValueError: at the start of training: several processes or devices, DeepSpeed, an optimizer
            that cannot follow, no MoE layer; or a resumed training without the file.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        *,
        log: Callable[[dict[str, float]], Any] | None = None,
        aux_loss: bool = True,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.rules, self.options = list(rules), options
        self.log, self.aux_loss = log, aux_loss
        self.resume_from = resume_from
        self.organizer: Organizer | None = None
        self.events: list[Event] = []
        self._loss: Tensor | None = None
        self._hook: Any = None
        self._accumulated = 1

    # When training begins and ends.

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        _refuse(args, model)
        optimizers = as_optimizers(more.get("optimizer"))
        for optimizer in optimizers:
            if type(optimizer).__module__.startswith("transformers."):  # not torch's of that name
                raise ValueError(
                    f"OrganizerCallback: transformers' own {type(optimizer).__name__} keeps a "
                    "state that newborns cannot inherit; choose another optim, as 'adamw_torch'"
                )
        if self.organizer is None or self.organizer.optimizers != optimizers:
            before = self.organizer
            self.organizer = Organizer(model, optimizers, self.rules, **self.options)
            if before is not None:  # a second call of train
                self.organizer.load_state_dict(before.state_dict())
        if state.global_step > 0:
            self._resume(args, state, model, optimizers, more.get("lr_scheduler"))
        self._accumulated = args.gradient_accumulation_steps
        if self._hook is not None:
            self._hook.remove()
        self._hook = model.register_forward_hook(self._take_loss, with_kwargs=True)
        _keep_structure_out(model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and self.organizer is not None:
            # the trainer has read the weights alone, which may be of another structure
            load(
                Path(best) / FILE,
                model,
                self.organizer.optimizers,
                self.organizer,
                random_state=False,
            )
            _keep_structure_out(model)

    # Each step.

    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._step(state, more["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._step(state, more["model"])

    def _step(self, state: Any, model: nn.Module) -> None:
        if self.organizer is None:
            return
        events = self.organizer.step(self._loss)
        self._loss = None
        if not events:
            return
        self.events += events
        for event in events:
            log.info("%s", event)
        numbers: dict[str, float] = {
            f"growmoe/{name}/experts": len(layer.experts)
            for name, layer in self.organizer.layers.items()
        }
        for event in events:
            key = f"growmoe/{event.act if event.accepted else 'refused'}"
            numbers[key] = numbers.get(key, 0) + 1
        if self.log is not None:
            self.log(numbers)
        said = [str(event) for event in events]
        state.log_history.append({**numbers, "growmoe": said, "step": state.global_step})
        _keep_structure_out(model)

    def _take_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Keep the task's loss for the organizer, and add the auxiliary losses to it."""
        if not model.training or not torch.is_grad_enabled():
            return None
        key: Any = "loss" if isinstance(output, dict) else 0
        if isinstance(output, dict):
            loss = output.get("loss")
        else:
            loss = (
                output[0]
                if isinstance(output, tuple) and kwargs.get("labels") is not None
                else None
            )
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            return None
        self._loss = loss.detach()
        if not self.aux_loss:
            return None
        aux = aux_loss(model).to(loss.device)
        if kwargs.get("num_items_in_batch") is not None:
            aux = aux / self._accumulated  # then the loss is a share of the whole step's already
        if isinstance(output, dict):
            output[key] = loss + aux
            return output
        return (loss + aux, *output[1:])

    # Checkpoints.

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.organizer is None or not state.is_world_process_zero or not folder.is_dir():
            return
        optimizers = self._optimizers(args)
        scheduler = more.get("lr_scheduler") if optimizers else None
        save(folder / FILE, model, optimizers, self.organizer, scheduler=scheduler)
        (folder / "optimizer.pt").unlink(missing_ok=True)

    def _optimizers(self, args: Any) -> list[torch.optim.Optimizer]:
        if self.organizer is None or args.save_only_model:
            return []
        return self.organizer.optimizers

    def _resume(
        self, args: Any, state: Any, model: nn.Module, optimizers: list[Any], scheduler: Any
    ) -> None:
        default = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = default if self.resume_from is None else Path(self.resume_from)
        if not (folder / FILE).is_file():
            raise ValueError(
                f"training goes on at step {state.global_step}, but there is no {folder / FILE} "
                "with the structure of the model; pass the folder to OrganizerCallback as "
                "resume_from="
            )
        # the trainer restores the random state itself
        load(
            folder / FILE,
            model,
            optimizers,
            self.organizer,
            scheduler=scheduler,
            random_state=False,
        )


def _refuse(args: Any, model: nn.Module) -> None:
    if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed:
        raise ValueError(
            f"OrganizerCallback: {args.world_size} processes with {args.n_gpu} devices each"
            f"{' and DeepSpeed' if args.deepspeed else ''}: structure cannot change under wrappers "
            "that keep their own list of the parameters; train in one process on one device"
        )
    for layer in moe_layers(model).values():
        refuse_parallel_wrappers(layer)
    if args.save_strategy != "no" and not hasattr(model, "save_pretrained"):
        raise ValueError(
            "OrganizerCallback: the trainer saves a model that is no PreTrainedModel as tensors "
            "alone, without its structure; set save_strategy='no' and use growmoe.save"
        )
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            "OrganizerCallback: load_best_model_at_end may bring another structure, which the "
            "optimizer can follow only if it was saved; set save_only_model=False"
        )


def _keep_structure_out(model: nn.Module) -> None:
    """Let the model save itself by `save_pretrained`, which takes tensors alone."""
    structure = {
        f"{name}._extra_state"
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept = {key for key in ignored if not key.endswith("_extra_state")}
    model._keys_to_ignore_on_save = kept | structure  # type: ignore[assignment]
