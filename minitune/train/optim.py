"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) in 32 bits, clipping and a gate inside the update.

`torch.optim.AdamW(fused=True)` takes a device-side divisor of the gradients and a device-side flag that skips the
update, so neither clipping, nor loss scaling, nor a value that is not finite needs the host.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitune.config import TrainConfig


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then the schedule, as Hugging Face's are."""
    peak = config.resolved_learning_rate
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return peak * step / max(1, warmup)
    if config.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    if config.lr_scheduler_type == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * max(0.0, 1 - progress)


class _Inner(torch.optim.AdamW):
    """torch's, its methods without their decorators: those import torch's compiler (1.3 s of start) to keep it away."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class AdamW:
    """AdamW over float32 values; parameters of fewer bits get a float32 master copy, which holds the truth.

    Weight decay falls on matrices only. matrices: the shapes that lie end to end in the one parameter, where it holds
    several (`model.fused`): they decay, and are saved and read as if each were a parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig, matrices: Sequence[torch.Size] = ()):
        self.parameters, self.matrices = list(parameters), list(matrices)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        decays = [p for p in self.masters if p.ndim > 1 or self.matrices]
        rest = [p for p in self.masters if p.ndim <= 1 and not self.matrices]
        device = self.parameters[0].device
        self.rate = torch.zeros((), device=device)
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decays, config.weight_decay), (rest, 0.0))
            if group
        ]
        self.inner = _Inner(
            groups,
            lr=self.rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
            capturable=device.type == "cuda",
        )

    def step(self, divisor: Tensor, skip: Tensor) -> None:
        """One update at `rate` with gradients / `divisor` (float32 scalar); none at all where `skip` is 1.

        A skipped update leaves parameters, moments and step counts as they were.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.grad_scale, self.inner.found_inf = divisor, skip  # type: ignore[attr-defined]
        self.inner.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                    master.grad = None

    def zero_grad(self, keep: bool = False) -> None:
        """`keep`: the gradients' memory stays, filled with zeros, for those who add to it by themselves."""
        for parameter in self.parameters:
            if keep and parameter.grad is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def places(self) -> list[tuple[str, Callable[[], Any]]]:
        """What a captured step reads and writes beside the parameters, each by its name and how it is found."""
        places: list[tuple[str, Callable[[], Any]]] = [("rate", partial(getattr, self, "rate"))]
        for i, master in enumerate(self.masters):
            places.append((f"master {i}", partial(self.masters.__getitem__, i)))
            for key, value in self.inner.state.get(master, {}).items():
                if isinstance(value, Tensor):
                    places.append((f"moments {i} {key}", lambda m=master, k=key: self.inner.state[m][k]))  # type: ignore[misc]
        return places

    def state_dict(self) -> dict[str, Any]:
        masters = [m.detach() for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        state = self.inner.state_dict()
        return {"adamw": _apart(state, self.matrices) if self.matrices else state, "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rate, capturable = self.rate, self.inner.defaults["capturable"]
        self.inner.load_state_dict(_together(state["adamw"]) if self.matrices else state["adamw"])
        for group in self.inner.param_groups:  # the saved rate must not replace the tensor that `step` fills
            group["lr"], group["capturable"] = rate, capturable
        own = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        with torch.no_grad():
            for master, saved in zip(own, state["masters"], strict=True):
                master.copy_(saved)


def _apart(state: dict[str, Any], shapes: Sequence[torch.Size]) -> dict[str, Any]:
    """The state of one flat parameter as that of the matrices in it."""
    flat, (group,) = state["state"].get(0, {}), state["param_groups"]
    sizes = [shape.numel() for shape in shapes]
    pieces = {k: v if k == "step" else v.split(sizes) for k, v in flat.items()}
    apart = {
        i: {k: v.clone() if k == "step" else v[i].view(shape) for k, v in pieces.items()}
        for i, shape in enumerate(shapes if flat else ())
    }
    return {"state": apart, "param_groups": [{**group, "params": list(range(len(shapes)))}]}


def _together(state: dict[str, Any]) -> dict[str, Any]:
    """The way back."""
    apart, (group,) = state["state"], state["param_groups"]
    held = [apart[i] for i in group["params"]] if apart else []
    flat = {k: held[0][k] if k == "step" else torch.cat([h[k].reshape(-1) for h in held]) for k in (held or [{}])[0]}
    return {"state": {0: flat} if flat else {}, "param_groups": [{**group, "params": [0]}]}


class LossScale:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740), on the device:
    halved by an overflow, doubled after `interval` good steps."""

    def __init__(self, device: torch.device, start: float = 65536.0, interval: int = 2000):
        self.scale = torch.full((), start, device=device)
        self.good = torch.zeros((), device=device)
        self.interval = interval

    def update(self, overflow: Tensor) -> None:
        """`overflow`: float32 scalar, 1 where a gradient was not finite."""
        grow = (self.good + 1 >= self.interval) & (overflow == 0)
        self.scale.copy_(torch.where(overflow > 0, self.scale * 0.5, torch.where(grow, self.scale * 2, self.scale)))
        self.good.copy_(torch.where((overflow > 0) | grow, 0, self.good + 1))

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self.good.copy_(state["good"])
