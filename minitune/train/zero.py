"""DeepSpeed (ZeRO 1 to 3, CPU offload) in place of our optimizer, for `--deepspeed ds.json`: the loop, the rows and the
loss are the same, DeepSpeed holds what learns. Its checkpoints are gathered: whole tensors by name, which any number
of processes and any stage can take up."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitune.checkpoint import resume
from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import hub_places
from minitune.checkpoint.writing import write_safetensors
from minitune.config import TrainConfig, UserError
from minitune.data.loader import Pack, StepBatch
from minitune.model.decoder import Decoder
from minitune.model.lora import Dropout
from minitune.model.quantized import Int4Linear
from minitune.train import zero_config
from minitune.train.optim import AdamW
from minitune.train.optim8 import AdamW8
from minitune.train.parallel import Team
from minitune.train.step import StepResult, TrainStep, chunk_of, pack_loss
from minitune.train.stop import Stopped

MOMENTS = "optimizer"
STATES = ("exp_avg", "exp_avg_sq")


class Forward(nn.Module):
    """What DeepSpeed wraps: a pack's summed loss."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder, self.chunk = decoder, chunk_of(decoder)

    def forward(self, pack: Pack, dropout: Dropout | None) -> Tensor:
        return pack_loss(self.decoder, pack, dropout, self.chunk)


class Zero:
    """The engine, and the decoder's parameters as far as they are spread."""

    def __init__(self, team: Team, decoder: Decoder, config: TrainConfig):
        raw = zero_config.read(config)
        if any(isinstance(linear, Int4Linear) for linear in decoder.linears()):
            raise UserError("4-bit weights and --deepspeed don't go together; torchrun without --deepspeed does")
        self.team, self.decoder, self.lines = team, decoder, zero_config.notes(raw, config)
        dtype = str(decoder.dtype).removeprefix("torch.")
        ds = zero_config.filled(raw, config, dtype, decoder.config.hidden_size, team.size)
        on_card = decoder.device.type == "cuda"
        deepspeed = imported(on_card)
        if line := zero_config.choose_adam(ds, on_card):
            self.lines.append(line)
        self.named = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
        self.stage = zero_config.stage_of(ds)
        if self.stage == 3 or config.method == "full":
            decoder.padding = 0  # DeepSpeed moves the head, and not the zero rows behind it: the loss pads a copy
        matrices, rest = ([p for _, p in self.named if (p.ndim > 1) == kind] for kind in (True, False))
        kinds = ((matrices, config.weight_decay), (rest, 0.0))
        groups = [{"params": found, "weight_decay": decay} for found, decay in kinds if found]
        self.forward = Forward(decoder)
        if self.stage == 3:  # the head is read outside its module
            deepspeed.zero.register_external_parameter(self.forward, decoder.head_weight)
        if not dist.is_initialized():  # one process, which no launcher started
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group("nccl" if on_card else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        with said_to_stderr():
            made = deepspeed.initialize(
                model=self.forward, model_parameters=groups, config=ds, dist_init_required=False
            )
        self.engine: Any = made[0]
        where = ", optimizer on the CPU" if zero_config.offloads(ds) else ""
        self.lines.append(
            f"DeepSpeed {deepspeed.__version__}, ZeRO stage {self.stage}{where}; plain layers, not captured"
        )

    @property
    def states(self) -> dict[Any, dict[str, Any]]:
        """The inner optimizer's, by parameter or slice."""
        return self.engine.optimizer.optimizer.state  # type: ignore[no-any-return]

    def loss(self, pack: Pack) -> Tensor:
        """A pack's summed loss, nothing learned."""
        return self.engine(pack, None)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[Tensor] | None = None, change: bool = False) -> Iterator[None]:
        """Parameters (those that learn) whole, where they are spread; all processes must take part. change: what rank 0
        writes into them stays."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        chosen = [p for _, p in self.named] if parameters is None else list(parameters)
        with deepspeed.zero.GatheredParameters(chosen, modifier_rank=0 if change else None):
            yield

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(hub name, whole tensor) of every parameter; all processes must take part."""
        for name, (tensor, rows) in hub_places(self.decoder).items():
            with self.gathered([tensor]):
                part = (tensor if rows is None else tensor[rows]).detach().to("cpu", copy=True)
            yield name, part

    def load_weights(self, folder: Path) -> None:
        """What was learned, from a checkpoint."""
        with self.gathered(change=True), torch.no_grad():
            resume.load_weights(folder, self.decoder)

    def save(self, folder: Path, optimizer: AdamW | AdamW8) -> None:
        """Masters and moments, gathered one by one; rank 0 writes them."""
        stream = self._gathered_states()
        if self.team.first:
            write_safetensors(folder / MOMENTS, stream)
        else:
            for _ in stream:
                pass

    def _gathered_states(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not any(self.states.values()):  # every step was skipped so far
            self._prime()
            self._set_steps(0.0)
        self._link()
        for name, parameter in self.named:
            yield f"master:{name}", safe_get_full_fp32_param(parameter)
            for kind in STATES:
                yield f"{kind}:{name}", safe_get_full_optimizer_state(parameter, kind)
        yield "step", torch.tensor(float(next(iter(self.states.values()))["step"]))

    def load(self, folder: Path, state: dict[str, Any] | None, optimizer: AdamW | AdamW8) -> None:
        """The same again, of any number of processes and any stage. UserError for another engine's checkpoint."""
        if state is not None or not any((folder / MOMENTS).glob("model*")):
            raise UserError(f"{folder}: was saved without DeepSpeed; go on without --deepspeed")
        self._prime()
        self._link()
        self.load_weights(folder)
        with Shards(folder / MOMENTS) as files:
            step = float(files.get("step"))
            for name, parameter in self.named:
                for kind in ("master", *STATES):
                    self._set(parameter, kind, files.get(f"{kind}:{name}").to(self.decoder.device))
        self._set_steps(step)

    def _set_steps(self, step: float) -> None:
        """The count of updates, for every parameter."""
        for held in [*self.states.values(), *self.engine.optimizer.optimizer.param_groups]:
            if "step" in held:
                held["step"] = torch.full_like(held["step"], step) if isinstance(held["step"], Tensor) else int(step)

    def _set(self, parameter: nn.Parameter, kind: str, full: Tensor) -> None:
        """This process's part of a master or a moment, from the whole one."""
        from deepspeed import utils as ds

        key = () if kind == "master" else (kind,)
        if self.stage < 3:
            (ds.safe_set_full_optimizer_state if key else ds.safe_set_full_fp32_param)(parameter, full, *key)
            return
        # 0.19.8 sets a whole one of stage 3 only where every process's part is equally long
        held = (ds.safe_get_local_optimizer_state if key else ds.safe_get_local_fp32_param)(parameter, *key)
        part = full.flatten()[held.numel() * self.team.rank :][: held.numel()]
        part = nn.functional.pad(part, (0, held.numel() - part.numel()))
        (ds.safe_set_local_optimizer_state if key else ds.safe_set_local_fp32_param)(parameter, part, *key)

    def _link(self) -> None:
        """DeepSpeed 0.19.8 finds the moments of the first group alone (stages 1 and 2): it looks behind the first
        group's first update."""
        inner = self.engine.optimizer
        if hasattr(inner, "_lazy_init_hp_params_optimizer_state"):
            inner._hp_optimizer_states_linked = False
            inner._lazy_init_hp_params_optimizer_state()

    def _prime(self) -> None:
        """DeepSpeed makes its states at the first update: one of nothing, at rate 0; the loss scale stays."""
        from minitune.data.loader import make_pack
        from minitune.data.template import IGNORED, Encoded

        pack = make_pack([Encoded([0], [IGNORED])], [0]).to(self.decoder.device)
        scale = vars(self.engine.optimizer.loss_scaler)
        kept = dict(scale)
        set_rate(self.engine, 0.0)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(self.engine(pack, None), scale_wrt_gas=False)
        self.engine.step()
        scale.update(kept)


class ZeroScale:
    """DeepSpeed's scaling of a float16 loss, as far as a run remembers it (`step.LossScale`)."""

    KEPT = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

    def __init__(self, engine: Any):
        self.scaler = engine.optimizer.loss_scaler
        self.scaler.raise_error_at_min_scale = False  # the report ends a run that skips on and on

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.scaler).items() if self.scaler.dynamic and name in self.KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler.dynamic:  # a fixed scale is the file's
            vars(self.scaler).update(state)


class ZeroOptimizer(AdamW):
    """Stands where our optimizer stands; the engine updates."""

    def __init__(self, zero: Zero):
        self.parameters = [p for _, p in zero.named]  # type: ignore[assignment]


class ZeroStep(TrainStep):
    """The step, its backward and update DeepSpeed's. DeepSpeed takes means over processes: the loss is multiplied by
    their number first."""

    def __init__(self, zero: Zero, optimizer: AdamW, dropout: float, seed: int):
        super().__init__(zero.decoder, optimizer, dropout=dropout, seed=seed)
        self.zero = zero
        if zero.engine.fp16_enabled():
            self.loss_scale = ZeroScale(zero.engine)  # type: ignore[assignment]

    def __call__(self, batch: StepBatch, rate: float) -> StepResult:
        set_rate(self.zero.engine, rate)
        share = torch.full((), 1 / batch.supervised, device=self.decoder.device)
        return self.run([pack.to(self.decoder.device) for pack in batch.packs], share)

    def run(self, packs: list[Pack], share: Tensor) -> StepResult:
        engine, team = self.zero.engine, self.zero.team
        loss = torch.zeros((), device=self.decoder.device)
        for i, pack in enumerate(packs):
            last = i + 1 == len(packs)
            engine.set_gradient_accumulation_boundary(last)
            part = engine(pack, self._dropout(pack)) * share
            engine.backward(part * team.size, scale_wrt_gas=False)
            loss += part.detach()
            if not last:
                engine.step()
        loss = team.sum(loss)
        if not torch.isfinite(loss) and not engine.fp16_enabled():
            raise Stopped("the loss is not finite: nothing was learned from this step; the last checkpoint is good")
        engine.step()
        self.step_index += 1
        norm = torch.as_tensor(float(engine.get_global_grad_norm() or 0.0), device=loss.device)
        return StepResult(loss, norm, torch.as_tensor(float(not engine.was_step_applied()), device=loss.device))


def set_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def imported(on_card: bool) -> Any:
    """The package, without its chatter."""
    if not on_card:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with said_to_stderr():
        logging.disable(logging.WARNING)
        try:
            import deepspeed
        finally:
            logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not on_card:  # collectives in shared memory, which would be compiled first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def said_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """What DeepSpeed prints is no result of ours."""
    return contextlib.redirect_stdout(sys.stderr)
