"""Every parameter over several processes: PyTorch's FSDP2 (`fully_shard`). Each holds a slice of every parameter, its
master and its moments; a layer's weights are gathered while it is computed.

A slice is what `Tensor.chunk` gives along the first dimension, so any process can cut its own from a whole tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune.checkpoint.shards import Shards
from minitune.checkpoint.weights import hub_places
from minitune.config import UserError
from minitune.model.decoder import Decoder
from minitune.train.optim import AdamW
from minitune.train.optim8 import AdamW8
from minitune.train.parallel import Team

WHOLE = 0.1  # of a card's memory: what whole weights may take from forward to backward
MOMENTS = "optimizer"  # the folder in a checkpoint, in the form of torch.distributed.checkpoint


class Sharded:
    """The decoder's slices and how the processes make one step of them (`step.Sharing`)."""

    def __init__(self, team: Team, decoder: Decoder):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        self.team, self.decoder = team, decoder
        decoder.padding = 0  # the zero rows behind the head are not sharded: the loss pads a copy
        self.mesh = init_device_mesh(decoder.device.type, (team.size,))
        # A slice's gradient is kept in the weights' dtype: of two, the sum in it is the sum in float32, rounded.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32 if team.size > 2 else None)
        again = not keeps_whole(team, decoder)
        for layer in decoder.layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=exact, reshard_after_forward=again)
        fully_shard(decoder, mesh=self.mesh, mp_policy=exact)
        register_fsdp_forward_method(decoder, "hidden")
        self.modules = [module for module in decoder.modules() if isinstance(module, FSDPModule)]
        for module in self.modules:  # sums, not means: the loss is divided by the whole step's tokens
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        self.names = [name for name, _ in decoder.named_parameters()]
        self.whole: list[Any] = list(decoder.parameters())
        self.parameters = [nn.Parameter(p.detach().to_local()) for p in self.whole]  # the same memory

    def gather(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """The step's loss; backward has added up and sliced the gradients."""
        for whole, mine in zip(self.whole, self.parameters, strict=True):
            mine.grad, whole.grad = whole.grad.to_local(), None
        return self.team.sum(loss)

    def norm(self, norm: Tensor) -> Tensor:
        """Over all slices."""
        return self.team.sum(norm.square()).sqrt()

    def own(self, full: Tensor) -> Tensor:
        """This process's slice of a whole tensor."""
        pieces = full.chunk(self.team.size)
        return pieces[self.team.rank] if self.team.rank < len(pieces) else full[:0]

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: there is no adapter."""
        return contextlib.nullcontext()

    def _reshard(self) -> None:
        """A held-out loss leaves weights whole."""
        for module in self.modules:
            module.reshard()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(hub name, whole tensor) of every parameter, one at a time; all processes must take part."""
        self._reshard()
        held, full = None, torch.empty(0)
        for name, (tensor, rows) in hub_places(self.decoder).items():
            if tensor is not held:
                held, full = tensor, tensor.detach().full_tensor().cpu()  # type: ignore[attr-defined]
            yield name, full if rows is None else full[rows]

    @torch.no_grad()
    def load_weights(self, folder: Path) -> None:
        """Each process's slices, from a hub folder."""
        self._reshard()
        mine = {id(whole): local for whole, local in zip(self.whole, self.parameters, strict=True)}
        places = hub_places(self.decoder)
        with Shards(folder) as files:
            for tensor in dict.fromkeys(tensor for tensor, _ in places.values()):
                full = torch.empty(tensor.shape, dtype=tensor.dtype)
                for name, (there, rows) in places.items():
                    if there is tensor:
                        part = full if rows is None else full[rows]
                        part.copy_(files.get(name, part.shape))
                mine[id(tensor)].copy_(self.own(full))

    def save(self, folder: Path, optimizer: AdamW | AdamW8) -> None:
        """Masters and moments; every process writes its own, into a file system that all share."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self._as_whole(moments(optimizer, self.names)), checkpoint_id=folder / MOMENTS)

    def load(self, folder: Path, state: dict[str, Any] | None, optimizer: AdamW | AdamW8) -> None:
        """The same again, of any number of processes; state: what a single process has saved instead."""
        import torch.distributed.checkpoint as dcp

        if state is None:
            check_form(folder)
            held = moments(optimizer, self.names)
            dcp.load(self._as_whole(held), checkpoint_id=folder / MOMENTS)
            set_steps(optimizer, held["step"])
            return
        slices = {
            i: {k: v if k == "step" else self.own(v) for k, v in one.items()}
            for i, one in state["adamw"]["state"].items()
        }
        mine = {**state["adamw"], "state": slices}
        optimizer.load_state_dict({"adamw": mine, "masters": [self.own(m) for m in state["masters"]]})

    def _as_whole(self, held: dict[str, Tensor]) -> dict[str, Any]:
        """The slices as what they are slices of; the memory stays."""
        from torch.distributed.tensor import DTensor, Shard

        whole = dict(zip(self.names, self.whole, strict=True))
        out: dict[str, Any] = {"step": held["step"]}
        for name, local in held.items():
            if name != "step":
                like = whole[name.partition(":")[2]]
                out[name] = DTensor.from_local(
                    local, self.mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
                )
        return out


def keeps_whole(team: Team, decoder: Decoder) -> bool:
    """Whether layers stay whole from forward to backward: they cross between the cards once a pack instead of twice.
    The same for all processes."""
    card = torch.cuda.mem_get_info(decoder.device)[1] if decoder.device.type == "cuda" else 0
    return not team.any(sum(p.nbytes for p in decoder.parameters()) > WHOLE * card)


def moments(optimizer: AdamW | AdamW8, names: Sequence[str]) -> dict[str, Tensor]:
    """What the optimizer holds, by name; zeros where it has not stepped yet."""
    assert isinstance(optimizer, AdamW), "8-bit moments are one process's"
    out: dict[str, Tensor] = {}
    for name, parameter, master in zip(names, optimizer.parameters, optimizer.masters, strict=True):
        state = optimizer.inner.state[master]
        if not state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        out["step"] = state["step"]  # equal for all
        out[f"exp_avg:{name}"], out[f"exp_avg_sq:{name}"] = state["exp_avg"], state["exp_avg_sq"]
        if master is not parameter:
            out[f"master:{name}"] = master.detach()
    return out


def set_steps(optimizer: AdamW | AdamW8, step: Tensor) -> None:
    """The count of updates, for every parameter."""
    assert isinstance(optimizer, AdamW)
    for master in optimizer.masters:
        optimizer.inner.state[master]["step"].copy_(step)


class Alone:
    """One process, which holds everything."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def load(self, folder: Path, state: dict[str, Any] | None, optimizer: AdamW | AdamW8) -> None:
        """The optimizer's state; None: what several processes have saved in `folder`."""
        if state is not None:
            optimizer.load_state_dict(state)
            return
        import torch.distributed.checkpoint as dcp

        check_form(folder)
        held = moments(optimizer, [name for name, _ in self.decoder.named_parameters()])
        dcp.load(dict(held), checkpoint_id=folder / MOMENTS, no_dist=True)
        set_steps(optimizer, held["step"])
        assert isinstance(optimizer, AdamW)
        with torch.no_grad():
            for parameter, master in zip(optimizer.parameters, optimizer.masters, strict=True):
                parameter.copy_(master)


def check_form(folder: Path) -> None:
    """UserError where DeepSpeed has saved a checkpoint's moments."""
    if not (folder / MOMENTS / ".metadata").is_file():
        raise UserError(f"{folder}: was saved by DeepSpeed; go on with --deepspeed")


def sharded_of(step: Any) -> Any:
    """What holds the parameters of a step, where no process holds them all; None where each does."""
    sharing = getattr(step, "zero", step.sharing)
    return sharing if hasattr(sharing, "tensors") else None
