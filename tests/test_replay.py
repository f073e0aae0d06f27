"""The replay buffer: what it stores, what it leaves out, and that it samples uniformly."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from klrl.buffers.replay import ReplayBuffer
from klrl.errors import NonFiniteError

CPU = torch.device("cpu")
NUMBER = spaces.Box(-np.inf, np.inf, (1,))


def buffer(n_envs: int = 1, capacity: int = 100, n_step: int = 1, space: Any = NUMBER, **options: Any) -> ReplayBuffer:
    return ReplayBuffer(space, 1, capacity, n_envs, gamma=0.5, n_step=n_step, **options)


def play(into: ReplayBuffer, ends: dict[int, str], steps: int) -> None:
    """One environment that counts: it shows t before step t, earns t + 1, and ends where ``ends`` says."""
    for t in range(steps):
        terminated, truncated = (np.array([ends.get(t) == kind]) for kind in ("terminated", "truncated"))
        shown, then = (np.array([[float(x)]], np.float32) for x in (t, t + 1))
        into.add(shown, np.array([[10.0 * t]], np.float32), np.array([t + 1.0]), terminated, truncated, then)


def rows(of: ReplayBuffer) -> list[tuple[float, ...]]:
    """observation, action, reward, discount, next observation of each stored transition, oldest first."""
    return [tuple(row.tolist()) for row in of._rows[: of.size]]


def test_a_transition_is_stored_as_it_happened_and_a_reset_is_not() -> None:
    one = buffer()
    play(one, {1: "terminated", 3: "truncated"}, 5)
    # Step 2 only resets after the termination in step 1; step 4 after the truncation in step 3.
    assert rows(one) == [(0, 0, 1, 0.5, 1), (1, 10, 2, 0.0, 2), (3, 30, 4, 0.5, 4)]
    assert (one.size, one.steps) == (3, 3)


def test_n_step_returns_match_a_hand_computed_example() -> None:
    three = buffer(n_step=3)
    play(three, {4: "truncated"}, 5)
    # 1 + 2/2 + 3/4 = 2.75 and so on; at the end the sums are cut short and still bootstrap from the last observation.
    assert rows(three) == [
        (0, 0, 2.75, 0.125, 3),
        (1, 10, 2 + 1.5 + 1, 0.125, 4),
        (2, 20, 3 + 2 + 1.25, 0.125, 5),
        (3, 30, 4 + 2.5, 0.25, 5),
        (4, 40, 5, 0.5, 5),
    ]
    ended = buffer(n_step=3)
    play(ended, {1: "terminated"}, 2)
    assert rows(ended) == [(0, 0, 2.0, 0.0, 2), (1, 10, 2.0, 0.0, 2)]


def test_environments_side_by_side_are_kept_apart() -> None:
    for n_step in (1, 2):
        two = buffer(n_envs=2, n_step=n_step)
        for t in range(3):
            shown = np.array([[t], [100 + t]], np.float32)
            nothing = np.zeros(2, np.bool_)
            two.add(shown, shown, shown[:, 0], np.array([t == 1, False]), nothing, shown + 1)
        starts = [row[0] for row in rows(two)]
        assert starts == ([0, 100, 1, 101, 102] if n_step == 1 else [0, 1, 100, 101])
        assert all(abs(row[4] - row[0]) <= n_step for row in rows(two))


def test_a_full_buffer_overwrites_its_oldest() -> None:
    small = buffer(n_envs=3, capacity=7)
    for t in range(4):
        shown = np.array([[t], [t + 0.1], [t + 0.2]], np.float32)
        small.add(shown, shown, shown[:, 0], np.zeros(3, bool), np.zeros(3, bool), shown)
    assert small.size == 7
    kept = sorted(round(row[0], 1) for row in rows(small))
    assert kept == [1.2, 2.0, 2.1, 2.2, 3.0, 3.1, 3.2][-7:]


def test_samples_are_uniform_and_reproducible() -> None:
    one = buffer(capacity=50)
    play(one, {}, 70)
    draws = [one.sample(20_000, np.random.default_rng(seed), CPU) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].action, draws[1].action)
    assert not torch.equal(draws[0].action, draws[2].action)
    counts = np.unique(draws[0].inputs["vector"].numpy(), return_counts=True)[1]
    assert len(counts) == 50
    chi_square = float(((counts - 400.0) ** 2 / 400.0).sum())
    assert 20 < chi_square < 90  # 49 degrees of freedom: within 0.01 % to 99.97 %
    first = draws[0]
    assert torch.equal(first.next_inputs["vector"], first.inputs["vector"] + 1), "rows stay together"
    assert torch.equal(first.reward, first.inputs["vector"][:, 0] + 1)
    with pytest.raises(ValueError, match="empty"):
        buffer().sample(1, np.random.default_rng(0), CPU)


def test_images_and_dicts_are_stored_as_networks_take_them() -> None:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (36, 40, 3), np.uint8), "which": spaces.Discrete(3)})
    one = buffer(space=space)
    seen, then = ({key: np.stack([part.sample()]) for key, part in space.spaces.items()} for _ in range(2))
    one.add(seen, np.zeros((1, 1)), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), then)
    sample = one.sample(1, np.random.default_rng(0), CPU)
    for inputs, obs in ((sample.inputs, seen), (sample.next_inputs, then)):
        assert torch.equal(inputs["image camera"], torch.from_numpy(obs["camera"]).permute(0, 3, 1, 2))
        assert inputs["vector"].argmax().item() == obs["which"][0]


def test_a_buffer_on_disk_holds_the_same_and_leaves_nothing_behind(tmp_path: Any) -> None:
    kept, mapped = buffer(n_step=2), buffer(n_step=2, folder=str(tmp_path / "replay"))
    for one in (kept, mapped):
        play(one, {5: "truncated"}, 20)
    assert isinstance(mapped._rows, np.memmap)
    assert rows(kept) == rows(mapped)
    assert list((tmp_path / "replay").iterdir()) == []


def test_what_is_not_finite_is_named() -> None:
    bad = np.array([[0.0], [np.nan]], np.float32)
    good, no = np.zeros((2, 1), np.float32), np.zeros(2, bool)
    with pytest.raises(NonFiniteError, match="observation is not finite in env 1"):
        buffer(n_envs=2).add(good, good, np.zeros(2), no, no, bad)
    with pytest.raises(NonFiniteError, match="reward is not finite in env 0"):
        buffer(n_envs=2).add(good, good, np.array([np.inf, 0.0]), no, no, good)
    with pytest.raises(NonFiniteError, match="reward is not finite in env 0"):
        buffer(n_envs=2).add(good, good, np.array([1e39, 0.0]), no, no, good)  # beyond float32
    with pytest.raises(NonFiniteError, match="observation is not finite in env 1"):
        buffer(n_envs=2).add(bad, good, np.zeros(2), no, no, good)


def test_what_the_caller_changes_later_is_not_stored() -> None:
    two = buffer(n_step=2)
    shown, no = np.zeros((1, 1), np.float32), np.zeros(1, bool)
    for t in range(3):
        shown[:] = t
        two.add(shown, shown, np.zeros(1), no, no, shown + 1)
    assert [row[0] for row in rows(two)] == [0, 1]
