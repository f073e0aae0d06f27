"""From what an environment says to what a network takes: device, float, one-hot, normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.errors import UsageError
from klrl.kl import ALONE
from klrl.policies.observations import Layout, Observation
from klrl.policies.spaces import MASK, UNMASKED, brightest, category_sizes, is_small_image

Inputs = dict[str, Tensor]
"""A batch of network inputs: float32 "vector" [B, F], and each image [B, C, H, W] under "image KEY": as uint8, or where
the environment shows floats, as float32 from 0 to 1; beside them, where observations say which actions are allowed,
bool "action_mask" [B, sum of the categoricals' sizes]."""

_LIMIT = 10.0  # normalised observations are cut off here, as in SB3's VecNormalize


class ObservationEncoder:
    """Turns observations of one space into network inputs, with a running normalisation of Box vectors.

    The statistics move only when ``update`` is called: the agent does so once its KL has been measured, so that
    within a rollout and its update the policy depends on nothing but its weights. They are those of all ``ranks``.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        device: torch.device,
        normalize: bool,
        keys: Sequence[str] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """``keys``: the parts of a Dict observation that networks are shown, each with all in it; by default all.
        ``sizes``: ``mask_sizes``, where the part MASK is to be a mask, which networks are not shown.

        Raises UsageError for a key that the space does not have, and where there is nothing but a mask.
        """
        self.layout, self.ranks = Layout(space), ALONE
        self.sizes, self._starts = list(sizes), np.cumsum([0, *sizes[:-1]])
        shown = {name: part for name, part in self.layout.parts.items() if not (sizes and name == MASK)}
        if not shown:
            raise UsageError(f"observation space {space} is but an action mask: there is nothing to learn from")
        self.device, self.parts = device, _chosen(shown, keys)
        self.images = {name: shape for name, shape in self.layout.images.items() if name in self.parts}
        self.image_types = {name: _image_type(self.parts[name]) for name in self.images}
        self.space: spaces.Space[Any] = spaces.Dict(self.parts) if keys or sizes else space
        if sizes and list(self.parts) == [UNMASKED]:
            self.space = self.parts[UNMASKED]
        self.small_images: list[tuple[slice, spaces.Space[Any]]] = []
        """Those that are among the numbers of "vector": where, and of what space."""
        scaled: list[bool] = []
        for name, part in self.parts.items():
            if is_small_image(part):
                self.small_images.append((slice(len(scaled), len(scaled) + _features(part)), part))
            if name not in self.images:
                scaled += [isinstance(part, spaces.Box)] * _features(part)
        self.features = len(scaled)
        self._scaled = torch.tensor(scaled, dtype=torch.bool, device=device)
        self.normalize = normalize and bool(self._scaled.any())
        *more, (self._name, only) = self.parts.items()
        one, images = not more and (bool(sizes) or not self.layout.keyed), self.images or self.small_images
        self.plain = one and isinstance(only, spaces.Box) and not images and only.dtype != np.uint8
        """Whether the observation is one vector of numbers, but for a mask, so that ``to_numpy`` applies."""
        self.count = 0.0
        self.mean = torch.zeros(self.features, device=device)
        self.var = torch.ones(self.features, device=device)
        self._refresh()

    def __call__(self, obs: Observation) -> Inputs:
        """Encode observations with any leading shape [..., *space.shape]; the leading shape becomes one batch [B].

        Raises UsageError for those that are not of the space.
        """
        return self.scaled(self.unscaled(obs))

    def scaled(self, inputs: Inputs) -> Inputs:
        """The inputs that ``unscaled`` gave, normalised where this encoder does that."""
        if not self.normalize:
            return inputs
        vector = ((inputs["vector"] - self.mean) * self._inverse_std).clamp_(-_LIMIT, _LIMIT)
        return {**inputs, "vector": vector}

    def to_numpy(self, obs: Observation) -> np.ndarray[Any, Any]:
        """Encode ``plain`` observations [B, *shape] as the "vector" alone, in NumPy, without torch's cost per call."""
        checked: Any = self.layout.batch(obs)
        if self.layout.keyed:
            checked = checked[self._name]
        vector = checked.reshape(len(checked), -1).astype(np.float32, copy=False)
        if not self.normalize:
            return vector
        mean, inverse_std = self._numpy
        vector = vector - mean
        vector *= inverse_std
        return np.minimum(np.maximum(vector, -_LIMIT, out=vector), _LIMIT, out=vector)  # np.clip takes twice as long

    def zeros(self, rows: int) -> Inputs:
        """Inputs of ``rows`` observations that are all zero, and allow all actions."""
        vector = {"vector": torch.zeros(rows, self.features, device=self.device)} if self.features else {}
        kinds = {f"image {key}": (shape, self.image_types[key]) for key, shape in self.images.items()}
        images = {key: torch.zeros(rows, *s, dtype=t, device=self.device) for key, (s, t) in kinds.items()}
        mask = torch.ones(rows, sum(self.sizes), dtype=torch.bool, device=self.device)
        return {**vector, **images, **({MASK: mask} if self.sizes else {})}

    def probe(self) -> Inputs:
        """Inputs of four random observations, always the same: two networks that agree on them are alike."""
        rng = torch.Generator().manual_seed(0)

        def random(part: Tensor) -> Tensor:
            if part.dtype == torch.bool:
                return part
            numbers = torch.randn(part.shape, generator=rng) if part.is_floating_point() else None
            return torch.randint(256, part.shape, generator=rng, dtype=torch.uint8) if numbers is None else numbers

        return {key: random(part).to(self.device) for key, part in self.zeros(4).items()}

    def update(self, obs: Observation, mask: Tensor) -> None:
        """Take the observations [..., *space.shape] for which ``mask`` [B] is true into the running statistics."""
        if not self.normalize:
            return
        batch = self.unscaled(obs)["vector"][mask].double()
        count = torch.full_like(batch[:1], len(batch))  # of no rows there is nothing to take in
        mine = torch.stack([count, batch.mean(0, True), batch.var(0, correction=0, keepdim=True)], 1)[: len(batch)]
        for rows, mean, var in self.ranks.rows(mine)[0]:
            self._merge(float(rows[0]), mean, var)
        self._refresh()

    def _merge(self, count: float, mean: Tensor, var: Tensor) -> None:
        """Take in the mean and variance [F] of ``count`` rows. Source: Chan et al. (1983)."""
        total = self.count + count
        delta = mean - self.mean.double()
        merged_mean = self.mean.double() + delta * (count / total)
        merged_var = (self.var.double() * self.count + var * count + delta**2 * (self.count * count / total)) / total
        self.mean = torch.where(self._scaled, merged_mean, 0.0).float()
        self.var = torch.where(self._scaled, merged_var, 1.0).float()
        self.count = total

    def state_dict(self) -> dict[str, Tensor | float]:
        return {"mean": self.mean.clone(), "var": self.var.clone(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.var = state["mean"].to(self.device), state["var"].to(self.device)
        self.count = float(state["count"])
        self._refresh()

    def _refresh(self) -> None:
        self._inverse_std = torch.rsqrt(self.var + 1e-8)
        self._numpy = (self.mean.cpu().numpy(), self._inverse_std.cpu().numpy())

    def unscaled(self, obs: Observation) -> Inputs:
        """Encode observations without normalisation, for ``scaled``, of this encoder or another's of the space."""
        if isinstance(obs, Tensor) and self._is_usual(obs):  # which need not visit the CPU
            return self.joined({self._name: obs.detach()})
        given, seen = self.layout.arrays(obs), {}
        for name, part in self.parts.items():
            array = given[name] if isinstance(given, dict) else given
            if isinstance(part, spaces.Discrete | spaces.MultiDiscrete):
                array = _one_hot(array, part)
            seen[name] = torch.as_tensor(array, device=self.device)
        inputs = self.joined(seen)
        return inputs | {MASK: torch.as_tensor(self.allowed(given), device=self.device)} if self.sizes else inputs

    def _is_usual(self, obs: Tensor) -> bool:
        """Whether a tensor is as ``layout`` would have it, and on this encoder's device."""
        if not self.plain or self.sizes or obs.dtype != torch.float32 or obs.device != self.mean.device:
            return False
        shape = self.parts[self._name].shape or ()
        return self.parts[self._name].dtype == np.float32 and obs.shape[obs.dim() - len(shape) :] == shape

    def joined(self, seen: dict[str, Tensor]) -> Inputs:
        """Network inputs from the parts of observations, choices one-hot, in torch alone."""
        inputs: Inputs = {}
        vectors: list[Tensor] = []
        for name, part in self.parts.items():
            value = seen[name]
            if name in self.images:
                inputs[f"image {name}"] = _image(value, part, self.images[name])
            else:
                vector = value.reshape(-1, _features(part)).float()
                vectors.append(vector / 255.0 if part.dtype == np.uint8 else vector)
        if vectors:
            inputs["vector"] = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)
        return inputs

    def allowed(self, obs: Any) -> np.ndarray[Any, Any]:
        """Which choices the masks of ``layout``'s observations allow, bool [B, sum of sizes]; where these allow none of
        a categorical's, as some environments' do after an episode's end, all of them."""
        mask: np.ndarray[Any, Any] = obs[MASK].reshape(-1, sum(self.sizes)) != 0
        some = np.logical_or.reduceat(mask, self._starts, axis=-1)
        return mask if some.all() else mask | np.repeat(~some, self.sizes, axis=-1)

    def masked(self, obs: Any, masks: Any) -> Any:
        """Observations with the masks, [n] or [N, n], that they came without; as they are where these are None.

        Raises UsageError where this encoder takes no masks, and for masks of another form, or that allow nothing.
        """
        if masks is None:
            return obs
        if not self.sizes:
            raise UsageError("action_masks: this agent was made for an environment without, and takes none")
        mask = np.asarray(masks)
        if mask.shape[-1:] != (sum(self.sizes),) or not np.isin(mask, (0, 1)).all():
            raise UsageError(f"action_masks: expected 0 or 1 for each of {sum(self.sizes)} choices, got {masks}")
        if not np.logical_or.reduceat(mask != 0, self._starts, axis=-1).all():
            raise UsageError("action_masks: no action is allowed")
        return {**(obs if isinstance(obs, dict) else {UNMASKED: obs}), MASK: mask.astype(np.int8)}


def replace_rows(obs: Any, others: Any, rows: Any) -> Any:
    """A copy of observations [N, *shape] with the given rows taken from ``others``, which has one for each of N."""
    if isinstance(obs, dict):
        per_key = others if isinstance(others, dict) else {k: [o and o[k] for o in others] for k in obs}
        return {key: replace_rows(part, per_key[key], rows) for key, part in obs.items()}
    obs = np.array(obs)
    for row in rows:
        obs[row] = others[row]
    return obs


def _chosen(parts: dict[str, spaces.Space[Any]], keys: Sequence[str]) -> dict[str, spaces.Space[Any]]:
    """The parts of an observation that ``keys`` name, or that lie in a Dict that they name."""
    for key in keys:
        if not any(f"{name}.".startswith(f"{key}.") for name in parts):
            known = f"its parts are {', '.join(parts)}" if any(parts) else "it is no Dict"
            raise UsageError(f"the observation has no part {key!r}: {known}")
    return {n: p for n, p in parts.items() if not keys or any(f"{n}.".startswith(f"{key}.") for key in keys)}


def _image_type(space: spaces.Space[Any]) -> torch.dtype:
    return torch.float32 if np.issubdtype(space.dtype, np.floating) else torch.uint8


def _image(value: Tensor, space: spaces.Space[Any], shape: tuple[int, int, int]) -> Tensor:
    """Images [..., *space.shape] as [B, C, H, W], in the type that ``Inputs`` has them.

    A pixel's channels lie side by side, which makes convolutions' gradients on the CPU half as fast again.
    """
    assert isinstance(space, spaces.Box)
    if space.dtype == np.bool_:
        value = value.to(torch.uint8) * 255
    elif space.dtype != np.uint8:
        value = value.float() / brightest(space)
    if len(space.shape) == 3 and space.shape != shape:
        return value.reshape(-1, *space.shape).permute(0, 3, 1, 2)
    return value.reshape(-1, *shape).contiguous(memory_format=torch.channels_last)


def _features(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return sum(category_sizes(space))
    return int(np.prod(space.shape or (1,)))


def _one_hot(value: np.ndarray[Any, Any], space: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """Choices [..., *shape] one-hot, side by side, as Gymnasium's ``flatten`` does it: [B, sum of n]."""
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    sizes = category_sizes(space)
    index = value.reshape(-1, len(sizes)) - np.asarray(space.start).reshape(-1)
    flat = np.zeros((len(index), sum(sizes)), np.float32)
    rows, first = np.arange(len(index)), 0
    for chosen, n in zip(index.T, sizes, strict=True):
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < n:
            raise UsageError(f"an observation lies outside of its space {space}: {value.tolist()}")
        flat[rows, first + chosen] = 1.0
        first += n
    return flat
