"""Recurrent networks: a GRU or LSTM between observations and an MLP, a step at a time or over whole sequences."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from klrl.errors import UsageError
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.networks import MLP, Activation, Array, OwnNetwork
from klrl.policies.torso import Torso

Cell = Literal["gru", "lstm"]
SEQUENCE = "sequence"
"""The key of inputs that says which rows follow each other: int64 [B, 2], the environment and the sequence of a row."""
STATE = "state"
"""The key of inputs that has, where a sequence begins, what the networks remember: [B, 2, S], policy and critic."""


class RecurrentNetwork(nn.Module):
    """Encoded observations to outputs [B, outputs]: a torso, a GRU or LSTM, and an MLP on its hidden state.

    A row's output depends on the rows of its sequence before it, which lie before it in the batch, and on the state
    that the sequence begins with. Inputs without sequences are the first steps of as many episodes.
    """

    def __init__(
        self,
        cell: Cell,
        size: int,
        of_critic: bool,
        encoder: ObservationEncoder,
        activation: Activation,
        layer_norm: bool,
        rng: torch.Generator,
        hidden_sizes: Sequence[int],
        outputs: int,
        output_gain: float,
    ) -> None:
        """``size``: of the hidden state. ``of_critic``: which of the inputs' two states is this network's."""
        super().__init__()
        self.torso, self.size, self.place = Torso(encoder, rng), size, int(of_critic)
        self.cell = (nn.GRU if cell == "gru" else nn.LSTM)(self.torso.width, size)
        for name, weight in self.cell.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(weight)
                continue
            for gate in weight.detach().chunk(weight.shape[0] // size):
                nn.init.orthogonal_(gate, generator=rng)
        self.mlp = MLP([size, *hidden_sizes, outputs], activation, output_gain, rng, layer_norm)

    @property
    def state_size(self) -> int:
        """S: the hidden state, and an LSTM's cell state."""
        return self.size * (1 if isinstance(self.cell, nn.GRU) else 2)

    def forward(self, inputs: Inputs) -> Tensor:
        if SEQUENCE not in inputs:
            return self.mlp(self.cell(self.torso(inputs)[None])[0][0])
        padded, (which, time, first) = self._padded(inputs)
        hidden, _ = self.cell(padded, self._parts(inputs[STATE][first, self.place]))
        return self.mlp(hidden[time, which])

    def step(self, inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, outputs], and the states [B, S] after one step from ``state`` [B, S]."""
        hidden, after = self.cell(self.torso(inputs)[None], self._parts(state))
        return self.mlp(hidden[0]), self._whole(after)

    @np.errstate(all="ignore")  # as torch
    def step_numpy(self, x: Array, state: Array) -> Array | None:
        """The outputs [B, outputs] of ``step`` for vectors x [B, F] on the CPU, and ``state`` [B, S] moved on in place.

        On a handful of rows torch's cells take ten times as long. None where a layer is no plain one.
        """
        cell: Any = self._modules["cell"]
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (cell, self.torso))
        if hooked or type(cell) not in (nn.GRU, nn.LSTM) or cell.num_layers != 1 or not self.mlp.is_plain:
            return None
        to_input, to_hidden, bias, hidden_bias = (part.detach().numpy() for part in cell._parameters.values())
        hidden, size = state[:, : self.size], self.size
        gates, recurrent = x @ to_input.T + bias, hidden @ to_hidden.T + hidden_bias
        if isinstance(cell, nn.LSTM):
            gates += recurrent
            kept = _sigmoid(gates[:, size : 2 * size]) * state[:, size:]
            kept += _sigmoid(gates[:, :size]) * np.tanh(gates[:, 2 * size : 3 * size])
            state[:, size:] = kept
            state[:, :size] = _sigmoid(gates[:, 3 * size :]) * np.tanh(kept)
        else:
            both = _sigmoid(gates[:, : 2 * size] + recurrent[:, : 2 * size])
            new = np.tanh(gates[:, 2 * size :] + both[:, :size] * recurrent[:, 2 * size :])
            state[:] = new + both[:, size:] * (hidden - new)
        return self.mlp.forward_numpy(np.ascontiguousarray(state[:, :size]))

    @torch.no_grad()
    def last_states(self, inputs: Inputs, n_envs: int) -> Tensor:
        """The states [N, S] after the last row of each environment."""
        padded, (which, time, first) = self._padded(inputs)
        last = which[-n_envs:]  # rows are in the order of time
        packed = nn.utils.rnn.pack_padded_sequence(padded[:, last], time[-n_envs:].cpu() + 1, enforce_sorted=False)
        return self._whole(self.cell(packed, self._parts(inputs[STATE][first[last], self.place]))[1])

    def _padded(self, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """What the torso makes of the rows, [L, Q, F], their sequences side by side; and ``places``."""
        x, (which, time, first) = self.torso(inputs), places(inputs[SEQUENCE][:, 1])
        padded = x.new_zeros(int(time.max()) + 1, len(first), x.shape[1]).index_put((time, which), x)
        return padded, (which, time, first)

    def _parts(self, state: Tensor) -> Any:
        """States [B, S] as torch's cells take them."""
        parts = tuple(part.contiguous()[None] for part in torch.split(state, self.size, -1))
        return parts if isinstance(self.cell, nn.LSTM) else parts[0]

    def _whole(self, parts: Any) -> Tensor:
        return torch.cat(parts if isinstance(self.cell, nn.LSTM) else (parts,), -1)[0]


def make_recurrent(
    cell: Cell, size: int, of_critic: bool, own: OwnNetwork | None, encoder: ObservationEncoder, *parts: Any
) -> RecurrentNetwork:
    """A recurrent network, from what ``make_network`` takes. Raises UsageError for a network of one's own."""
    if own is not None:
        raise UsageError(f"--memory {cell} does not go with a --network of one's own")
    return RecurrentNetwork(cell, size, of_critic, encoder, *parts)


def _sigmoid(x: Array) -> Array:
    return 0.5 * np.tanh(0.5 * x) + 0.5  # exp(-x) would overflow


def places(sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows belong in sequences side by side: the sequence of each row, counted from 0, and its step in that, each
    [B]; and which row each sequence begins with, [Q]. ``sequence`` [B]: rows with equal numbers are of one sequence."""
    which = torch.unique(sequence, return_inverse=True)[1]
    order = which.argsort(stable=True)
    lengths = which.bincount()
    begins = lengths.cumsum(0) - lengths
    time = torch.empty_like(which)
    time[order] = torch.arange(len(which), device=which.device) - begins[which[order]]
    return which, time, order[begins]


def environment_rows(inputs: Inputs, count: int, rng: Any) -> list[Tensor]:
    """The rows of all environments, some environments at a time in random order: at most ``count`` such groups."""
    environment = inputs[SEQUENCE][:, 0]
    groups = np.array_split(rng.permutation(int(environment.max()) + 1), count)
    return [
        torch.isin(environment, torch.from_numpy(group).to(environment)).nonzero()[:, 0]
        for group in groups
        if len(group)
    ]
